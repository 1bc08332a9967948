"""The DeepSpeed engine: its gradient is that of the loss over the whole step, however the step is cut and sharded."""

import math

import numpy as np
import pytest
import torch
from learner_reference import Spy, check_update, plain_reference
from learner_samples import VOCABULARY, make_groups, make_settings, write_model
from transformers import AutoModelForCausalLM

from learner.batch import build_step_batch
from learner.engine import Engine
from protocol.errors import NonFiniteError
from protocol.trajectory import Completion, Group, Ticket, VersionSpan

SETTINGS = {"task": {"temperature": 0.8}}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("tied", "experts"), [(False, 0), (True, 4)])
def test_gradient_does_not_depend_on_the_cut(tmp_path, stage, tied, experts):
    directory = write_model(tmp_path / "m", tied=tied, experts=experts)
    groups = make_groups(4, holes=True) + make_groups(1, rewards=[1.0] * 4, seed=9)
    for budget in (20, 60, 10**6):
        settings = make_settings(directory, learner={"zero_stage": stage, "micro_batch_tokens": budget}, **SETTINGS)
        batch = build_step_batch(groups, micro_batch_tokens=budget, normalise_std=False)
        check_update(Spy(settings, directory), batch, plain_reference(directory, settings, groups))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_trains_and_publishes(tmp_path, stage):
    directory = write_model(tmp_path / "m")
    settings = make_settings(
        directory, learner={"precision": "bfloat16", "zero_stage": stage}, model={"dtype": "bfloat16"}
    )
    engine = Engine(settings, directory)
    before = engine.tensors()
    batch = build_step_batch(make_groups(4), micro_batch_tokens=60, normalise_std=False)
    update = engine.update(batch)
    assert not update.skipped
    assert update.grad_norm > 0
    after = engine.tensors()
    assert {t.dtype for t in after.values()} == {torch.bfloat16}
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_bfloat16_keeps_rotary_frequencies_exact(tmp_path):
    directory = write_model(tmp_path / "m")
    engine = Engine(make_settings(directory, learner={"precision": "bfloat16"}), directory)
    sequence = list(range(20)) * 3
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([sequence])).logits[0].float()
    exact = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(sequence)[1:, None]).squeeze(1)
    assert np.allclose(engine.probe([sequence]).logprobs[0], exact.numpy(), atol=1e-6)


