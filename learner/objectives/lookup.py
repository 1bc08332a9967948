"""From a name to an objective: the built-in ones, and functions of one's own as `package.module:function`.

A function of one's own takes `Terms` and keywords and returns `TokenLoss`; a sequence without an advantage must
have no gradient, for the learner computes none for it. An attribute `aggregation` on it sets how its token losses are
averaged where the recipe does not say, otherwise token-mean. What depends on the whole step and not on its parts goes
into an attribute `statistics`: a function of `Terms` and all hyperparameters, whose result adds up over the parts and
reaches the objective as the keyword `statistics`.
"""

import difflib
import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from learner.objectives.bapo import bapo, contributions
from learner.objectives.base import SEQUENCE_MEAN, TOKEN_MEAN, TokenLoss
from learner.objectives.cispo import cispo
from learner.objectives.grpo import grpo
from learner.objectives.gspo import gspo
from learner.objectives.reinforce import reinforce
from learner.objectives.sapo import sapo
from learner.objectives.tis import tis
from learner.objectives.topr import topr
from learner.objectives.vespo import vespo

STATISTICS = "statistics"
TAKEN = ("name", "logprobs", "behaviour_logprobs", "advantages", "mask", "aggregation", "normaliser")


@dataclass(frozen=True, slots=True)
class Objective:
    """A policy objective.

    Attributes:
        name: as a recipe writes it.
        function: `(Terms, **hyperparameters) -> TokenLoss`.
        aggregation: its published way of averaging token losses.
        statistics: `(Terms, **hyperparameters) -> Tensor`, additive over the parts of a step; None where every token
            or sequence stands for itself.
    """

    name: str
    function: Callable[..., TokenLoss]
    aggregation: str = TOKEN_MEAN
    statistics: Callable[..., Tensor] | None = None

    @property
    def hyperparameters(self) -> dict[str, inspect.Parameter]:
        """Its keyword arguments by name."""
        _, *rest = inspect.signature(self.function).parameters.values()
        return {p.name: p for p in rest if p.name != STATISTICS}

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """The given hyperparameters with published ones for the rest.

        Raises:
            ValueError: unknown, missing, or no number where the objective is built in.
        """
        known = self.hyperparameters
        open_ended = [name for name, p in known.items() if p.kind is p.VAR_KEYWORD]
        names = [name for name in known if name not in open_ended]
        for key, value in given.items():
            if key not in known and not open_ended:
                has = f"it has {', '.join(names)}" if names else "it has none"
                raise ValueError(f"{self.name} has no hyperparameter {key!r}{did_you_mean(key, names)}; {has}")
            if self.name in OBJECTIVES:
                _check_number(self.name, key, value, optional="None" in str(known[key].annotation))
        full = {name: known[name].default for name in names} | dict(given)
        if missing := [name for name, value in full.items() if value is inspect.Parameter.empty]:
            raise ValueError(f"{self.name} needs a value for {', '.join(missing)}")
        return full


OBJECTIVES = {
    objective.name: objective
    for objective in (
        Objective("vespo", vespo),
        Objective("grpo", grpo),
        Objective("gspo", gspo, SEQUENCE_MEAN),
        Objective("sapo", sapo, SEQUENCE_MEAN),
        Objective("cispo", cispo),
        Objective("topr", topr),
        Objective("bapo", bapo, statistics=contributions),
        Objective("tis", tis),
        Objective("reinforce", reinforce),
    )
}
"""The built-in objectives by name."""


def find_objective(name: str) -> Objective:
    """A built-in objective, or a function that can be imported from the working directory.

    Raises:
        ValueError: neither; the message says which part of the name is wrong.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute.isidentifier():
        raise ValueError(
            f"no objective {name!r}{did_you_mean(name, OBJECTIVES)}; there are {', '.join(OBJECTIVES)}, and functions "
            "of your own as 'package.module:function'"
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(f"objective {name!r}: module {module_name} cannot be imported: {error}") from error
    if not hasattr(module, attribute):
        functions = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ValueError(f"objective {name!r}: {module_name} has no {attribute!r}{did_you_mean(attribute, functions)}")
    function = getattr(module, attribute)
    if not callable(function) or inspect.isclass(function):
        raise ValueError(f"objective {name!r} is no function but {function!r}")
    return _of_ones_own(name, function)


def _of_ones_own(name: str, function: Callable[..., TokenLoss]) -> Objective:
    objective = Objective(
        name, function, getattr(function, "aggregation", TOKEN_MEAN), getattr(function, STATISTICS, None)
    )
    try:
        parameters = list(inspect.signature(function).parameters)
    except (TypeError, ValueError) as error:
        raise ValueError(f"objective {name!r} has no signature to read hyperparameters from: {error}") from error
    if not parameters:
        raise ValueError(f"objective {name!r} takes no argument; its first one is the terms of the batch")
    if clash := sorted(set(TAKEN) & objective.hyperparameters.keys()):
        raise ValueError(f"objective {name!r} has a hyperparameter {clash[0]!r}, a name that is taken; rename it")
    return objective


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint at the nearest of the known words, empty where none is near."""
    matches = difflib.get_close_matches(word, list(known), 1)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def _check_number(objective: str, key: str, value: object, *, optional: bool) -> None:
    if value is None and optional:
        return
    try:
        number = float(value)  # type: ignore[arg-type]  # what is no number is what the next line is for
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, str) or math.isnan(number):
        raise ValueError(f"{objective}: {key} = {value!r} is no number")
