"""The objective that a recipe chooses, as the engine applies it to the parts of a step.

A step is computed in micro-batches on several ranks, and its loss must not depend on how it is cut: what it is divided
by, and what the objective has to know about all of it, are those of the whole step.
"""

from torch import Tensor

from learner.batch import MicroBatch, StepBatch
from learner.objectives import ObjectiveResult, compute_objective, compute_statistics, find_objective
from learner.objectives.base import TOKEN_MEAN
from protocol.errors import SettingsError
from protocol.objectives import ObjectiveSettings


class StepLoss:
    """Loss of micro-batches that add up to the loss of their step.

    Attributes:
        looks_ahead: whether the objective needs `statistics` of the whole step before the loss of any part of it.
    """

    def __init__(self, settings: ObjectiveSettings) -> None:
        """Find the objective.

        Raises:
            SettingsError: a function of one's own cannot be imported, or does not take the options.
        """
        self._name = settings.name
        self._hyperparameters = settings.hyperparameters()
        try:
            objective = find_objective(settings.name)
            objective.complete(self._hyperparameters)
        except ValueError as error:
            raise SettingsError(f"[objective]: {error}") from error
        self._aggregation = settings.aggregation or objective.aggregation
        self.looks_ahead = objective.statistics is not None

    def normaliser(self, batch: StepBatch) -> int:
        """What the step's summed losses are divided by: its unmasked tokens, or its sequences that have any."""
        if self._aggregation == TOKEN_MEAN:
            return batch.num_tokens
        return sum(bool(completion.mask.any()) for completion in batch.completions)

    def statistics(self, logprobs: Tensor, micro: MicroBatch) -> Tensor | None:
        """What the objective must know about the step, of this part, `[K]`; add it up over the parts."""
        return compute_statistics(
            self._name, logprobs, micro.behaviour_logprobs, micro.advantages, micro.mask, **self._hyperparameters
        )

    def part(
        self, logprobs: Tensor, micro: MicroBatch, normaliser: int, statistics: Tensor | None = None
    ) -> ObjectiveResult:
        """A micro-batch's part of the step's loss.

        Args:
            logprobs: `[B, T]` float, the policy's.
            micro: the rest of what the loss depends on.
            normaliser: of the step.
            statistics: of the step, where the objective looks ahead.
        """
        return compute_objective(
            self._name,
            logprobs,
            micro.behaviour_logprobs,
            micro.advantages,
            micro.mask,
            aggregation=self._aggregation,
            normaliser=normaliser,
            statistics=statistics,
            **self._hyperparameters,
        )
