"""Log-probabilities of sampled tokens without ever holding `[tokens, vocabulary]`.

The LM head is replaced by one that goes over its logits in tiles of some tokens and some of the vocabulary, keeps
nothing but a few numbers per token, and recomputes each tile in the backward pass, turning it into its gradient in
place. Peak memory grows with tokens times hidden size, not with the vocabulary. Sums are float32 whatever the weights
are, gradients included: what a tile adds is rounded once, when all tiles are in.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from learner.packing import PackedRow, row_arguments

TILE_TOKENS = 2048
TILE_LOGITS = {"cpu": 1 << 21}  # 8 MiB of float32, which stay in the cache while they are worked on
TILE_LOGITS_ELSEWHERE = 1 << 24
LEAST_LOGPROB = -1e4  # its exponential is 0; keeps 0 · -inf out of the entropy


@dataclass(frozen=True, slots=True)
class LogitShape:
    """What a model and the sampler do to logits: `cap · tanh(scale · logits / cap) / temperature`, or without a cap."""

    scale: float = 1.0
    cap: float | None = None
    temperature: float = 1.0

    @property
    def top(self) -> float:
        """Factor of the logits after the cap, of all of them where there is none."""
        return (self.scale if self.cap is None else self.cap) / self.temperature

    def apply_(self, logits: Tensor) -> Tensor:
        """Shape logits in place."""
        if self.cap is not None:
            logits.mul_(self.scale / self.cap).tanh_()
        return logits.mul_(self.top) if self.top != 1.0 else logits

    def slope(self, shaped: Tensor) -> Tensor | float | None:
        """Derivative of shaped logits by the head's, from the shaped ones; None where it is 1."""
        slope = self.scale / self.temperature
        if self.cap is None:
            return slope if slope != 1.0 else None
        return (shaped / self.top).square_().mul_(-slope).add_(slope)


class _TiledLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        shape: LogitShape,
        entropy_gradient: bool,
    ) -> tuple[Tensor, Tensor]:
        total, product, chosen = hidden.new_zeros((3, len(hidden)), dtype=torch.float32)
        top = torch.full_like(total, torch.finfo(torch.float32).min)
        for columns in _vocabulary_tiles(hidden, weight):
            for rows in _token_tiles(hidden):
                logits = _logits(hidden[rows], weight, bias, columns, shape)
                index, inside = _place(targets[rows], columns)
                chosen[rows] += logits.gather(1, index).squeeze(1).where(inside, 0)
                _fold(logits, top[rows], total[rows], product[rows])
        normaliser = top + total.log()
        entropy = total.log() - product / total
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser, entropy)
        ctx.shape = shape
        ctx.set_materialize_grads(False)
        if not entropy_gradient:
            ctx.mark_non_differentiable(entropy)
        return chosen - normaliser, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normaliser, entropy = ctx.saved_tensors
        gain = torch.zeros_like(normaliser) if grad_logprobs is None else grad_logprobs
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        grad_weight = torch.empty_like(weight)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
        for columns in _vocabulary_tiles(hidden, weight):
            part = weight[columns]
            total = torch.zeros_like(part, dtype=torch.float32)
            for rows in _token_tiles(hidden):
                grad = _logits(hidden[rows], weight, bias, columns, ctx.shape)
                slope = ctx.shape.slope(grad)
                grad.sub_(normaliser[rows, None])
                if grad_entropy is None:
                    grad.exp_().mul_(-gain[rows, None])
                else:
                    _with_entropy_(grad, gain[rows, None], grad_entropy[rows, None], entropy[rows, None])
                index, inside = _place(targets[rows], columns)
                grad.scatter_add_(1, index, gain[rows].where(inside, 0)[:, None])
                if slope is not None:
                    grad.mul_(slope)
                if grad_bias is not None:
                    grad_bias[columns] += grad.sum(0)
                low = grad.to(hidden.dtype)
                _add_product(grad_hidden[rows], low, part)
                _add_product(total, low.T, hidden[rows])
            grad_weight[columns] = total
        grad_bias = None if bias is None or grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden.to(hidden.dtype), grad_weight, grad_bias, None, None, None


def _token_tiles(hidden: Tensor) -> Iterator[slice]:
    for start in range(0, len(hidden), TILE_TOKENS):
        yield slice(start, start + TILE_TOKENS)


