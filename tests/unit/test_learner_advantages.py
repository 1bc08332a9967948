"""Group advantages of any rewards: what they add up to, what does not matter, and what is refused."""

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from learner.advantages import group_advantages

rewards = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(-1e3, 1e3, allow_subnormal=False))
samples = st.lists(st.tuples(rewards, st.integers(0, 3)), max_size=12)


def reference(values, ids, normalise):
    result = []
    for value, group in zip(values, ids, strict=True):
        members = [v for v, other in zip(values, ids, strict=True) if other == group]
        mean, std = (statistics.fmean(members), statistics.stdev(members)) if len(members) > 1 else (0.0, 1.0)
        result.append(
            0.0 if len(set(members)) == 1 < len(members) else (value - mean) / (std + 1e-6 if normalise else 1)
        )
    return result


@given(sample=samples, normalise=st.booleans())
def test_advantages_are_those_of_the_formula(sample, normalise):
    values, ids = [value for value, _ in sample], [group for _, group in sample]
    expected = torch.tensor(reference(values, ids, normalise), dtype=torch.float64)
    result = group_advantages(torch.tensor(values, dtype=torch.float64), torch.tensor(ids), normalise)
    assert torch.allclose(result, expected, rtol=1e-6, atol=1e-6)
    sums = [float(result[torch.tensor(ids) == group].sum()) for group in set(ids) if ids.count(group) > 1]
    assert all(abs(total) < 1e-6 * max(1, float(result.abs().max())) for total in sums)


@given(sample=samples, normalise=st.booleans(), order=st.randoms(use_true_random=False))
def test_order_and_kind_of_inputs_do_not_matter(sample, normalise, order):
    values, ids = [value for value, _ in sample], [group for _, group in sample]
    expected = group_advantages(torch.tensor(values, dtype=torch.float64), torch.tensor(ids), normalise)
    kinds = [np.array(ids, dtype=np.int32), ids, tuple(ids), map(str, ids), [(g, "a") for g in ids], iter(ids)]
    for kind in kinds:
        assert torch.equal(group_advantages(values, kind, normalise), expected)
    assert torch.equal(group_advantages(np.array(values), ids, normalise), expected)
    shuffled = list(range(len(values)))
    order.shuffle(shuffled)
    moved = group_advantages([values[i] for i in shuffled], [ids[i] for i in shuffled], normalise)
    assert torch.allclose(moved, expected[torch.tensor(shuffled, dtype=torch.int64)], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_result_has_the_dtype_of_float_rewards(dtype):
    source = torch.tensor([0.0, 1.0, 2.0], dtype=dtype, requires_grad=True)
    result = group_advantages(source, ["a", "a", "b"], False)
    assert result.dtype == dtype
    assert result.tolist() == [-0.5, 0.5, 2.0]
    assert not result.requires_grad


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool])
def test_whole_rewards_give_float32(dtype):
    result = group_advantages(torch.tensor([0, 1], dtype=dtype), [0, 0], False)
    assert result.dtype == torch.float32
    assert result.tolist() == [-0.5, 0.5]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_named(value):
    with pytest.raises(ValueError, match=rf"reward 2 of 4, in group 'b', is {value}"):
        group_advantages(torch.tensor([0.0, 1.0, value, value]), ["a", "a", "b", "b"], False)


@pytest.mark.parametrize(
    ("values", "ids", "message"),
    [
        (torch.zeros(2, 2), [0, 0], r"rewards \(2, 2\) and 2 group_ids"),
        (torch.zeros(()), [], r"rewards \(\) and 0 group_ids"),
        ([1.0, 2.0], [0], r"rewards \(2,\) and 1 group_ids"),
        ([1.0, 2.0], torch.zeros(2, 1), "number 0 is"),
        ([1.0, 2.0], np.zeros((2, 1)), "number 0 is"),
        (["a", "b"], [0, 0], "could not convert"),
    ],
)
def test_what_does_not_belong_together_is_refused(values, ids, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(values, ids, False)
