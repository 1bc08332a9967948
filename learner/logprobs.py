"""Log-probabilities of sampled tokens without ever holding `[tokens, vocabulary]`.

The LM head is replaced by one that goes over its tokens in chunks, keeps nothing but a number per token, and recomputes
the logits in the backward pass, turning them into their gradient in place. Peak memory grows with tokens times hidden
size, not with the vocabulary. A gradient of the entropy is left out: no objective here asks for it.
"""

from typing import Any

import torch
from torch import Tensor, nn

CHUNK_LOGITS = 1 << 24  # float32 logits held at once, 64 MiB: 512 tokens of a vocabulary of 32k


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float, chunk: int
    ) -> tuple[Tensor, Tensor]:
        logprobs, entropy, normaliser = hidden.new_empty((3, len(hidden)), dtype=torch.float32)
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            logits = _logits(hidden[part], weight, bias, scale)
            normaliser[part] = torch.logsumexp(logits, 1)
            logprobs[part] = logits.gather(1, targets[part, None]).squeeze(1) - normaliser[part]
            logits -= normaliser[part, None]
            entropy[part] = -(logits.exp().mul_(logits.clamp_(min=-1e4))).sum(1)
        ctx.save_for_backward(hidden, weight, bias, targets, normaliser)
        ctx.scale, ctx.chunk = scale, chunk
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normaliser = ctx.saved_tensors
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
        grad_bias = None if bias is None else torch.zeros(bias.shape, dtype=torch.float32, device=bias.device)
        for start in range(0, len(hidden), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            grad = _logits(hidden[part], weight, bias, ctx.scale)
            grad.sub_(normaliser[part, None]).exp_().neg_()
            grad.scatter_add_(1, targets[part, None], torch.ones_like(grad[:, :1]))
            grad.mul_(grad_logprobs[part, None] * ctx.scale)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            low = grad.to(hidden.dtype)
            grad_hidden[part] = low @ weight
            grad_weight += low.T @ hidden[part]
        grad_bias = None if bias is None or grad_bias is None else grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight.to(weight.dtype), grad_bias, None, None, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    logits = nn.functional.linear(hidden, weight, bias).float()
    return logits.mul_(scale) if scale != 1.0 else logits


class LogprobHead(nn.Module):
    """Takes the place of a model's LM head and shares its parameters, so names, ties and ZeRO-3 gathering stay."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.weight: nn.Parameter = head.weight
        self.bias: nn.Parameter | None = getattr(head, "bias", None)

    def forward(self, hidden: Tensor, targets: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """Log-probs `[N]` float32 of `targets` `[N]` under softmax(scale · logits), and entropies `[N]`, detached.

        `hidden` is `[N, H]`; logits `[chunk, V]` are computed in its dtype and used in float32.
        """
        chunk = max(1, CHUNK_LOGITS // self.weight.shape[0])
        logprobs, entropy = _ChunkedLogprobs.apply(hidden, self.weight, self.bias, targets, scale, chunk)  # type: ignore[no-untyped-call]
        return logprobs, entropy


class Policy(nn.Module):
    """A causal language model that answers with log-probs at chosen positions instead of logits everywhere.

    Raises:
        ValueError: the model caps its logits by a function this head does not compute.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        config = model.config
        if getattr(config, "final_logit_softcapping", None):
            raise ValueError(
                f"{type(model).__name__} caps its logits (final_logit_softcapping), which the learner does not compute"
            )
        self.logit_scale = float(getattr(config, "logit_scale", None) or 1.0)
        self.logit_scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        model.set_output_embeddings(LogprobHead(model.get_output_embeddings()))
        self.model: Any = model

    def forward(self, tokens: Tensor, positions: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies `[N]` float32 of `targets` `[N]` at flat `positions` `[N]` of `tokens` `[B, L]`."""
        hidden = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        chosen = hidden.flatten(0, 1).index_select(0, positions)
        logprobs, entropy = self.model.get_output_embeddings()(chosen, targets, self.logit_scale / temperature)
        return logprobs, entropy


def scatter_rows(values: Tensor, mask: Tensor) -> Tensor:
    """`[B, T]` with `values` `[N]` at the True positions of `mask` `[B, T]` in row-major order, 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