def _vocabulary_tiles(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    tokens = max(1, min(len(hidden), TILE_TOKENS))
    size = max(1, TILE_LOGITS.get(hidden.device.type, TILE_LOGITS_ELSEWHERE) // tokens)
    for start in range(0, len(weight), size):
        yield slice(start, min(start + size, len(weight)))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, columns: slice, shape: LogitShape) -> Tensor:
    """A tile of shaped logits, float32, computed in the dtype of `hidden` as actors do."""
    logits = nn.functional.linear(hidden, weight[columns], None if bias is None else bias[columns])
    return shape.apply_(logits.float())


def _place(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """`[n, 1]` column of each target inside a tile, any where it is not, and `[n]` whether it is."""
    local = targets - columns.start
    last = columns.stop - columns.start - 1
    return local.clamp(0, last)[:, None], (local >= 0) & (local <= last)


def _fold(logits: Tensor, top: Tensor, total: Tensor, product: Tensor) -> None:
    """Take a tile, which is lost, into the maximum z' of a row, `Σ exp(z - z')` and `Σ exp(z - z') (z - z')`."""
    highest = torch.maximum(top, logits.amax(1))
    shift = top - highest
    logits.sub_(highest[:, None])
    exps = logits.exp()
    product.add_(total * shift).mul_(shift.exp())
    total.mul_(shift.exp()).add_(exps.sum(1))
    product.add_(exps.mul_(logits.clamp_(min=LEAST_LOGPROB)).sum(1))
    top.copy_(highest)


def _with_entropy_(logprobs: Tensor, gain: Tensor, grad_entropy: Tensor, entropy: Tensor) -> None:
    """Turn a tile of log-probs into `-p · (gain + grad_entropy · (log p + entropy))`."""
    probabilities = logprobs.exp()
    logprobs.clamp_(min=LEAST_LOGPROB).add_(entropy).mul_(grad_entropy).add_(gain).mul_(probabilities).neg_()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, float32, without rounding the product to half precision first."""
    if total.is_cuda and left.dtype != total.dtype:  # keeps the fast kernels, which CPUs do not have
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())


class LogprobHead(nn.Module):
    """Takes the place of a model's LM head and shares its parameters, so names, ties and ZeRO-3 gathering stay."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.weight: nn.Parameter = head.weight
        self.bias: nn.Parameter | None = getattr(head, "bias", None)

    def forward(
        self, hidden: Tensor, targets: Tensor, shape: LogitShape, entropy_gradient: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Log-probs `[N]` float32 of `targets` `[N]` under the softmax of shaped logits, and entropies `[N]`.

        `hidden` is `[N, H]`; logits are computed in its dtype, a tile at a time, and used in float32. Entropies are
        detached unless `entropy_gradient`.
        """
        logprobs, entropy = _TiledLogprobs.apply(hidden, self.weight, self.bias, targets, shape, entropy_gradient)  # type: ignore[no-untyped-call]
        return logprobs, entropy


class Policy(nn.Module):
    """A causal language model that answers with log-probs at chosen positions instead of logits everywhere."""

    def __init__(self, model: Any, *, entropy_gradient: bool = False) -> None:
        super().__init__()
        config = model.config.get_text_config()
        self.logit_scale = _logit_scale(config)
        self.logit_cap: float | None = getattr(config, "final_logit_softcapping", None) or None
        self.entropy_gradient = entropy_gradient
        model.set_output_embeddings(LogprobHead(model.get_output_embeddings()))
        self.model: Any = model

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        targets: Tensor,
        temperature: float,
        packed: PackedRow | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies `[N]` float32 of `targets` `[N]` at flat `positions` `[N]` of `tokens` `[B, L]`."""
        hidden = self.model.base_model(**row_arguments(tokens, packed)).last_hidden_state
        chosen = hidden.flatten(0, 1).index_select(0, positions)
        shape = LogitShape(self.logit_scale, self.logit_cap, temperature)
        logprobs, entropy = self.model.get_output_embeddings()(chosen, targets, shape, self.entropy_gradient)
        return logprobs, entropy


def _logit_scale(config: Any) -> float:
    """What the model multiplies its logits by: every family has a name of its own for it."""
    scale = 1.0
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        scale *= float(getattr(config, name, None) or 1.0)
    divisor = float(getattr(config, "logits_scaling", None) or 1.0)
    return scale * divisor if config.model_type == "hyperclovax" else scale / divisor


def scatter_rows(values: Tensor, mask: Tensor) -> Tensor:
    """`[B, T]` with `values` `[N]` at the True positions of `mask` `[B, T]` in row-major order, 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
