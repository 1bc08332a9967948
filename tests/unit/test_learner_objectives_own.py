"""Objectives of one's own by `package.module:function`, and errors that say which part of a name or value is wrong."""

import pytest
import torch

from learner.loss import StepLoss
from learner.objectives import OBJECTIVES, compute_objective, compute_statistics, find_objective
from learner.objectives.cispo import cispo
from protocol import objectives as settings
from protocol.errors import SettingsError


def batch(rows=4, length=5):
    generator = torch.Generator().manual_seed(1)
    behaviour = -torch.rand(rows, length, generator=generator, dtype=torch.float64)
    logprobs = behaviour + 0.1 * torch.randn(rows, length, generator=generator, dtype=torch.float64)
    advantages = torch.randn(rows, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, length, generator=generator) < 0.7
    mask[0] = False
    return logprobs.requires_grad_(), behaviour, advantages, mask


def test_a_function_of_ones_own_gets_its_hyperparameters():
    logprobs, behaviour, advantages, mask = batch()
    result = compute_objective("own_objectives:scaled", logprobs, behaviour, advantages, mask, beta=0.5, offset=4)
    plain = compute_objective("reinforce", logprobs, behaviour, advantages, mask)
    assert float(result.loss.detach()) == pytest.approx(2 * float(plain.loss.detach()))
    assert torch.equal(result.weights, torch.tensor([0.0, 2, 2, 2]))
    some = compute_objective("own_objectives:open_ended", logprobs, behaviour, advantages, mask, a=0.5, b=1.5)
    assert torch.equal(some.loss, result.loss)


def test_a_built_in_function_may_be_named_by_its_place():
    inputs = batch()
    here = compute_objective("learner.objectives.cispo:cispo", *inputs, ratio_max=1.1)
    assert torch.equal(here.loss, compute_objective("cispo", *inputs, ratio_max=1.1).loss)
    assert find_objective("learner.objectives.cispo:cispo").function is cispo


def test_the_default_aggregation_is_the_functions_own():
    logprobs, behaviour, advantages, mask = batch()
    result = compute_objective("own_objectives:by_sequence", logprobs, behaviour, advantages, mask)
    counts = mask.sum(1)
    rows = (logprobs * mask).sum(1) / counts.clamp(min=1)
    assert float(result.loss.detach()) == pytest.approx(float((-(advantages * rows).sum() / 3).detach()))
    assert not result.weights.requires_grad
    over_tokens = compute_objective(
        "own_objectives:by_sequence", logprobs, behaviour, advantages, mask, aggregation="token-mean"
    )
    total = -((logprobs * mask).sum(1) * advantages).sum() / counts.sum()
    assert float(over_tokens.loss.detach()) == pytest.approx(float(total.detach()))


