"""Micro-batches hold every sequence once, keep their budget, and cost every rank the same."""

import numpy as np
import pytest
from learner_samples import make_groups

from learner.batch import build_step_batch
from learner.cutting import Plan

RNG = np.random.default_rng(0)
LENGTHS = {
    "even": np.full(96, 12),
    "uneven": np.sort(np.exp(RNG.uniform(np.log(8), np.log(256), 200)).astype(np.int64))[::-1],
    "one giant": np.array([5000, *([30] * 40)]),
    "few": np.array([9, 4]),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("budget", [1, 300, 10**6])
@pytest.mark.parametrize("name", LENGTHS)
def test_cuts(name, budget, num_ranks, packed):
    lengths = LENGTHS[name]
    plan = Plan(budget, packed, num_ranks, 1 / 300)
    cuts = plan.cut(lengths, np.arange(len(lengths)))
    assert sorted(np.concatenate(cuts).tolist()) == list(range(len(lengths)))
    for rows in cuts:
        assert (np.diff(lengths[rows]) <= 0).all()
        tokens = lengths[rows].sum() if packed else lengths[rows[0]] * len(rows)
        assert tokens <= budget or len(rows) == 1
    assert packed is False or len(cuts) % num_ranks == 0 or len(cuts) == len(lengths)
    if len(cuts) < min(num_ranks, len(lengths)):  # only where all would wait for one sequence anyway
        assert len(cuts[0]) == 1
        assert plan.cost(lengths)[0] >= plan.cost(lengths)[1:].sum()
    again = plan.cut(lengths, np.arange(len(lengths)))
    assert [rows.tolist() for rows in cuts] == [rows.tolist() for rows in again]


@pytest.mark.parametrize("packed", [False, True])
def test_ranks_wait_little_for_each_other(packed):
    lengths = LENGTHS["uneven"]
    plan = Plan(4096, packed, 4, 1 / 300)
    cuts = plan.cut(lengths, np.arange(len(lengths)))
    costs = np.array([plan.cost(lengths[r]).sum() if packed else plan.cost(lengths[r[:1]])[0] * len(r) for r in cuts])
    rounds = np.pad(costs, (0, -len(costs) % 4)).reshape(-1, 4)
    assert rounds.mean() > (0.98 if packed else 0.8) * rounds.max(1).mean()


def test_a_longer_sequence_costs_more_than_its_tokens():
    cost = Plan(1, attention_cost=0.01).cost(np.array([100, 200]))
    assert cost.tolist() == [200.0, 600.0]


def test_packing_wastes_nothing_but_attention_in_buckets():
    groups = make_groups(32, size=8)
    options = {"micro_batch_tokens": 256, "normalise_std": False}
    padded, packed = (build_step_batch(groups, packed=packed, **options) for packed in (False, True))
    assert packed.padding_share == pytest.approx(0.0, abs=1e-12)
    assert padded.padding_share > 0.02
    assert 0 < build_step_batch(groups, packed=True, attention_cost=0.05, **options).padding_share < 0.05


def test_what_a_spare_rank_computes_is_waste():
    groups = make_groups(1, rewards=[1.0, 0.0, 0.0, 0.0])
    options = {"micro_batch_tokens": 1, "normalise_std": False, "packed": True}
    lengths = [len(groups[0].prompt_tokens) + len(c.tokens) for c in groups[0].completions]
    share = build_step_batch(groups, num_ranks=3, **options).padding_share  # 4 sequences, 6 passes
    assert share == pytest.approx(2 * max(lengths) / (sum(lengths) + 2 * max(lengths)))
