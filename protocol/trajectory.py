"""Trajectories as they cross from actor to learner: a group is the completions of one ticket, whole or not at all."""

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

FINISH_REASONS = ("stop", "length")
LOGPROB_SLACK = 1e-3  # float rounding may put the log-prob of a near-certain token just above zero


@dataclass(frozen=True, slots=True)
class Ticket:
    """Permission to generate one group.

    Attributes:
        index: global prompt index; `protocol.clock.prompt_of_ticket` maps it to a prompt.
        attempt: 0 at first issue, +1 each time it failed or its lease expired. (index, attempt) names a lease.
    """

    index: int
    attempt: int


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens `[start, end)` of a completion were sampled by policy `version`."""

    start: int
    end: int
    version: int


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """One sampled response.

    Attributes:
        tokens: `[T]` int32, T ≥ 1, the response without its prompt; an end-of-sequence token is included if sampled.
        logprobs: `[T]` float32, log-probability of each token under the exact distribution it was sampled from
            (temperature included); 0 where `mask` is 0.
        mask: `[T]` uint8, 1 where the policy sampled the token, 0 where an environment wrote it.
        spans: version spans that tile `[0, T)`.
        reward: scalar, finite.
        finish_reason: "stop" (it ended itself) or "length" (it was cut at a limit).
    """

    tokens: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    mask: NDArray[np.uint8]
    spans: tuple[VersionSpan, ...]
    reward: float
    finish_reason: str

    def problem(self) -> str | None:
        """First reason why the learner must not train on this, or None."""
        return self.problem_of_shape() or self.problem_of_values()

    def problem_of_values(self) -> str | None:
        """`problem` as far as tokens and log-probs decide, of which there is at least one."""
        if int(self.tokens.min()) < 0:
            return "negative token id"
        if not _are_logprobs(self.logprobs):
            return "behaviour log-prob is not finite or above zero"
        return None

    def problem_of_shape(self) -> str | None:
        """`problem` as far as anything but the values of the arrays decides."""
        length = len(self.tokens)
        if length == 0:
            return "completion without tokens"
        if len(self.logprobs) != length or len(self.mask) != length:
            return f"{length} tokens, {len(self.logprobs)} log-probs, {len(self.mask)} mask entries"
        if not math.isfinite(self.reward):
            return f"reward is {self.reward}"
        if self.finish_reason not in FINISH_REASONS:
            return f"finish reason {self.finish_reason!r} is none of {FINISH_REASONS}"
        position = 0
        for span in self.spans:
            if span.start != position or span.end <= span.start or span.version < 0:
                return "version spans do not tile the tokens"
            position = span.end
        return None if position == length else "version spans do not tile the tokens"


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The completions of one ticket.

    Attributes:
        ticket: the lease under which it was generated.
        prompt_index: row of the task's data set.
        prompt_tokens: `[P]` int32, P ≥ 1.
        completions: at least two, so that advantages exist.
        actor: name of the actor that generated it.
        generation_seconds: wall time from first request to last score.
    """

    ticket: Ticket
    prompt_index: int
    prompt_tokens: NDArray[np.int32]
    completions: tuple[Completion, ...]
    actor: str
    generation_seconds: float = field(default=0.0)

    @property
    def oldest_version(self) -> int:
        """Oldest version that sampled any token of the group."""
        return min(span.version for completion in self.completions for span in completion.spans)

    @property
    def num_tokens(self) -> int:
        """Response tokens over all completions."""
        return sum(len(completion.tokens) for completion in self.completions)

    def problem(self) -> str | None:
        """First reason why the learner must not train on this group, or None."""
        if self.ticket.index < 0 or self.ticket.attempt < 0:
            return f"negative ticket {self.ticket}"
        if len(self.prompt_tokens) == 0 or int(self.prompt_tokens.min()) < 0:
            return "empty prompt or negative prompt token"
        if len(self.completions) < 2:
            return f"{len(self.completions)} completions; a group needs at least 2"
        for number, completion in enumerate(self.completions):
            if (problem := completion.problem_of_shape()) is not None:
                return f"completion {number}: {problem}"
        # all at once, since a call of numpy costs more than the numbers of a short completion
        tokens = np.concatenate([completion.tokens for completion in self.completions])
        logprobs = np.concatenate([completion.logprobs for completion in self.completions])
        if int(tokens.min()) >= 0 and _are_logprobs(logprobs):
            return None
        for number, completion in enumerate(self.completions):
            if (problem := completion.problem_of_values()) is not None:
                return f"completion {number}: {problem}"
        raise AssertionError("values are wrong together that are right one by one")


def _are_logprobs(values: NDArray[np.float32]) -> bool:
    """Whether all are finite and none above zero; a NaN is the least and the greatest of any array it is in."""
    return -math.inf < float(values.min()) and float(values.max()) <= LOGPROB_SLACK
