"""Rewards as the objective sees them: what is cut off, and whatever a function of one's own makes of a group.

A shaped group is a copy with other rewards or masks; what the task gave stays in the group it was made from. Left out:
rewards of single tokens or turns.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import numpy as np

from protocol.errors import SettingsError, TaskError
from protocol.settings import Settings
from protocol.trajectory import Completion, Group

BUFFER_SHARE = 0.2  # DAPO's published 4,096 of 20,480 tokens


class Shaper:
    """Applies `objective.overlong` and `objective.reward_shaping` to groups."""

    def __init__(self, settings: Settings) -> None:
        """Import what `objective.reward_shaping` names.

        Raises:
            SettingsError: it cannot be imported, or is not a function.
        """
        objective = settings.objective
        self._overlong = objective.overlong
        self._limit = settings.task.max_completion_tokens
        self._buffer_tokens = objective.overlong_buffer_tokens or max(1, round(BUFFER_SHARE * self._limit))
        self._name = objective.reward_shaping
        self._function = _load(self._name) if self._name is not None else None

    def __call__(self, group: Group) -> Group:
        """The group with the rewards and masks that the objective is to see.

        Raises:
            TaskError: the function failed, or did not return a finite number for each completion.
        """
        if self._overlong != "keep":
            group = replace(group, completions=tuple(self._limited(c) for c in group.completions))
        if self._function is None:
            return group
        rewards = self._shaped(self._function, group)
        pairs = zip(group.completions, rewards, strict=True)
        return replace(group, completions=tuple(replace(c, reward=reward) for c, reward in pairs))

    def _limited(self, completion: Completion) -> Completion:
        if self._overlong == "penalty":
            # DAPO, equation 13: 0 up to limit - buffer, then in a straight line to -1 at the limit
            excess = len(completion.tokens) - (self._limit - self._buffer_tokens)
            return replace(completion, reward=completion.reward - min(max(excess / self._buffer_tokens, 0.0), 1.0))
        if completion.finish_reason != "length":
            return completion
        if self._overlong == "zero":
            return replace(completion, reward=0.0)
        return replace(completion, mask=np.zeros_like(completion.mask))

    def _shaped(self, function: Callable[[Group], Sequence[float]], group: Group) -> list[float]:
        try:
            rewards = [float(reward) for reward in function(group)]
        except Exception as error:  # whatever a user's function raises
            raise self._failed(group, f"{type(error).__name__}: {error}") from error
        if len(rewards) != len(group.completions):
            raise self._failed(group, f"it returned {len(rewards)} rewards for {len(group.completions)} completions")
        if not all(map(math.isfinite, rewards)):
            raise self._failed(group, f"it returned {rewards}")
        return rewards

    def _failed(self, group: Group, problem: str) -> TaskError:
        return TaskError(
            f"objective.reward_shaping = {self._name!r} failed on the group of ticket {group.ticket.index} (prompt "
            f"{group.prompt_index}): {problem}"
        )


def has_spread(group: Group) -> bool:
    """Whether its rewards differ, so that it teaches something."""
    return len({completion.reward for completion in group.completions}) > 1


def _load(name: str) -> Callable[[Group], Sequence[float]]:
    module, _, attribute = name.partition(":")
    try:
        function: Any = getattr(import_module(module), attribute)
    except Exception as error:  # importing runs a user's code
        raise SettingsError(f"objective.reward_shaping = {name!r}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise SettingsError(f"objective.reward_shaping = {name!r} is not a function")
    return function  # type: ignore[no-any-return]
