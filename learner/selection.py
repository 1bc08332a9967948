"""Which leased groups a step may use: not too old, readable by the model and, if the recipe asks for it, informative.

What is turned away goes back to the buffer at once, each for its reason: too old, and the ticket is generated again;
unreadable or uninformative, and the ticket is done. The latter depends on nothing but the group, so a learner that
resumes and is given what it had, or what is left of it, chooses the same. Used by one thread.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from buffer.groups import LeasedGroup
from buffer.run import Buffer
from learner.rewards import Shaper, has_spread
from protocol.settings import Settings
from protocol.trajectory import Group

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Chosen:
    """A leased group, and how the objective is to see it."""

    leased: LeasedGroup
    shaped: Group


class Selection:
    """Turns groups away.

    Attributes:
        num_stale, num_filtered: how many so far, as too old and as uninformative.
    """

    def __init__(self, settings: Settings, buffer: Buffer, *, epoch: int, vocab_size: int) -> None:
        """`vocab_size`: larger token ids cannot be read.

        Raises:
            SettingsError: `objective.reward_shaping` is not a function that can be imported.
        """
        self._buffer = buffer
        self._epoch = epoch
        self._vocab_size = vocab_size
        self._needs_spread = settings.learner.filter_zero_variance
        self._shaper = Shaper(settings)
        self.num_stale = 0
        self.num_filtered = 0

    def admit(self, arrived: Sequence[LeasedGroup], oldest_version: int) -> list[Chosen]:
        """The usable ones, shaped, in their order; no token of theirs was sampled before `oldest_version`.

        Raises:
            TaskError: `objective.reward_shaping` failed.
        """
        readable = self._readable(self._fresh(arrived, oldest_version))
        chosen = [Chosen(item, self._shaper(item.group)) for item in readable]
        if not self._needs_spread:
            return chosen
        dull = [item.leased for item in chosen if not has_spread(item.shaped)]
        if dull:
            self.num_filtered += len(dull)
            self._buffer.groups.mark_filtered(self._epoch, dull)
        return [item for item in chosen if has_spread(item.shaped)]

    def still_fresh(self, chosen: Sequence[Chosen], oldest_version: int) -> list[Chosen]:
        """Those of groups admitted earlier that are not too old by now."""
        fresh = {item.entry_id for item in self._fresh([item.leased for item in chosen], oldest_version)}
        return [item for item in chosen if item.leased.entry_id in fresh]

    def _fresh(self, arrived: Sequence[LeasedGroup], oldest_version: int) -> list[LeasedGroup]:
        stale = [item for item in arrived if item.group.oldest_version < oldest_version]
        if stale:
            self.num_stale += len(stale)
            log.info("%d groups are older than version %d and are generated again", len(stale), oldest_version)
            self._buffer.groups.return_stale(self._epoch, stale)
        return [item for item in arrived if item.group.oldest_version >= oldest_version]

    def _readable(self, arrived: Sequence[LeasedGroup]) -> list[LeasedGroup]:
        alien = [item for item in arrived if _largest_token(item.group) >= self._vocab_size]
        if alien:
            log.error(
                "%d groups have tokens outside the vocabulary of %d and are dropped; does actor %s run another model?",
                len(alien),
                self._vocab_size,
                alien[0].group.actor,
            )
            self._buffer.groups.mark_filtered(self._epoch, alien)
        return [item for item in arrived if _largest_token(item.group) < self._vocab_size]


def _largest_token(group: Group) -> int:
    return max(int(group.prompt_tokens.max()), *(int(c.tokens.max()) for c in group.completions))
