"""Objectives and advantages against numbers recorded from published reference code, and the edges those leave open."""

import json
import math
from pathlib import Path

import pytest
import torch

from learner.advantages import group_advantages
from learner.objectives import OBJECTIVES, compute_objective, compute_statistics

GOLDEN = Path(__file__).parent.parent / "golden"
GOLDEN_OBJECTIVES = ("vespo", "grpo", "gspo", "sapo", "cispo")


def _cases(name):
    return [pytest.param(name, case, id=f"{name}-{case['name']}") for case in _load(name)]


def _load(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())["cases"]


def _scaled(actual, expected):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    scale = expected.abs().max().clamp(min=1e-300)
    return float((actual.detach().double() - expected).abs().max() / scale)


@pytest.mark.parametrize(("name", "case"), [c for name in GOLDEN_OBJECTIVES for c in _cases(name)])
def test_golden_vectors(name, case):
    dtype = getattr(torch, case["dtype"])
    inputs, expected = case["inputs"], case["expected"]
    logprobs = torch.tensor(inputs["logprobs"], dtype=dtype, requires_grad=True)
    behaviour, advantages = (torch.tensor(inputs[key], dtype=dtype) for key in ("behaviour_logprobs", "advantages"))
    result = compute_objective(
        name,
        logprobs,
        behaviour,
        advantages,
        torch.tensor(inputs["mask"]),
        aggregation=case["aggregation"],
        **inputs["hyperparameters"],
    )
    result.loss.backward()
    limit = 1e-5 if dtype == torch.float32 else 1e-9 if case["aggregation"] == "token-mean" else 1e-7
    assert float(result.loss.detach()) == pytest.approx(expected["loss"], rel=limit, abs=limit)
    assert _scaled(logprobs.grad, expected["grad_logprobs"]) < limit
    assert _scaled(result.sequence_log_ratio, expected["sequence_log_ratio"]) < limit
    if "weights" in expected:
        for weight, right, log_ratio in zip(
            result.weights.tolist(), expected["weights"], expected["sequence_log_ratio"], strict=True
        ):
            relative = max(limit, 1e-7 if log_ratio < -18.42 else 0)
            assert weight == pytest.approx(right, rel=relative, abs=1e-300)
    assert result.stats["silenced"] == 0


@pytest.mark.parametrize("case", [pytest.param(c, id=c["name"]) for c in _load("group_advantages")])
def test_golden_group_advantages(case):
    rewards = torch.tensor(case["inputs"]["rewards"], dtype=torch.float64)
    ids = case["inputs"]["group_ids"]
    limit = 1e-7 if case["name"] == "singleton_group" else 1e-12
    for normalise, key in ((True, "advantages_std_normalised"), (False, "advantages_mean_only")):
        actual = group_advantages(rewards, ids, normalise)
        assert _scaled(actual, case["expected"][key]) < limit


def _batch(rows=6, length=9, seed=0):
    generator = torch.Generator().manual_seed(seed)
    behaviour = -torch.rand(rows, length, generator=generator, dtype=torch.float64)
    logprobs = behaviour + 0.2 * torch.randn(rows, length, generator=generator, dtype=torch.float64)
    advantages = torch.randn(rows, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, length, generator=generator) < 0.7
    mask[-1] = False
    return logprobs, behaviour, advantages, mask


