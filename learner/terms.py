"""Optional terms beside the policy objective, both off by default: KL to a reference model, and an entropy bonus.

    loss = objective + kl_coefficient · mean(k3) - entropy_coefficient · mean(entropy)

Both means are over the unmasked tokens of the whole step, whatever the objective divides by, so neither depends on how
the step is cut. They move every sequence, also one without an advantage. k3 = r - 1 - log r, with r the reference's
probability of the sampled token over the policy's, is John Schulman's estimator of KL(policy ‖ reference)
(joschu.net/blog/kl-approx.html): never negative, and unbiased on the policy's own tokens. Entropies are of the
distribution that is sampled from, temperature included, and exact. The reference is loaded from its directory at every
start and never changes; each rank holds all of it in the learner's precision. Sharding it is left out.
"""

from pathlib import Path

import torch
from torch import Tensor

from learner.batch import MicroBatch, StepBatch
from learner.logprobs import Policy, scatter_rows
from learner.model import load_model
from learner.objectives.base import MAX_LOG_RATIO
from protocol.errors import SettingsError
from protocol.settings import Settings


class Terms:
    """What is added to the loss of each micro-batch of a step."""

    def __init__(self, settings: Settings, model_dir: Path, device: torch.device, *, vocab_size: int, packs: bool):
        """Load the reference, if the recipe asks for one.

        Args:
            model_dir: the run's initial model, the reference where `model.reference` names no other.
            vocab_size: rows of the policy's input embedding.
            packs: whether micro-batches are packed rows.

        Raises:
            SettingsError: the reference reads other tokens than the policy, or cannot read packed rows.
        """
        self._kl = settings.objective.kl_coefficient
        self._entropy = settings.objective.entropy_coefficient
        self._temperature = settings.task.temperature
        self._reference = None
        if self._kl:
            directory = model_dir if settings.model.reference is None else Path(settings.model.reference)
            model, reads_packed = load_model(settings, directory)
            rows = int(model.get_input_embeddings().weight.shape[0])
            if rows != vocab_size:
                raise SettingsError(
                    f"model.reference = {str(directory)!r} has a vocabulary of {rows}, the model one of {vocab_size}"
                )
            if packs and not reads_packed:
                raise SettingsError(
                    f"model.reference = {str(directory)!r} cannot read packed rows; set learner.packing = false"
                )
            self._reference = Policy(model).requires_grad_(False).eval().to(device)

    def backward_on(self, batch: StepBatch) -> tuple[tuple[MicroBatch, ...], tuple[MicroBatch, ...]]:
        """The step's micro-batches that have a gradient, and those that need but a forward pass."""
        if self._kl or self._entropy:
            return batch.micro_batches + batch.quiet, ()
        return batch.micro_batches, batch.quiet

    def part(
        self, logprobs: Tensor, entropies: Tensor, micro: MicroBatch, silenced: Tensor, num_tokens: int
    ) -> tuple[Tensor, Tensor]:
        """A micro-batch's share of the terms, and `[B]` the detached sum of k3 over each sequence's tokens.

        Args:
            logprobs: `[B, T]` the policy's.
            entropies: `[N]` of the policy at the unmasked tokens, with gradient if there is an entropy bonus.
            micro: the rest.
            silenced: `[B]` bool, sequences that are left out.
            num_tokens: unmasked tokens of the whole step.
        """
        active = micro.mask & ~silenced[:, None]
        loss, sums = logprobs.new_zeros(()), logprobs.new_zeros(len(logprobs))
        if self._reference is not None:
            log_ratio = torch.where(active, self._reference_logprobs(micro) - logprobs, 0)
            log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
            k3 = log_ratio.expm1() - log_ratio
            loss, sums = loss + self._kl * k3.sum(), k3.detach().sum(1)
        if self._entropy:
            loss = loss - self._entropy * torch.where(active, scatter_rows(entropies, micro.mask), 0).sum()
        return loss / max(num_tokens, 1), sums

    def _reference_logprobs(self, micro: MicroBatch) -> Tensor:
        assert self._reference is not None
        with torch.no_grad():
            chosen, _ = self._reference(
                micro.tokens, micro.positions, micro.targets, self._temperature, packed=micro.packed
            )
        return scatter_rows(chosen, micro.mask)
