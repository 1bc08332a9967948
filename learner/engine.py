"""DeepSpeed behind four verbs: update the policy, snapshot its weights, probe its log-probs, save and load its state.

The gradient is that of the loss over the step's global batch: each micro-batch is divided by the count of the whole
step, DeepSpeed neither divides by accumulation steps nor decides where a step ends. One process needs no
launcher; RANK and WORLD_SIZE of one are used when they are set.
"""

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray
from torch import Tensor

from learner.batch import MicroBatch, StepBatch, build_step_batch
from learner.deepspeed_config import wraps_optimizer
from learner.logprobs import Policy, scatter_rows
from learner.lora import adapter_tensors, add_adapters, is_adapter
from learner.loss import StepLoss
from learner.model import DTYPES, attention_cost, load_model
from learner.objectives import ObjectiveResult
from learner.schedule import learning_rate
from learner.sharding import initialize, join_process_group
from learner.state import StateCopies, restore
from learner.terms import Terms
from learner.weights import checkpoint_tensors
from protocol.errors import NonFiniteError
from protocol.manifest import Probe
from protocol.settings import Settings
from protocol.trajectory import Group

log = logging.getLogger(__name__)

MAX_SKIPPED_IN_A_ROW = 3


@dataclass(frozen=True, slots=True)
class UpdateResult:
    """One optimizer update. Arrays are `[S]` float64 in the order of the step's sequences; `S` sequences.

    Attributes:
        loss: over the global batch.
        grad_norm: before clipping; 0 when the step was skipped.
        skipped: a gradient was not finite, nothing changed.
        log_w: log importance weight of each sequence.
        weights: the objective's coefficient of each sequence.
        silenced: 1 where the sequence was left out because a log-prob was not finite.
        entropy, behaviour_kl, reference_kl: sums over each sequence's sampled tokens of the policy's entropy, of
            behaviour minus policy log-prob, and of the estimate of the KL divergence from the reference.
        optimizer_seconds: time of clipping and the optimizer's step, after all gradients are there.
        learning_rate: of this step.
    """

    loss: float
    grad_norm: float
    skipped: bool
    log_w: NDArray[np.float64]
    weights: NDArray[np.float64]
    silenced: NDArray[np.float64]
    entropy: NDArray[np.float64]
    behaviour_kl: NDArray[np.float64]
    reference_kl: NDArray[np.float64]
    optimizer_seconds: float = 0.0
    learning_rate: float = 0.0


