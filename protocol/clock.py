"""The version clock: the only definition of lag, of admissibility and of prompt order.

`buffer/scripts/issue.lua` evaluates `admission_limit` inside Redis, where it must be atomic; a test holds the two
equal. What a version means and who advances it is in docs/design.md.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from protocol.trajectory import VersionSpan


@dataclass(frozen=True, slots=True)
class ClockState:
    """One atomic reading of the policy clock.

    `base` groups had been trained or given up on when the learner's current incarnation started at `base_version`.
    """

    version: int
    step: int
    epoch: int
    groups_per_version: int
    max_lag: int
    base: int
    base_version: int


def admission_limit(clock: ClockState, served_version: int) -> int:
    """Number of groups that may be accepted or in generation before an actor serving `served_version` must wait.

    The rule uses the version the actor *serves*, not the one the learner has published: an actor that is slow to
    fetch cannot start work that would be too old by the time it is trained on.
    """
    version = min(served_version, clock.version)
    return clock.base + (version - clock.base_version + clock.max_lag + 1) * clock.groups_per_version


def lag(learner_version: int, spans: tuple[VersionSpan, ...]) -> int:
    """Learner's version when it trains on a sequence minus the oldest version that sampled any of its tokens."""
    return learner_version - min(span.version for span in spans)


@lru_cache(maxsize=4)
def _permutation(seed: int, data_epoch: int, num_prompts: int) -> NDArray[np.int64]:
    return np.random.Generator(np.random.Philox(key=[seed, data_epoch])).permutation(num_prompts)


def prompt_of_ticket(index: int, seed: int, num_prompts: int) -> int:
    """Prompt that global ticket `index` stands for: `perm(seed, index // n)[index % n]`.

    Every pass over the data visits each of the `num_prompts` prompts once, in a new order that depends on `seed` alone,
    so the ticket counter is the whole state of the data loader.
    """
    data_epoch, position = divmod(index, num_prompts)
    return int(_permutation(seed, data_epoch, num_prompts)[position])
