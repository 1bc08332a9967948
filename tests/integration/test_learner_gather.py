"""ZeRO-3 weights leave the learner one parameter at a time, and only rank 0 keeps them."""

import multiprocessing
import os
import socket
from contextlib import contextmanager

import torch
from learner_samples import make_settings, write_model
from safetensors.torch import load_file

import learner.weights


def _rank(rank, port, directory, answers):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    try:
        torch.set_num_threads(1)
        from learner.engine import Engine

        settings = make_settings(directory, learner={"zero_stage": 3})
        engine = Engine(settings, directory)
        parameters = list(engine._policy.parameters())
        for parameter in parameters:  # small ones stay gathered after a step; here all begin partitioned
            parameter.partition()
        peaks = _watch(parameters)
        tensors = engine.tensors()
        sizes = sorted(parameter.ds_numel for parameter in parameters)
        answers.put((rank, max(peaks), sizes, {name: t.sum().item() for name, t in tensors.items()}))
    except BaseException as error:
        answers.put((rank, repr(error), [], {}))
        raise


def _watch(parameters):
    """Elements that the device holds whole, each time a parameter is gathered."""
    peaks = []
    gathered = learner.weights._gathered

    @contextmanager
    def watched(parameter):
        with gathered(parameter):
            peaks.append(sum(p.ds_numel for p in parameters if p.data.numel() == p.ds_numel))
            yield

    learner.weights._gathered = watched
    return peaks


def test_the_device_never_holds_more_than_the_largest_parameter(tmp_path):
    directory = write_model(tmp_path / "m")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    context = multiprocessing.get_context("spawn")
    answers = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, port, directory, answers)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    try:
        (_, peak, sizes, kept), (_, other_peak, _, other_kept) = sorted(answers.get(timeout=240) for _ in ranks)
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    assert peak == other_peak == sizes[-1] < sum(sizes)
    assert other_kept == {}
    expected = load_file(directory / "model.safetensors")
    assert kept == {name: tensor.sum().item() for name, tensor in expected.items()}
