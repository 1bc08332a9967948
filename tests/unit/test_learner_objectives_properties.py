"""What holds for every objective and any input: it is its formula, and layout, dtype, order and cut do not matter."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from objective_reference import bapo_bounds, reference

from learner.objectives import OBJECTIVES, compute_objective, compute_statistics

AGGREGATIONS = ("token-mean", "sequence-mean-token-mean")
HYPERPARAMETERS = {
    "vespo": [{}, {"k_pos": 1, "lambda_pos": 1, "k_neg": 2, "lambda_neg": 4}],
    "grpo": [
        {},
        {"clip_low": 0.4, "clip_high": 0.1, "dual_clip": None},
        {"clip_low": 0, "clip_high": 1, "dual_clip": 2},
    ],
    "gspo": [{}, {"clip_low": 0.25, "clip_high": 0.5}],
    "sapo": [{}, {"tau_pos": 2, "tau_neg": 0.5}],
    "cispo": [{}, {"ratio_min": 0.75, "ratio_max": 1.25}],
    "topr": [{}, {"ratio_max": 4}],
    "bapo": [
        {},
        {"positive_share": 0.7, "dual_clip": None},
        {"high_step": 0.3, "low_start": 0.7, "positive_share": 0.4},
    ],
    "tis": [{}, {"ratio_max": 1}],
    "reinforce": [{}],
}
CASES = [(name, options) for name in OBJECTIVES for options in HYPERPARAMETERS[name]]
every_case = pytest.mark.parametrize(("name", "options"), CASES)
every_objective = pytest.mark.parametrize("name", OBJECTIVES)

numbers = st.floats(-30, 0, allow_subnormal=False)
differences = st.one_of(st.floats(-1, 1, allow_subnormal=False), st.floats(-25, 25, allow_subnormal=False))
advantages = st.one_of(st.sampled_from([0.0, -0.0, 1.0, -1.0]), st.floats(-5, 5, allow_subnormal=False))


@st.composite
def batches(draw, max_rows=4, max_tokens=5, difference=differences):
    rows, tokens = draw(st.integers(0, max_rows)), draw(st.integers(0, max_tokens))

    def table(elements):
        values = draw(st.lists(elements, min_size=rows * tokens, max_size=rows * tokens))
        return torch.tensor(values, dtype=torch.float64).reshape(rows, tokens)

    behaviour, mask = table(numbers), table(st.sampled_from([0.0, 1.0])).bool()
    values = draw(st.lists(advantages, min_size=rows, max_size=rows))
    return behaviour + table(difference), behaviour, torch.tensor(values, dtype=torch.float64), mask


def loss_and_gradient(name, logprobs, *others, **options):
    leaf = logprobs.detach().clone().requires_grad_()
    result = compute_objective(name, leaf, *others, **options)
    result.loss.backward()
    return result, leaf.grad


def same(actual, expected, limit=1e-9):
    expected = torch.as_tensor(expected, dtype=torch.float64).reshape(actual.shape)
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    return bool(((actual.detach().double() - expected).abs() <= limit * scale).all())


def far_from_kinks(logprobs, behaviour, mask):
    """Where a clip bound is hit to the last bit, either one-sided derivative is right."""
    log_ratio = torch.where(mask, logprobs - behaviour, 0)
    values = torch.cat([log_ratio.flatten(), log_ratio.sum(1), log_ratio.sum(1) / mask.sum(1).clamp(min=1)])
    ratios = [0.01 * i for i in range(1, 500)] + [1 - 3e-4, 1 + 4e-4]  # all bounds of these tests are among them
    kinks = torch.tensor([-20, 10, 20, *(math.log(r) for r in ratios)], dtype=torch.float64)
    moved = values[values != 0]  # at 1 there is no bound, but for clip_low = 0 whose both sides agree
    return bool(((moved[:, None] - kinks).abs() > 1e-9).all())


@every_case
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@settings(max_examples=50, deadline=None)
@given(batch=batches())
def test_loss_and_gradient_are_those_of_the_formula(name, options, aggregation, batch):
    logprobs, behaviour, values, mask = batch
    assume(far_from_kinks(logprobs, behaviour, mask))
    result, gradient = loss_and_gradient(name, *batch, aggregation=aggregation, **options)
    lists = [x.tolist() for x in (logprobs, behaviour, values, mask)]
    loss, slopes = reference(name, *lists, aggregation=aggregation, **options)
    assert same(result.loss, loss, 1e-8)
    assert same(gradient, slopes, 1e-8)


@every_objective
@settings(max_examples=40, deadline=None)
@given(batch=batches(), seed=st.integers(0, 99))
def test_order_and_padding_do_not_matter(name, batch, seed):
    logprobs, behaviour, values, mask = batch
    result, gradient = loss_and_gradient(name, *batch)
    generator = torch.Generator().manual_seed(seed)
    rows, tokens = (torch.randperm(n, generator=generator) for n in mask.shape)
    shuffled = [x[rows][:, tokens] for x in (logprobs, behaviour, mask)]
    moved, moved_gradient = loss_and_gradient(name, shuffled[0], shuffled[1], values[rows], shuffled[2])
    assert same(moved.loss, result.loss.detach())
    assert same(moved_gradient, gradient[rows][:, tokens])
    assert same(moved.weights, result.weights[rows])
    wider = [
        torch.nn.functional.pad(x, (2, 3), value=fill) for x, fill in ((logprobs, math.nan), (behaviour, -math.inf))
    ]
    padded, padded_gradient = loss_and_gradient(name, *wider, values, torch.nn.functional.pad(mask, (2, 3)))
    assert same(padded.loss, result.loss.detach())
    assert same(padded_gradient, torch.nn.functional.pad(gradient, (2, 3)))


@every_case
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@settings(max_examples=30, deadline=None)
@given(batch=batches(max_rows=6), cut=st.integers(0, 6))
def test_parts_add_up_to_the_whole(name, options, aggregation, batch, cut):
    mask = batch[3]
    whole, gradient = loss_and_gradient(name, *batch, aggregation=aggregation, **options)
    count = mask.sum() if aggregation == "token-mean" else mask.any(1).sum()
    parts = [[x[rows] for x in batch] for rows in (slice(0, cut), slice(cut, None))]
    sums = [compute_statistics(name, *part, **options) for part in parts]
    statistics = None if sums[0] is None else sum(sums)
    for normaliser in (int(count), count):
        results = [
            loss_and_gradient(
                name, *part, aggregation=aggregation, normaliser=normaliser, statistics=statistics, **options
            )
            for part in parts
        ]
        assert same(sum(result.loss.detach() for result, _ in results), whole.loss.detach())
        assert same(torch.cat([part for _, part in results]), gradient)


@every_objective
@settings(max_examples=40, deadline=None)
@given(batch=batches(), where=st.integers(0, 10**6), value=st.sampled_from([math.nan, math.inf, -math.inf]))
def test_a_row_with_something_not_finite_counts_in_the_mean_alone(name, batch, where, value):
    logprobs, behaviour, values, mask = (x.clone() for x in batch)
    counted = mask.nonzero()
    assume(len(counted))
    row, token = counted[where % len(counted)].tolist()
    dirty = [logprobs.clone(), behaviour.clone(), values.clone()]
    dirty[where % 3][(row, token) if where % 3 < 2 else row] = value
    result, gradient = loss_and_gradient(name, *dirty, mask)
    quiet = values.clone()
    quiet[row] = 0  # no advantage: nothing to learn from, its tokens counted all the same
    expected, expected_gradient = loss_and_gradient(name, logprobs, behaviour, quiet, mask)
    assert same(result.loss, expected.loss.detach())
    assert same(gradient, expected_gradient)
    assert result.stats["silenced"] == 1
    assert result.weights[row] == 0
    assert torch.equal(result.silenced.nonzero(), torch.tensor([[row]]))


@every_objective
@settings(max_examples=20, deadline=None)
@given(batch=batches(max_rows=3))
def test_dtypes_and_layouts_of_inputs(name, batch):
    logprobs, behaviour, values, mask = batch
    _, gradient = loss_and_gradient(name, *batch)
    for other in (mask.int(), mask.float() * 0.5, mask.to(torch.uint8) * 7, mask.double()):
        assert torch.equal(loss_and_gradient(name, logprobs, behaviour, values, other)[1], gradient)
    strided = [x.t().contiguous().t() for x in (logprobs, behaviour, mask)]
    assert same(loss_and_gradient(name, strided[0], strided[1], values, strided[2])[1], gradient)
    for dtype in (torch.int64, torch.int32, torch.bool):
        whole = values.sign().to(dtype)
        exact = loss_and_gradient(name, logprobs, behaviour, whole.double(), mask)
        assert torch.equal(loss_and_gradient(name, logprobs, behaviour, whole, mask)[1], exact[1])


@every_objective
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@settings(max_examples=20, deadline=None)
@given(batch=batches(difference=st.floats(-0.5, 0.5, allow_subnormal=False)))
def test_low_precision_is_computed_in_float32(name, dtype, batch):
    low = [x.to(dtype) for x in batch[:3]]
    result, gradient = loss_and_gradient(name, *low, batch[3])
    assert result.loss.dtype == torch.float32
    assert gradient.dtype == dtype
    exact, _ = loss_and_gradient(name, *(x.float() for x in low), batch[3])
    assert torch.equal(result.loss, exact.loss)
    mixed, _ = loss_and_gradient(name, low[0], low[1].double(), low[2], batch[3])
    assert mixed.loss.dtype == torch.float64


@every_objective
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_ratio", [1e4, -1e4, 88.8, -88.8, 710.0])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_extreme_ratios_stay_finite(name, dtype, log_ratio, aggregation):
    logprobs = torch.tensor([[-1e4 + log_ratio, -1.0], [-1.0, -1e4 + log_ratio]], dtype=dtype)
    behaviour = torch.tensor([[-1e4, -1.0], [-1.0, -1e4]], dtype=dtype)
    for signs in ([1.0, -1.0], [-1.0, 1.0]):
        result, gradient = loss_and_gradient(
            name, logprobs, behaviour, torch.tensor(signs, dtype=dtype), torch.ones(2, 2), aggregation=aggregation
        )
        assert result.loss.isfinite()
        assert gradient.isfinite().all()
        assert result.weights.isfinite().all()
        assert result.stats["silenced"] == 0
        assert all(math.isfinite(value) for value in result.stats.values())


@every_objective
def test_no_gradient_but_that_of_the_policy(name):
    generator = torch.Generator().manual_seed(0)
    logprobs, behaviour = (torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) - 3).requires_grad_().unbind()
    values = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64, requires_grad=True)
    logprobs, behaviour = logprobs.detach().requires_grad_(), behaviour.detach().requires_grad_()
    result = compute_objective(name, logprobs, behaviour, values, torch.ones(3, 4))
    result.loss.backward()
    assert behaviour.grad is None
    assert values.grad is None
    assert not logprobs.grad[2].any()
    assert logprobs.grad[:2].any()
    assert not result.weights.requires_grad
    assert not result.sequence_log_ratio.requires_grad


@every_objective
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_without_gradient_the_loss_is_the_same(name, aggregation):
    generator = torch.Generator().manual_seed(0)
    logprobs, behaviour = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) - 3
    inputs = (logprobs, behaviour, torch.tensor([1.0, -1.0, 0.5]), torch.ones(3, 4))
    with torch.inference_mode():
        plain = compute_objective(name, *inputs, aggregation=aggregation).loss
    assert plain == loss_and_gradient(name, *inputs, aggregation=aggregation)[0].loss


@pytest.mark.parametrize(("scale", "low", "high"), [(1.44, 0.6, 1.2), (1.45, 0.9, 1.75), (1.8, 0.9, 2.6), (9, 0.9, 3)])
def test_bapo_moves_its_bounds_until_the_share_is_reached(scale, low, high):
    positive = torch.linspace(0.1, 3.4, 23, dtype=torch.float64).log()
    negative = torch.linspace(0.1, 1.0, 23, dtype=torch.float64).log()
    logprobs = torch.stack([positive, negative]) - 5
    behaviour, values, mask = torch.full_like(logprobs, -5), torch.tensor([1.0, -scale]).double(), torch.ones(2, 23)
    log_ratios = (logprobs - behaviour).tolist()
    assert bapo_bounds(log_ratios, values.tolist()) == pytest.approx((low, high))
    _, gradient = loss_and_gradient("bapo", logprobs, behaviour, values, mask)
    ratio = (logprobs - behaviour).exp()
    used = torch.stack([ratio[0] <= high, ratio[1] >= low])
    assert torch.equal(gradient != 0, used)