def test_probe_is_at_temperature_one_and_ragged(tmp_path):
    directory = write_model(tmp_path / "m")
    engine = Engine(make_settings(directory, **SETTINGS), directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    sequences = [[1, 2, 3], [4, 5], [6, 7, 8, 9, 10]]
    probe = engine.probe(sequences)
    for tokens, logprobs in zip(sequences, probe.logprobs, strict=True):
        with torch.no_grad():
            rows = model(input_ids=torch.tensor([tokens])).logits[0].log_softmax(-1)
        exact = rows[:-1].gather(1, torch.tensor(tokens)[1:, None]).squeeze(1)
        assert np.allclose(logprobs, exact.numpy(), atol=1e-6)


PRECISIONS = [("float32", 0), *((p, stage) for p in ("float32", "bfloat16") for stage in (1, 2, 3))]


@pytest.mark.parametrize(("precision", "stage"), PRECISIONS)
def test_non_finite_gradients_skip_the_step_and_the_third_in_a_row_ends_it(tmp_path, stage, precision):
    directory = write_model(tmp_path / "m")
    settings = make_settings(directory, learner={"zero_stage": stage, "precision": precision})
    engine = Engine(settings, directory)
    batch = build_step_batch(
        make_groups(4, rewards=[1.0, 0.0, 0.0, 1.0]), micro_batch_tokens=10**6, normalise_std=False
    )
    poisoned = []

    def poison(gradient):
        poisoned.append(True)
        return gradient * math.nan

    before = engine.tensors()
    for _ in range(2):
        with_hook = engine._policy.model.lm_head.register_forward_hook(
            lambda _, __, out: out[0].register_hook(poison) and None
        )
        update = engine.update(batch)
        with_hook.remove()
        assert update.skipped
        assert update.grad_norm == 0
    assert poisoned
    assert all(torch.equal(before[name], tensor) for name, tensor in engine.tensors().items())
    assert not engine.update(batch).skipped
    engine._policy.model.lm_head.register_forward_hook(lambda _, __, out: out[0].register_hook(poison) and None)
    assert engine.update(batch).skipped
    assert engine.update(batch).skipped
    with pytest.raises(NonFiniteError, match="3 steps in a row"):
        engine.update(batch)


def test_a_batch_of_equal_rewards_changes_nothing_but_is_a_step(tmp_path):
    directory = write_model(tmp_path / "m")
    engine = Engine(make_settings(directory), directory)
    before = engine.tensors()
    batch = build_step_batch(make_groups(3, rewards=[1.0] * 4), micro_batch_tokens=10**6, normalise_std=True)
    update = engine.update(batch)
    assert (update.loss, update.grad_norm, update.skipped) == (0.0, 0.0, False)
    assert all(torch.equal(before[name], tensor) for name, tensor in engine.tensors().items())


def test_gradient_checkpointing_changes_no_gradient(tmp_path):
    directory = write_model(tmp_path / "m")
    groups = make_groups(3)
    settings = make_settings(directory, learner={"gradient_checkpointing": True}, **SETTINGS)
    batch = build_step_batch(groups, micro_batch_tokens=10**6, normalise_std=False)
    check_update(Spy(settings, directory), batch, plain_reference(directory, settings, groups))


@pytest.mark.parametrize(("precision", "stage"), PRECISIONS)
def test_saved_state_continues_bit_for_bit(tmp_path, stage, precision):
    directory = write_model(tmp_path / "m")
    settings = make_settings(directory, learner={"zero_stage": stage, "precision": precision})
    batches = [
        build_step_batch(make_groups(4, seed=seed), micro_batch_tokens=10**6, normalise_std=False) for seed in range(4)
    ]
    engine = Engine(settings, directory)
    for batch in batches[:2]:
        engine.update(batch)
    engine.capture(tmp_path)()
    expected = [engine.update(batch) for batch in batches[2:]]
    final = engine.tensors()

    other = Engine(settings, directory)
    other.load(tmp_path)
    for batch, right in zip(batches[2:], expected, strict=True):
        update = other.update(batch)
        assert (update.loss, update.grad_norm) == (right.loss, right.grad_norm)
    assert all(torch.equal(final[name], tensor) for name, tensor in other.tensors().items())


def test_cuda_that_is_not_there_is_named(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match="no CUDA device"):
        Engine(make_settings(tmp_path, model={"device": "cuda"}), tmp_path)


def test_the_policy_learns_what_is_rewarded(tmp_path):
    """A bandit: the prompt is one token, the response one, and only token 5 is rewarded."""
    directory = write_model(tmp_path / "m")
    engine = Engine(make_settings(directory, learner={"learning_rate": 3e-3}), directory)
    rng = np.random.default_rng(0)
    prompt = np.array([1], "i4")

    def logprobs():
        return np.array(engine.probe([[1, token] for token in range(VOCABULARY)]).logprobs)[:, 0]

    first = np.exp(logprobs()[5])
    for _ in range(40):
        behaviour = logprobs()
        sampled = rng.choice(VOCABULARY, (8, 16), p=np.exp(behaviour) / np.exp(behaviour).sum())
        groups = [
            Group(Ticket(i, 0), 0, prompt, tuple(_answer(int(t), behaviour[t]) for t in row), "actor")
            for i, row in enumerate(sampled)
        ]
        engine.update(build_step_batch(groups, micro_batch_tokens=10**6, normalise_std=False))
    assert np.exp(logprobs()[5]) > max(0.9, first)


def _answer(token, logprob):
    return Completion(
        tokens=np.array([token], "i4"),
        logprobs=np.array([logprob], "f4"),
        mask=np.ones(1, "u1"),
        spans=(VersionSpan(0, 1, 0),),
        reward=float(token == 5),
        finish_reason="stop",
    )
