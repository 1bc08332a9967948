"""Groups of one optimizer step, flattened into micro-batches of bounded size.

A padded row is prompt, response, padding, in this order: under causal attention nothing before the padding sees it, so
neither an attention mask nor position ids are needed. A packed row is whole sequences one behind the other, for an
attention that stays inside each (`learner.packing`). Which sequences meet is decided in `learner.cutting`; the result
depends on nothing but the groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from learner.advantages import group_advantages
from learner.cutting import Plan
from learner.packing import PackedRow
from protocol.trajectory import Completion, Group


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward and backward pass takes.

    Attributes:
        tokens: `[B, L]` int64, prompt and response of each row, then zeros; packed `[1, L]`, without zeros.
        mask: `[B, T]` bool, response tokens that the policy sampled.
        positions: `[N]` int64, for each True of `mask` in row-major order the index into the flattened `[B · L]` hidden
            states of the position that predicts it.
        targets: `[N]` int64, the tokens predicted there.
        behaviour_logprobs: `[B, T]` float32, 0 where `mask` is False.
        advantages: `[B]` float32.
        rows: `[B]` int64, index of each sequence among those of the step; empty where nothing counts.
        packed: where the B sequences lie in a packed row.
    """

    tokens: Tensor
    mask: Tensor
    positions: Tensor
    targets: Tensor
    behaviour_logprobs: Tensor
    advantages: Tensor
    rows: Tensor
    packed: PackedRow | None

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on another device."""
        names = [name for name in self.__slots__ if name != "packed"]
        tensors = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return MicroBatch(**tensors, packed=None if self.packed is None else self.packed.to(device))

    def muted(self) -> "MicroBatch":
        """Its first sequence without any token that counts: loss and gradient are zero."""
        packed = None if self.packed is None else PackedRow.of(self.packed.lengths[:1])
        return MicroBatch(
            tokens=self.tokens[:1] if packed is None else self.tokens[:, : packed.lengths[0]],
            mask=torch.zeros_like(self.mask[:1]),
            positions=self.positions[:0],
            targets=self.targets[:0],
            behaviour_logprobs=torch.zeros_like(self.behaviour_logprobs[:1]),
            advantages=self.advantages[:1],
            rows=self.rows[:0],
            packed=packed,
        )

    def cost(self, plan: Plan) -> float:
        """What the model computes for it, in the unit of `learner.cutting`."""
        if self.packed is None:
            return float(plan.cost(np.array([self.tokens.shape[1]]))[0]) * len(self.tokens)
        places = [(bucket.count, bucket.longest) for bucket in self.packed.buckets]
        return self.tokens.shape[1] + plan.attention_cost * sum(count * longest**2 for count, longest in places)


@dataclass(frozen=True, slots=True)
class StepBatch:
    """All sequences of one optimizer step.

    Attributes:
        micro_batches: sequences that have an advantage.
        quiet: those whose advantage is 0, such as whole groups of equal rewards: they have no gradient, so a forward
            pass for the statistics is enough.
        spare: what a rank without a share computes in lock-step with the others.
        completions: the S sequences of the step, in the order of the groups.
        rewards: `[S]` float64.
        group_of: `[S]` int64, index of each sequence's group.
        advantages: `[S]` float64.
        num_tokens: unmasked response tokens over all sequences, what the loss is divided by.
        padding_share: share of the computation that is spent on places without a token.
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


def build_step_batch(
    groups: Sequence[Group],
    *,
    micro_batch_tokens: int,
    normalise_std: bool,
    packed: bool = False,
    num_ranks: int = 1,
    attention_cost: float = 0.0,
) -> StepBatch:
    """Lay out the groups of a step; the gradient depends on `normalise_std` alone.

    Args:
        groups: at least one.
        normalise_std: whether advantages are divided by their group's standard deviation.
        micro_batch_tokens, packed, num_ranks, attention_cost: see `learner.cutting.Plan`.
    """
    plan = Plan(micro_batch_tokens, packed, num_ranks, attention_cost)
    completions = tuple(c for group in groups for c in group.completions)
    prompts = [group.prompt_tokens for group in groups for _ in group.completions]
    group_of = np.repeat(np.arange(len(groups)), [len(group.completions) for group in groups])
    rewards = np.array([c.reward for c in completions], dtype=np.float64)
    advantages = group_advantages(rewards, group_of.tolist(), normalise_std).numpy()
    lengths = np.array([len(p) + len(c.tokens) for p, c in zip(prompts, completions, strict=True)])
    order = np.argsort(-lengths, kind="stable")

    def cut(rows: NDArray[np.int64]) -> tuple[MicroBatch, ...]:
        return tuple(_lay_out(now, prompts, completions, advantages, packed) for now in plan.cut(lengths, rows))

    has_gradient = advantages[order] != 0
    loud, quiet = cut(order[has_gradient]), cut(order[~has_gradient])
    spare = (loud or quiet)[0].muted()
    num_spares = sum(-len(micro_batches) % num_ranks for micro_batches in (loud or (spare,), quiet))
    computed = sum(micro.cost(plan) for micro in loud + quiet) + num_spares * spare.cost(plan)
    return StepBatch(
        micro_batches=loud,
        quiet=quiet,
        spare=spare,
        completions=completions,
        rewards=rewards,
        group_of=group_of,
        advantages=advantages,
        num_tokens=sum(int(micro.mask.sum()) for micro in loud + quiet),
        padding_share=max(0.0, 1 - float(plan.cost(lengths).sum()) / computed),
    )


def _lay_out(
    rows: NDArray[np.int64],
    prompts: Sequence[NDArray[np.int32]],
    completions: Sequence[Completion],
    advantages: NDArray[np.float64],
    packed: bool,
) -> MicroBatch:
    """The sequences `rows`, the longest first."""
    lengths = np.array([len(prompts[row]) + len(completions[row].tokens) for row in rows])
    longest = int(lengths[0])
    packed = packed and longest != lengths[-1]  # of one length, a row each wastes nothing either, and is simpler
    starts = np.cumsum(lengths) - lengths if packed else np.arange(len(rows)) * longest
    tokens = np.zeros(int(lengths.sum()) if packed else len(rows) * longest, dtype=np.int64)
    response = max(len(completions[row].tokens) for row in rows)
    mask = np.zeros((len(rows), response), dtype=bool)
    targets = np.zeros((len(rows), response), dtype=np.int64)
    behaviour = np.zeros((len(rows), response), dtype=np.float32)
    first = np.zeros((len(rows), 1), dtype=np.int64)  # flat position that predicts each row's first response token
    for i, row in enumerate(rows):
        prompt, completion = prompts[row], completions[row]
        num_prompt, num_response = len(prompt), len(completion.tokens)
        answer = starts[i] + num_prompt
        tokens[starts[i] : answer] = prompt
        tokens[answer : answer + num_response] = completion.tokens
        targets[i, :num_response] = completion.tokens
        mask[i, :num_response] = completion.mask
        behaviour[i, :num_response] = completion.logprobs
        first[i] = answer - 1
    behaviour[~mask] = 0
    return MicroBatch(
        tokens=torch.from_numpy(tokens.reshape(1 if packed else len(rows), -1)),
        mask=torch.from_numpy(mask),
        positions=torch.from_numpy((first + np.arange(response))[mask]),
        targets=torch.from_numpy(targets[mask]),
        behaviour_logprobs=torch.from_numpy(behaviour),
        advantages=torch.from_numpy(advantages[rows].astype(np.float32)),
        rows=torch.from_numpy(rows),
        packed=PackedRow.of(lengths.tolist()) if packed else None,
    )
