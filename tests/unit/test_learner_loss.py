"""Every objective through the engine: the gradient of the whole step, however it is cut, averaged as published."""

import pytest
import torch
from learner_reference import Spy, check_update, plain_reference
from learner_samples import make_groups, make_settings, write_model

from learner.batch import build_step_batch
from learner.loss import StepLoss
from learner.objectives import OBJECTIVES
from protocol.objectives import choose

OWN = {"name": "own_objectives:scaled", "options": {"beta": 0.3}}
TABLES = [{"name": name} for name in OBJECTIVES] + [
    OWN,
    {"name": "own_objectives:rescaled"},
    {"name": "own_objectives:by_sequence"},
    {"name": "vespo", "aggregation": "sequence-mean-token-mean", "k_pos": 1.5},
    {"name": "gspo", "aggregation": "token-mean", "clip_low": 0.5, "clip_high": 0.5},
    {"name": "bapo", "positive_share": 0.6, "high_step": 0.01, "aggregation": "sequence-mean-token-mean"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "m")


@pytest.mark.parametrize("table", TABLES, ids=lambda table: "-".join(map(str, table.values())))
def test_gradient_does_not_depend_on_the_cut(model, table):
    groups = make_groups(4, holes=True, seed=16) + make_groups(1, rewards=[1.0] * 4, seed=9)
    settings = make_settings(model, objective=table, task={"temperature": 0.8})
    reference = plain_reference(model, settings, groups)
    for budget in (20, 60, 10**6):
        batch = build_step_batch(groups, micro_batch_tokens=budget, normalise_std=False)
        check_update(Spy(settings, model), batch, reference)


def test_the_bounds_of_bapo_depend_on_the_whole_step(model):
    groups = make_groups(4)
    settings = make_settings(model, objective={"name": "bapo", "positive_share": 0.6, "high_step": 0.01})
    batch = build_step_batch(groups, micro_batch_tokens=20, normalise_std=False)
    engine = Spy(settings, model)
    engine._look_ahead = lambda share: None  # each micro-batch takes itself for the whole
    with pytest.raises(AssertionError):
        check_update(engine, batch, plain_reference(model, settings, groups))


def test_normaliser_counts_what_the_aggregation_averages_over():
    groups = make_groups(8, holes=True, seed=16)
    completions = [c for group in groups for c in group.completions]
    batch = build_step_batch(groups, micro_batch_tokens=100, normalise_std=False)
    tokens, sequences = sum(int(c.mask.sum()) for c in completions), sum(bool(c.mask.any()) for c in completions)
    assert sequences < len(completions)
    for table, count in (
        ({"name": "vespo"}, tokens),
        ({"name": "gspo"}, sequences),
        ({"name": "gspo", "aggregation": "token-mean"}, tokens),
        ({"name": "own_objectives:by_sequence"}, sequences),
    ):
        assert StepLoss(choose(table)).normaliser(batch) == count


def test_only_objectives_with_statistics_look_ahead(model):
    micro = build_step_batch(make_groups(2), micro_batch_tokens=100, normalise_std=False).micro_batches[0]
    logprobs = torch.zeros_like(micro.behaviour_logprobs)
    for name in OBJECTIVES:
        loss = StepLoss(choose({"name": name}))
        assert loss.looks_ahead == (name == "bapo")
        assert (loss.statistics(logprobs, micro) is not None) == loss.looks_ahead
