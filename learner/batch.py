"""Groups of one optimizer step, flattened into padded micro-batches of bounded size.

Rows are prompt, response, padding, in this order: under causal attention nothing before the padding sees it, so neither
an attention mask nor position ids are needed. Sequences are sorted by length so that little is padding, and the result
depends on nothing but the groups. Rows that hold several sequences (packing) are left out: they need an attention that
stays inside each sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.advantages import group_advantages
from protocol.trajectory import Completion, Group


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward and backward pass takes.

    Attributes:
        tokens: `[B, L]` int64, prompt and response of each row, then zeros.
        mask: `[B, T]` bool, response tokens that the policy sampled.
        positions: `[N]` int64, for each True of `mask` in row-major order the index into the flattened `[B · L]` hidden
            states of the position that predicts it.
        targets: `[N]` int64, the tokens predicted there.
        behaviour_logprobs: `[B, T]` float32, 0 where `mask` is False.
        advantages: `[B]` float32.
        rows: `[B]` int64, index of each row among the sequences of the step; empty in a row of no sequence.
    """

    tokens: Tensor
    mask: Tensor
    positions: Tensor
    targets: Tensor
    behaviour_logprobs: Tensor
    advantages: Tensor
    rows: Tensor

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on another device."""
        return MicroBatch(*(getattr(self, name).to(device, non_blocking=True) for name in self.__slots__))

    def muted(self) -> "MicroBatch":
        """Its first row without any token that counts: loss and gradient are zero."""
        return MicroBatch(
            tokens=self.tokens[:1],
            mask=torch.zeros_like(self.mask[:1]),
            positions=self.positions[:0],
            targets=self.targets[:0],
            behaviour_logprobs=torch.zeros_like(self.behaviour_logprobs[:1]),
            advantages=self.advantages[:1],
            rows=self.rows[:0],
        )


@dataclass(frozen=True, slots=True)
class StepBatch:
    """All sequences of one optimizer step.

    Attributes:
        micro_batches: sequences that have an advantage, in descending order of length.
        quiet: those whose advantage is 0, such as whole groups of equal rewards: they have no gradient, so a forward
            pass for the statistics is enough.
        spare: what a rank without a share computes in lock-step with the others.
        completions: the S sequences of the step, in the order of the groups.
        rewards: `[S]` float64.
        group_of: `[S]` int64, index of each sequence's group.
        advantages: `[S]` float64.
        num_tokens: unmasked response tokens over all sequences, what the loss is divided by.
        padding_share: share of all micro-batches' positions that hold no token.
    """

    micro_batches: tuple[MicroBatch, ...]
    quiet: tuple[MicroBatch, ...]
    spare: MicroBatch
    completions: tuple[Completion, ...]
    rewards: NDArray[np.float64]
    group_of: NDArray[np.int64]
    advantages: NDArray[np.float64]
    num_tokens: int
    padding_share: float


def build_step_batch(groups: Sequence[Group], *, micro_batch_tokens: int, normalise_std: bool) -> StepBatch:
    """Lay out the groups of a step; the gradient does not depend on `micro_batch_tokens`.

    Args:
        groups: at least one.
        micro_batch_tokens: bound on rows times length of a micro-batch; a longer sequence gets one of its own.
        normalise_std: whether advantages are divided by their group's standard deviation.
    """
    completions = tuple(c for group in groups for c in group.completions)
    prompts = [group.prompt_tokens for group in groups for _ in group.completions]
    group_of = np.repeat(np.arange(len(groups)), [len(group.completions) for group in groups])
    rewards = np.array([c.reward for c in completions], dtype=np.float64)
    advantages = group_advantages(rewards, group_of.tolist(), normalise_std).numpy()
    lengths = np.array([len(p) + len(c.tokens) for p, c in zip(prompts, completions, strict=True)])
    order = np.argsort(-lengths, kind="stable")

    def cut(rows: NDArray[np.int64]) -> tuple[MicroBatch, ...]:
        micro_batches = []
        while len(rows):
            longest = int(lengths[rows[0]])
            now, rows = np.split(rows, [max(1, micro_batch_tokens // longest)])
            micro_batches.append(_lay_out(now, prompts, completions, advantages, longest))
        return tuple(micro_batches)

    has_gradient = advantages[order] != 0
    loud, quiet = cut(order[has_gradient]), cut(order[~has_gradient])
    return StepBatch(
        micro_batches=loud,
        quiet=quiet,
        spare=(loud or quiet)[0].muted(),
        completions=completions,
        rewards=rewards,
        group_of=group_of,
        advantages=advantages,
        num_tokens=sum(int(micro.mask.sum()) for micro in loud + quiet),
        padding_share=1 - float(lengths.sum()) / sum(micro.tokens.numel() for micro in loud + quiet),
    )


def _lay_out(
    rows: NDArray[np.int64],
    prompts: Sequence[NDArray[np.int32]],
    completions: Sequence[Completion],
    advantages: NDArray[np.float64],
    longest: int,
) -> MicroBatch:
    response = max(len(completions[row].tokens) for row in rows)
    tokens = np.zeros((len(rows), longest), dtype=np.int64)
    mask = np.zeros((len(rows), response), dtype=bool)
    targets = np.zeros((len(rows), response), dtype=np.int64)
    behaviour = np.zeros((len(rows), response), dtype=np.float32)
    first = np.zeros((len(rows), 1), dtype=np.int64)  # flat position that predicts each row's first response token
    for i, row in enumerate(rows):
        prompt, completion = prompts[row], completions[row]
        num_prompt, num_response = len(prompt), len(completion.tokens)
        tokens[i, :num_prompt] = prompt
        tokens[i, num_prompt : num_prompt + num_response] = completion.tokens
        targets[i, :num_response] = completion.tokens
        mask[i, :num_response] = completion.mask
        behaviour[i, :num_response] = completion.logprobs
        first[i] = i * longest + num_prompt - 1
    behaviour[~mask] = 0
    return MicroBatch(
        tokens=torch.from_numpy(tokens),
        mask=torch.from_numpy(mask),
        positions=torch.from_numpy((first + np.arange(response))[mask]),
        targets=torch.from_numpy(targets[mask]),
        behaviour_logprobs=torch.from_numpy(behaviour),
        advantages=torch.from_numpy(advantages[rows].astype(np.float32)),
        rows=torch.from_numpy(rows),
    )