def _loss_and_gradient(name, logprobs, *others, **options):
    leaf = logprobs.clone().requires_grad_()
    result = compute_objective(name, leaf, *others, **options)
    result.loss.backward()
    return result, leaf.grad


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_masked_positions_may_hold_anything(name, value):
    logprobs, behaviour, advantages, mask = _batch()
    clean, clean_gradient = _loss_and_gradient(name, logprobs, behaviour, advantages, mask)
    dirty, gradient = _loss_and_gradient(
        name, logprobs.masked_fill(~mask, value), behaviour.masked_fill(~mask, value), advantages, mask
    )
    assert torch.equal(dirty.loss, clean.loss)
    assert torch.equal(dirty.weights, clean.weights)
    assert torch.equal(gradient, clean_gradient)
    assert dirty.stats == clean.stats


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["logprobs", "behaviour", "both", "advantage"])
def test_non_finite_values_silence_their_own_sequence_alone(name, value, where):
    logprobs, behaviour, advantages, mask = _batch()
    row, token = 1, int(mask[1].nonzero()[0])
    _, clean_gradient = _loss_and_gradient(name, logprobs, behaviour, advantages, mask)
    if where in ("logprobs", "both"):
        logprobs[row, token] = value
    if where in ("behaviour", "both"):
        behaviour[row, token] = value
    if where == "advantage":
        advantages[row] = value
    result, gradient = _loss_and_gradient(name, logprobs, behaviour, advantages, mask)
    assert result.loss.isfinite()
    assert result.stats["silenced"] == 1
    assert result.weights[row] == 0
    assert not gradient[row].any()
    others = [i for i in range(len(mask)) if i != row]
    assert torch.equal(gradient[others], clean_gradient[others])


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("shape", [(3, 4), (3, 0), (0, 4)])
def test_batch_without_unmasked_tokens_has_zero_loss_and_gradient(name, shape):
    logprobs = torch.full(shape, math.nan, dtype=torch.float32)
    zeros = torch.zeros(shape)
    result, gradient = _loss_and_gradient(name, logprobs, zeros, torch.ones(shape[0]), zeros)
    assert result.loss == 0
    assert not gradient.any()


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("aggregation", ["token-mean", "sequence-mean-token-mean"])
def test_parts_add_up_to_the_whole(name, aggregation):
    logprobs, behaviour, advantages, mask = _batch(rows=8)
    whole, gradient = _loss_and_gradient(name, logprobs, behaviour, advantages, mask, aggregation=aggregation)
    normaliser = float(mask.sum() if aggregation == "token-mean" else mask.any(1).sum())
    total, parts = 0.0, []
    cut = (slice(0, 1), slice(1, 5), slice(5, 8))
    sums = [compute_statistics(name, logprobs[r], behaviour[r], advantages[r], mask[r]) for r in cut]
    for rows in cut:
        part, part_gradient = _loss_and_gradient(
            name,
            logprobs[rows],
            behaviour[rows],
            advantages[rows],
            mask[rows],
            aggregation=aggregation,
            normaliser=normaliser,
            statistics=None if sums[0] is None else sum(sums),
        )
        total += float(part.loss.detach())
        parts.append(part_gradient)
    assert total == pytest.approx(float(whole.loss.detach()), rel=1e-12, abs=1e-12)
    assert torch.allclose(torch.cat(parts), gradient, rtol=1e-12, atol=0)


def test_half_precision_is_lifted_to_float32():
    logprobs, behaviour, advantages, mask = (x.bfloat16() if x.is_floating_point() else x for x in _batch())
    low, gradient = _loss_and_gradient("vespo", logprobs, behaviour, advantages, mask)
    high, _ = _loss_and_gradient("vespo", logprobs.float(), behaviour.float(), advantages.float(), mask)
    assert low.loss.dtype == torch.float32
    assert torch.equal(low.loss, high.loss)
    assert gradient.dtype == torch.bfloat16


def test_long_float32_sequences_keep_their_weight():
    length = 200_000
    generator = torch.Generator().manual_seed(3)
    behaviour = -3 * torch.rand(1, length, generator=generator)
    logprobs = behaviour + 1e-3 * torch.randn(1, length, generator=generator)
    exact = float((logprobs.double() - behaviour.double()).sum())
    result = compute_objective("vespo", logprobs, behaviour, torch.ones(1), torch.ones(1, length))
    assert float(result.sequence_log_ratio[0]) == pytest.approx(exact, abs=2e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "vespos"}, "did you mean 'vespo'"),
        ({"name": "vespo", "k_poss": 2.0}, "did you mean 'k_pos'"),
        ({"name": "vespo", "k_pos": 0.9}, "k >= 1"),
        ({"name": "vespo", "lambda_neg": 0.0}, "lambda > 0"),
        ({"name": "vespo", "aggregation": "mean"}, "token-mean"),
        ({"name": "grpo", "clip_low": -0.1}, "clip_low"),
        ({"name": "cispo", "ratio_min": 6.0}, "ratio_min"),
        ({"name": "sapo", "tau_pos": 0.0}, "tau_pos"),
    ],
)
def test_a_callers_mistake_is_named(arguments, message):
    logprobs, behaviour, advantages, mask = _batch()
    with pytest.raises(ValueError, match=message):
        compute_objective(
            logprobs=logprobs, behaviour_logprobs=behaviour, advantages=advantages, mask=mask, **arguments
        )


def test_shapes_are_checked():
    logprobs, behaviour, advantages, mask = _batch()
    with pytest.raises(ValueError, match="one shape"):
        compute_objective("vespo", logprobs, behaviour[:, :-1], advantages, mask)
    with pytest.raises(ValueError, match="one for each sequence"):
        compute_objective("vespo", logprobs, behaviour, advantages[:, None], mask)
    with pytest.raises(ValueError, match=r"must both be \[N\]"):
        group_advantages(advantages, torch.zeros(2), False)


def test_constant_float32_groups_have_no_advantage():
    rewards = torch.full((16,), 0.99)
    for normalise in (True, False):
        assert not group_advantages(rewards, torch.zeros(16, dtype=torch.long), normalise).any()


def test_advantages_of_integer_rewards_and_of_nothing():
    assert group_advantages(torch.tensor([0, 1]), torch.tensor([5, 5]), False).tolist() == [-0.5, 0.5]
    assert group_advantages(torch.zeros(0), torch.zeros(0), True).shape == (0,)
