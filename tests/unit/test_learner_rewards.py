"""Rewards of what was cut off, and functions of one's own."""

import math
from dataclasses import replace

import numpy as np
import pytest
from learner_samples import make_groups, make_settings

from learner.batch import build_step_batch
from learner.rewards import Shaper, has_spread
from protocol.errors import SettingsError, TaskError
from protocol.trajectory import VersionSpan


def halved(group):
    return [completion.reward / 2 for completion in group.completions]


def one_too_few(group):
    return [0.0] * (len(group.completions) - 1)


def undefined(group):
    return [math.nan] * len(group.completions)


def broken(group):
    raise KeyError("no such answer")


NOT_A_FUNCTION = 3


def _group(rewards, lengths, cut):
    group = make_groups(1, rewards=rewards, size=len(rewards))[0]
    completions = tuple(
        replace(
            completion,
            tokens=np.ones(length, "i4"),
            logprobs=np.full(length, -1, "f4"),
            mask=np.ones(length, "u1"),
            spans=(VersionSpan(0, length, 0),),
            finish_reason="length" if is_cut else "stop",
        )
        for completion, length, is_cut in zip(group.completions, lengths, cut, strict=True)
    )
    return replace(group, completions=completions)


def _shaped(tmp_path, group, **objective):
    settings = make_settings(tmp_path, objective=objective, task={"max_completion_tokens": 10})
    return Shaper(settings)(group)


def _rewards(group):
    return [completion.reward for completion in group.completions]


GROUP = _group([1.0, 0.0, 1.0, 0.5], [3, 9, 10, 10], [False, False, True, True])


def test_by_default_nothing_is_changed(tmp_path):
    assert _shaped(tmp_path, GROUP) is GROUP


def test_what_is_cut_off_is_worth_nothing(tmp_path):
    assert _rewards(_shaped(tmp_path, GROUP, overlong="zero")) == [1.0, 0.0, 0.0, 0.0]
    assert _rewards(GROUP) == [1.0, 0.0, 1.0, 0.5]


def test_masked_sequences_leave_loss_and_normaliser_but_not_the_baseline(tmp_path):
    masked = _shaped(tmp_path, GROUP, overlong="mask")
    batch = build_step_batch([masked], micro_batch_tokens=1000, normalise_std=False)
    assert batch.num_tokens == 3 + 9
    assert sum(len(micro.positions) for micro in batch.micro_batches + batch.quiet) == 12
    assert batch.advantages.tolist() == [0.375, -0.625, 0.375, -0.125]


@pytest.mark.parametrize(
    ("buffer_tokens", "penalties"), [(4, [0, 0.75, 1, 1]), (None, [0, 0.5, 1, 1]), (10, [0.3, 0.9, 1, 1])]
)
def test_the_soft_penalty_rises_to_one_at_the_limit(tmp_path, buffer_tokens, penalties):
    shaped = _shaped(tmp_path, GROUP, overlong="penalty", overlong_buffer_tokens=buffer_tokens)
    assert _rewards(shaped) == pytest.approx(np.subtract(_rewards(GROUP), penalties).tolist())


def test_a_penalty_on_every_completion_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"overlong_buffer_tokens = 11 is above task\.max_completion_tokens = 10"):
        _shaped(tmp_path, GROUP, overlong="penalty", overlong_buffer_tokens=11)


def test_a_function_of_ones_own_comes_after_overlong(tmp_path):
    shaped = _shaped(tmp_path, GROUP, overlong="zero", reward_shaping="test_learner_rewards:halved")
    assert _rewards(shaped) == [0.5, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        ("broken", "KeyError: 'no such answer'"),
        ("one_too_few", "it returned 3 rewards for 4 completions"),
        ("undefined", "nan"),
    ],
)
def test_a_function_that_fails_names_the_group(tmp_path, function, problem):
    group = make_groups(6)[5]
    with pytest.raises(TaskError, match=rf"{function}' failed on the group of ticket 5 \(prompt 5\): .*{problem}"):
        _shaped(tmp_path, group, reward_shaping=f"test_learner_rewards:{function}")


@pytest.mark.parametrize(
    "name", ["no_such_module:f", "test_learner_rewards:no_such", "test_learner_rewards:NOT_A_FUNCTION"]
)
def test_a_function_that_is_not_there_is_a_wrong_setting(tmp_path, name):
    with pytest.raises(SettingsError, match=f"objective.reward_shaping = '{name}'"):
        _shaped(tmp_path, GROUP, reward_shaping=name)


def test_the_form_of_its_name_is_checked_with_the_recipe(tmp_path):
    with pytest.raises(ValueError, match=r"package\.module:function"):
        _shaped(tmp_path, GROUP, reward_shaping="shape")


def test_spread(tmp_path):
    assert has_spread(GROUP)
    assert not has_spread(make_groups(1, rewards=[0.25] * 4)[0])
