"""However a step is cut, packed, padded, sharded and spread over ranks: one gradient, and the same statistics."""

import multiprocessing
import os
import socket
from contextlib import contextmanager
from itertools import product

import pytest
import torch
from learner_reference import Spy, check_update, plain_reference
from learner_samples import make_groups, make_settings, write_model
from torch import nn
from transformers.models.qwen3 import modeling_qwen3

from protocol.errors import SettingsError

TINY = 1e-30  # of a learning rate: weights stay as they are, so that one engine takes every cut
MODELS = {"dense": {}, "moe": {"tied": True, "experts": 4}}
CUTS = (10**6, 40, 1)  # one micro-batch, several, one for each sequence


def _groups():
    return make_groups(3, holes=True) + make_groups(1, rewards=[1.0] * 4, seed=9)


def _settings(directory, **learner):
    return make_settings(directory, learner={"learning_rate": TINY, **learner}, task={"temperature": 0.8})


def _check_matrix(directory):
    groups = _groups()
    reference = plain_reference(directory, _settings(directory), groups)
    for stage, packing, checkpointing in product(range(4), (True, False), (False, True)):
        if checkpointing and stage not in (0, 3):
            continue  # which parameters are there to compute with again differs between these two alone
        options = {"zero_stage": stage, "packing": packing, "gradient_checkpointing": checkpointing}
        engine = Spy(_settings(directory, **options), directory)
        assert engine.packs == packing
        for budget in CUTS:
            engine._settings = _settings(directory, **options, micro_batch_tokens=budget)
            batch = engine.lay_out(groups)
            assert any(micro.packed is not None for micro in batch.micro_batches) == (packing and budget > 1)
            try:
                check_update(engine, batch, reference)
            except AssertionError as error:
                raise AssertionError(f"ZeRO {options}, micro-batches of {budget} tokens") from error


@pytest.mark.parametrize("model", MODELS)
def test_one_rank(tmp_path, model):
    _check_matrix(write_model(tmp_path / "m", **MODELS[model]))


class _SeparateExperts(nn.Module):
    """Experts as modules of their own, of which a micro-batch may use none: what models outside transformers do."""

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, 4, bias=False)
        self.experts = nn.ModuleList(nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4))

    def forward(self, hidden):
        flat = hidden.flatten(0, 1)
        weight, chosen = self.gate(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            taken = (chosen == number).nonzero()[:, 0]
            if len(taken):
                out = out.index_add(0, taken, expert(flat[taken]) * weight[taken, None])
        return out.view_as(hidden)


@contextmanager
def _separate_experts():
    original, modeling_qwen3.Qwen3MLP = modeling_qwen3.Qwen3MLP, _SeparateExperts
    try:
        yield
    finally:
        modeling_qwen3.Qwen3MLP = original


def _check_separate_experts(directory):
    """Sequences one by one, so that in most passes some expert gets no token on one of the ranks."""
    groups = _groups()
    with _separate_experts():
        reference = plain_reference(directory, _settings(directory), groups)
        with pytest.raises(SettingsError, match="take zero_stage = 1 or 3"):
            Spy(_settings(directory, zero_stage=2), directory)
        for stage in (0, 1, 3):
            engine = Spy(_settings(directory, zero_stage=stage, micro_batch_tokens=1), directory)
            for _ in range(2):
                check_update(engine, engine.lay_out(groups), reference)


def _rank(rank, port, directories, separate, errors):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    try:
        torch.set_num_threads(1)
        for directory in directories:
            _check_matrix(directory)
        _check_separate_experts(separate)
        errors.put(None)
    except BaseException as error:
        errors.put(f"rank {rank}: {error!r}, {error.__cause__}")
        raise


def test_two_ranks(tmp_path):
    directories = [write_model(tmp_path / name, **options) for name, options in MODELS.items()]
    with _separate_experts():
        separate = write_model(tmp_path / "separate")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    context = multiprocessing.get_context("spawn")
    errors = context.Queue()
    ranks = [context.Process(target=_rank, args=(rank, port, directories, separate, errors)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    try:
        assert [errors.get(timeout=240) for _ in ranks] == [None, None]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