class Engine:
    """The policy under training, sharded as the recipe says.

    Attributes:
        device: where this rank computes.
        vocab_size: rows of the input embedding; larger token ids cannot be read.
        packs: whether rows hold several sequences.
        layout: names what a saved state depends on: parameters, precision, sharding.
    """

    def __init__(self, settings: Settings, model_dir: Path) -> None:
        """Load the model of `model_dir` and hand it to DeepSpeed.

        Raises:
            ValueError: the device is not there, or the model's head is one the learner does not compute.
            SettingsError: the recipe's objective cannot be imported, or does not take its options.
        """
        self._settings = settings
        self._loss = StepLoss(settings.objective)
        self.device = join_process_group(settings.model.device, settings.learner.rank_timeout_seconds)
        torch.set_num_threads(settings.learner.cpu_threads)
        torch.manual_seed(settings.run.seed)
        model, self.packs = load_model(settings, model_dir)
        if settings.model.lora is not None:
            add_adapters(model, settings.model.lora)
        self.vocab_size = int(model.get_input_embeddings().weight.shape[0])
        self._attention_cost = attention_cost(model.config)
        self._policy = Policy(model, entropy_gradient=settings.objective.entropy_coefficient > 0)
        self._terms = Terms(settings, model_dir, self.device, vocab_size=self.vocab_size, packs=self.packs)
        self._world_size = torch.distributed.get_world_size()
        self._rank = torch.distributed.get_rank()
        self._stage = settings.learner.zero_stage
        self._clips_itself = not wraps_optimizer(settings.learner)
        self.layout = self._describe(type(model).__name__)
        self._skipped_in_a_row = 0
        self._copies = StateCopies()
        self._frozen: dict[str, Tensor] | None = None
        self._deepspeed = initialize(self._policy, settings.learner, self.device)

    def _describe(self, model: str) -> str:
        shapes = [f"{name} {tuple(parameter.shape)}" for name, parameter in self._policy.named_parameters()]
        digest = xxhash.xxh3_64_hexdigest("\n".join(shapes).encode())
        precision, lora = self._settings.learner.precision, self._settings.model.lora
        adapters = "" if lora is None else f", LoRA of rank {lora.rank} and alpha {lora.alpha:g}"
        return (
            f"{model} with parameters {digest}{adapters}, {precision}, ZeRO stage {self._stage}, "
            f"{self._world_size} ranks"
        )

    def lay_out(self, groups: Sequence[Group]) -> StepBatch:
        """The batch of a step, as this engine's ranks and attention take it; the same on every rank."""
        return build_step_batch(
            groups,
            micro_batch_tokens=self._settings.learner.micro_batch_tokens,
            normalise_std=self._settings.objective.normalise_std,
            packed=self.packs,
            num_ranks=self._world_size,
            attention_cost=self._attention_cost,
        )

    def update(self, batch: StepBatch) -> UpdateResult:
        """Accumulate the gradient of every micro-batch and take one optimizer step.

        Every rank is given the whole batch and computes its share of the micro-batches.

        Raises:
            NonFiniteError: gradients were not finite in three steps in a row, those left out that lowered the scale
                of a float16 loss.
        """
        table = torch.zeros((6, len(batch.completions)), dtype=torch.float64, device=self.device)
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        loud, quiet = self._terms.backward_on(batch)
        share = self._share(loud, batch.spare) or [batch.spare.to(self.device)]
        normaliser, statistics = self._loss.normaliser(batch), self._look_ahead(share)
        with torch.no_grad():
            for micro in self._share(quiet, batch.spare):
                self._forward(batch, micro, normaliser, statistics, table)
        for number, micro in enumerate(share, 1):
            self._deepspeed.set_gradient_accumulation_boundary(number == len(share))
            part = self._forward(batch, micro, normaliser, statistics, table)
            # DeepSpeed averages gradients over ranks; the normaliser already counts what all of them have.
            self._deepspeed.backward(part * self._world_size, scale_wrt_gas=False)
            loss += part.detach()
        if self._world_size > 1:
            torch.distributed.all_reduce(table)
            torch.distributed.all_reduce(loss)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        gradients_there = time.monotonic()
        rate = learning_rate(self._settings, self._deepspeed.global_steps)
        for group in self._parameter_groups:
            group["lr"] = rate
        finding_scale = self._can_lower_loss_scale()
        grad_norm = self._step()
        optimizer_seconds = time.monotonic() - gradients_there
        skipped = not math.isfinite(grad_norm)
        self._skipped_in_a_row = self._skipped_in_a_row + (not finding_scale) if skipped else 0
        if self._skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"gradients were not finite in {MAX_SKIPPED_IN_A_ROW} steps in a row; the weights are unchanged since. "
                "Lower learner.learning_rate or learner.max_grad_norm and resume from the last checkpoint"
            )
        result = UpdateResult(float(loss), 0.0 if skipped else grad_norm, skipped, *table.cpu().numpy())
        return replace(result, optimizer_seconds=optimizer_seconds, learning_rate=rate)

    def _share(self, micro_batches: Sequence[MicroBatch], spare: MicroBatch) -> list[MicroBatch]:
        """This rank's micro-batches; all ranks get the same number, for their collectives go in lock-step."""
        num_rounds = math.ceil(len(micro_batches) / self._world_size)
        mine = list(micro_batches[self._rank :: self._world_size])
        return [micro.to(self.device) for micro in mine + [spare] * (num_rounds - len(mine))]

    def _look_ahead(self, share: Sequence[MicroBatch]) -> Tensor | None:
        """What the objective must know about the whole step, from a pass without gradient; None for most objectives."""
        if not self._loss.looks_ahead:
            return None
        with torch.no_grad():
            parts = [self._loss.statistics(self._logprobs(micro)[0], micro) for micro in share]
        total = torch.stack([part for part in parts if part is not None]).sum(0)
        if self._world_size > 1:
            torch.distributed.all_reduce(total)
        return total

    def _logprobs(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probs `[B, T]` of a micro-batch's tokens, and entropies `[N]` of those that count."""
        chosen, entropies = self._deepspeed(
            micro.tokens, micro.positions, micro.targets, self._settings.task.temperature, packed=micro.packed
        )
        return scatter_rows(chosen, micro.mask), entropies

    def _forward(
        self, batch: StepBatch, micro: MicroBatch, normaliser: int, statistics: Tensor | None, table: Tensor
    ) -> Tensor:
        """A micro-batch's part of the loss; fills its columns of `table` `[6, S]`."""
        logprobs, entropies = self._logprobs(micro)
        result = self._loss.part(logprobs, micro, normaliser, statistics)
        terms, reference_kl = self._terms.part(logprobs, entropies, micro, result.silenced, batch.num_tokens)
        if len(micro.rows):
            sums = _per_sequence(result, micro, logprobs.detach(), entropies.detach(), reference_kl)
            table[:, micro.rows] = sums.double()
        return result.loss + terms

    def _step(self) -> float:
        """Optimizer step; returns the global gradient norm before clipping, not finite when the step was skipped."""
        if not self._clips_itself:
            self._deepspeed.step()
            return float(self._deepspeed.get_global_grad_norm())
        parameters = list(self._policy.parameters())
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._settings.learner.max_grad_norm)
        if not bool(norm.isfinite()):
            self._deepspeed.zero_grad()
            self._deepspeed.global_steps += 1  # it counts the steps that it skips itself, too
            return math.inf
        self._deepspeed.step()
        return float(norm)

    def _can_lower_loss_scale(self) -> bool:
        scaler = getattr(self._deepspeed.optimizer, "loss_scaler", None)
        return scaler is not None and scaler.dynamic and scaler.cur_scale > scaler.min_scale

    def probe(self, sequences: Sequence[Sequence[int]]) -> Probe:
        """Log-probs at temperature 1 of every token after the first, for actors to measure their parity against."""
        longest = max(len(s) for s in sequences)
        tokens = torch.zeros((len(sequences), longest), dtype=torch.int64)
        for row, sequence in enumerate(sequences):
            tokens[row, : len(sequence)] = torch.tensor(sequence)
        mask = torch.arange(longest)[None] < torch.tensor([len(s) - 1 for s in sequences])[:, None]
        positions = mask.flatten().nonzero()[:, 0]
        targets = tokens.roll(-1, 1)[mask]
        with torch.no_grad(), self._evaluating():
            values, _ = self._deepspeed(tokens.to(self.device), positions.to(self.device), targets.to(self.device), 1.0)
        rows = values.cpu().split([len(s) - 1 for s in sequences])
        return Probe(tokens=tuple(map(tuple, sequences)), logprobs=tuple(tuple(row.tolist()) for row in rows))

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        self._deepspeed.eval()
        try:
            yield
        finally:
            self._deepspeed.train()

    def tensors(self) -> dict[str, Tensor]:
        """Copies of all weights on the CPU, under the names of a Hugging Face checkpoint, in the published dtype.

        With LoRA these are the frozen weights, copied once, and the adapters as `buffer.adapter` describes them.
        Every rank must call; ranks other than 0 get none.
        """
        model, dtype = self._policy.model, DTYPES[self._settings.model.dtype]
        if self._settings.model.lora is None:
            return checkpoint_tensors(model, dtype, gather=self._stage == 3, keep=self._rank == 0)
        if self._rank:
            return {}
        if self._frozen is None:
            every = checkpoint_tensors(model, dtype, gather=False)
            self._frozen = {name: tensor for name, tensor in every.items() if not is_adapter(name)}
        return self._frozen | adapter_tensors(model)

    def capture(self, directory: Path) -> Callable[[], None]:
        """Copy model, optimizer and random state; what is returned writes them into the existing `directory`.

        The next capture may begin once that is done.
        """
        return self._copies.capture(self._deepspeed, directory, self._rank)

    def load(self, directory: Path) -> None:
        """Restore what was captured; the optimizer's settings remain the recipe's.

        Raises:
            CheckpointError: there is no state of this rank.
        """
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self._parameter_groups]
        restore(self._deepspeed, directory, self._rank)
        self._frozen = None
        for group, values in zip(self._parameter_groups, settings, strict=True):
            group.update(values)

    @property
    def _parameter_groups(self) -> list[dict[str, Any]]:
        groups: list[dict[str, Any]] = self._deepspeed.optimizer.param_groups
        return groups


def _per_sequence(
    result: ObjectiveResult, micro: MicroBatch, logprobs: Tensor, entropies: Tensor, reference_kl: Tensor
) -> Tensor:
    """`[6, B]`: log W, weight, silenced of each sequence, and sums of entropy and both KLs over its tokens."""
    entropy = scatter_rows(entropies, micro.mask).sum(1)
    behaviour_kl = (micro.behaviour_logprobs - logprobs).sum(1)
    sums = torch.stack([entropy, behaviour_kl, reference_kl]).masked_fill(result.silenced, 0)
    return torch.cat([torch.stack([result.sequence_log_ratio, result.weights, result.silenced]), sums])
