"""Two processes compute the gradient of one, at every ZeRO stage, over gloo."""

import multiprocessing
import os
import socket

import torch
from learner_reference import Spy, check_update, plain_reference
from learner_samples import make_groups, make_settings, write_model
from terms_reference import check_terms, whole_step

from learner.batch import build_step_batch

SETTINGS = {"task": {"temperature": 0.8}}


def _rank(rank, port, directory, errors):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    try:
        torch.set_num_threads(1)
        groups = make_groups(3, holes=True) + make_groups(1, rewards=[1.0] * 4, seed=9)
        for stage in range(4):
            settings = make_settings(directory, learner={"zero_stage": stage}, **SETTINGS)
            engine = Spy(settings, directory)
            reference = plain_reference(directory, settings, groups)
            for budget in (40, 10**6):  # several micro-batches for each rank, and none for the second
                batch = build_step_batch(groups, micro_batch_tokens=budget, normalise_std=False)
                check_update(engine, batch, reference)
                engine = Spy(settings, directory)
            names = engine.tensors().keys()  # rank 0 alone keeps them
            assert ("lm_head.weight" in names) == (rank == 0)
        for objective in (
            {"name": "gspo", "clip_low": 0.5},
            {"name": "bapo", "positive_share": 0.6, "high_step": 0.01},
        ):
            settings = make_settings(directory, objective=objective, **SETTINGS)
            batch = build_step_batch(groups, micro_batch_tokens=40, normalise_std=False)
            check_update(Spy(settings, directory), batch, plain_reference(directory, settings, groups))
        reference = directory.parent / "other"
        coefficients = {"kl_coefficient": 0.3, "entropy_coefficient": 0.2}
        for stage in (1, 3):
            settings = make_settings(
                directory,
                objective=coefficients,
                model={"reference": str(reference)},
                learner={"zero_stage": stage, "micro_batch_tokens": 40},
                **SETTINGS,
            )
            engine = Spy(settings, directory)
            batch = engine.lay_out(groups)
            check_terms(engine, batch, whole_step(directory, reference, groups, batch.advantages, 0.3, 0.2), kl=0.3)
        errors.put(None)
    except BaseException as error:
        errors.put(f"rank {rank}: {error!r}")
        raise


def test_two_ranks_compute_the_gradient_of_one(tmp_path):
    directory = write_model(tmp_path / "m")
    write_model(tmp_path / "other", seed=1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    context = multiprocessing.get_context("spawn")
    errors = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, port, directory, errors)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    try:
        assert [errors.get(timeout=240) for _ in ranks] == [None, None]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