def test_statistics_of_ones_own_make_the_cut_irrelevant():
    name, (logprobs, behaviour, advantages, mask) = "own_objectives:rescaled", batch(6)
    whole = compute_objective(name, logprobs, behaviour, advantages, mask)
    parts = [[x[rows] for x in (logprobs, behaviour, advantages, mask)] for rows in (slice(0, 2), slice(2, 6))]
    statistics = sum(compute_statistics(name, *part) for part in parts)
    losses = [
        compute_objective(name, *part, normaliser=int(mask.sum()), statistics=statistics).loss.detach()
        for part in parts
    ]
    assert float(sum(losses)) == pytest.approx(float(whole.loss.detach()), rel=1e-12)
    alone = [compute_objective(name, *part, normaliser=int(mask.sum())).loss.detach() for part in parts]
    assert float(sum(alone)) != pytest.approx(float(whole.loss.detach()), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "hyperparameters", "message"),
    [
        ("no_such_module:f", {}, "module no_such_module cannot be imported"),
        ("own_objectives.inner:f", {}, "cannot be imported"),
        ("own_objectives:scald", {}, r"own_objectives has no 'scald' \(did you mean 'scaled'\?\)"),
        ("own_objectives:A_NUMBER", {}, "is no function but 3"),
        ("own_objectives:Terms", {}, "is no function"),
        ("own_objectives:no_argument", {}, "takes no argument"),
        ("own_objectives:taken_name", {}, "'normaliser', a name that is taken"),
        ("own_objectives:scaled", {}, "needs a value for beta"),
        ("own_objectives:scaled", {"beta": 1, "offst": 1}, r"did you mean 'offset'\?\); it has beta, offset"),
        ("own_objectives:by_sequence", {"x": 1}, "has no hyperparameter 'x'; it has none"),
        ("own_objectives:returns_a_tensor", {}, "returned Tensor, not"),
        ("own_objectives:returns_a_scalar_loss", {}, r"returned loss \(\), must be \(4, 5\)"),
        ("own_objectives:", {}, "package.module:function"),
        (":scaled", {}, "package.module:function"),
        ("grop", {}, "did you mean 'grpo'"),
        ("vespo", {"statistics": torch.zeros(3)}, "takes no statistics"),
        ("vespo", {"k_pos": "2"}, "k_pos = '2' is no number"),
        ("vespo", {"k_pos": None}, "k_pos = None is no number"),
        ("vespo", {"k_neg": float("nan")}, "k_neg = nan is no number"),
        ("bapo", {"low_start": 0.95}, "low_start 0.95"),
        ("bapo", {"high_step": 0.0}, "high_step 0.0"),
        ("bapo", {"high_step": 1e-9}, "at most 1000 steps"),
        ("bapo", {"positive_share": 1.0}, "positive_share 1.0"),
        ("tis", {"ratio_max": 0}, "ratio_max 0"),
        ("topr", {"ratio_max": -1}, "ratio_max -1"),
        ("reinforce", {"ratio_max": 1}, "it has none"),
    ],
)
def test_errors_name_what_is_wrong(name, hyperparameters, message):
    with pytest.raises(ValueError, match=message):
        compute_objective(name, *batch(), **hyperparameters)


@pytest.mark.parametrize("normaliser", [-1, float("nan"), float("inf"), torch.ones(2)])
def test_a_normaliser_that_is_no_count_is_refused(normaliser):
    with pytest.raises(ValueError, match="normaliser"):
        compute_objective("vespo", *batch(), normaliser=normaliser)


@pytest.mark.parametrize("normaliser", [0, 0.0, torch.tensor(0), torch.tensor([0.0])])
def test_a_step_of_nothing_has_loss_zero(normaliser):
    logprobs, behaviour, advantages, mask = batch()
    result = compute_objective("vespo", logprobs, behaviour, advantages, 0 * mask, normaliser=normaliser)
    result.loss.backward()
    assert result.loss.shape == ()
    assert float(result.loss.detach()) == 0
    assert not logprobs.grad.any()


def test_recipes_and_functions_have_the_same_hyperparameters():
    assert settings.OBJECTIVES.keys() == OBJECTIVES.keys()
    for name, table in settings.OBJECTIVES.items():
        defaults = {key: p.default for key, p in OBJECTIVES[name].hyperparameters.items()}
        assert table().hyperparameters() == defaults
        compute_objective(name, *batch(), **defaults)


def test_keys_of_several_objectives_mean_the_same_type_in_each():
    for key in {key for table in settings.TABLES for key in table.model_fields}:
        annotations = {str(t.model_fields[key].annotation) for t in settings.TABLES if key in t.model_fields}
        assert len(annotations) == 1


def test_a_recipe_whose_objective_does_not_fit_is_a_settings_error():
    for name, options in (("own_objectives:nothing", {}), ("own_objectives:scaled", {"beto": 1})):
        with pytest.raises(SettingsError, match=r"\[objective\]: .*own_objectives"):
            StepLoss(settings.CustomSettings(name=name, options=options))
