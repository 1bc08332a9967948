"""Several sequences in one row, and the attention that keeps each to itself.

Everything in a transformer but attention works on single tokens, so a packed row `[1, L]` costs what its tokens cost.
transformers lets a registered function replace a model's attention and builds no mask for one it does not know:
nothing of size `[L, L]` ever exists. The function here gathers sequences of similar length into small padded batches
for torch's kernels, or hands the row to flash-attn's kernel for variable lengths where that is installed. Whether a
model may be packed is asked of its configuration and then of the model itself. Chunked attention, attention sinks,
soft caps and layers that mix tokens otherwise (convolutions, state spaces) are left out: such models keep padded rows.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.utils import is_flash_attn_2_available

NAME = "packed_rows"
LAYER_TYPES = {"full_attention", "sliding_attention"}
NOT_COMPUTED = ("softcap", "s_aux", "position_bias", "head_mask")  # what other attention functions are given
SHORTEST_SHARE = 0.9  # of its longest: what may be padded to one length for attention


class UnpackableError(ValueError):
    """The model needs an attention that packed rows do not have."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Neighbours in a packed row that attention computes together, as `[count, longest]`.

    Attributes:
        start, stop: their tokens in the row.
        gather: `[count · longest]` int64, for each place the token of the row that goes there, counted from `start`;
            None where all sequences are of one length, and the tokens are that batch already.
        scatter: `[stop - start]` int64, the place of each token.
    """

    start: int
    stop: int
    count: int
    longest: int
    gather: Tensor | None
    scatter: Tensor | None


@dataclass(frozen=True, slots=True)
class PackedRow:
    """Where the sequences of a row `[1, L]` lie.

    Attributes:
        lengths: tokens of each sequence, descending.
        position_ids: `[1, L]` int64, from 0 in each sequence.
        boundaries: `[S + 1]` int32, where each sequence starts, and where the last one ends.
        buckets: together they cover the row.
    """

    lengths: tuple[int, ...]
    position_ids: Tensor
    boundaries: Tensor
    buckets: tuple[Bucket, ...]

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "PackedRow":
        """Sequences of these lengths, in descending order, one behind the other."""
        counts = np.asarray(lengths, dtype=np.int64)
        boundaries = np.concatenate([[0], np.cumsum(counts)])
        position_ids = np.arange(boundaries[-1]) - np.repeat(boundaries[:-1], counts)
        buckets = []
        first = 0
        while first < len(counts):
            longest = int(counts[first])
            last = first + int(np.count_nonzero(counts[first:] >= SHORTEST_SHARE * longest))
            buckets.append(_bucket(counts[first:last], int(boundaries[first])))
            first = last
        return cls(
            lengths=tuple(counts.tolist()),
            position_ids=torch.from_numpy(position_ids[None]),
            boundaries=torch.from_numpy(boundaries.astype(np.int32)),
            buckets=tuple(buckets),
        )

    def to(self, device: torch.device) -> "PackedRow":
        """The same on another device."""

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=True)

        buckets = (Bucket(b.start, b.stop, b.count, b.longest, move(b.gather), move(b.scatter)) for b in self.buckets)
        position_ids, boundaries = (t.to(device, non_blocking=True) for t in (self.position_ids, self.boundaries))
        return PackedRow(self.lengths, position_ids, boundaries, tuple(buckets))


def _bucket(lengths: NDArray[np.int64], start: int) -> Bucket:
    longest, total = int(lengths[0]), int(lengths.sum())
    gather = scatter = None
    if longest != lengths[-1]:
        inside = np.arange(longest) < lengths[:, None]
        places = np.zeros(inside.shape, dtype=np.int64)  # padding, which nothing reads, repeats the first token
        places[inside] = np.arange(total)
        gather, scatter = torch.from_numpy(places.ravel()), torch.from_numpy(np.flatnonzero(inside))
    return Bucket(start, start + total, len(lengths), longest, gather, scatter)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    packed: PackedRow | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention as transformers calls it: `[B, heads, L, D]` in, `[B, L, heads, D]` out.

    Args:
        packed: the sequences of the row, none of which sees another; without it each row is a sequence with padding
            behind it.

    Raises:
        UnpackableError: the model asks for something that is not computed here.
    """
    asked = [name for name in NOT_COMPUTED if others.get(name) is not None]
    if asked or attention_mask is not None:
        raise UnpackableError(f"its attention takes {', '.join(asked) or 'a mask'}")
    if packed is None:
        return _causal(query, key, value, scaling, dropout, sliding_window).transpose(1, 2), None
    flash = _flash_attention() if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) else None
    if flash is not None:
        return attend_varlen(flash, query, key, value, packed, scaling, dropout, sliding_window), None
    rows = [x[0].transpose(0, 1) for x in (query, key, value)]  # [L, heads, D]
    parts = []
    for bucket in packed.buckets:
        queries, keys, values = (_batched(row, bucket) for row in rows)
        out = _causal(queries, keys, values, scaling, dropout, sliding_window)
        flat = out.transpose(1, 2).flatten(0, 1)
        parts.append(flat if bucket.scatter is None else flat.index_select(0, bucket.scatter))
    return torch.cat(parts)[None], None


def _batched(row: Tensor, bucket: Bucket) -> Tensor:
    """`[count, heads, longest, D]` of `row` `[L, heads, D]`."""
    part = row[bucket.start : bucket.stop]
    if bucket.gather is not None:
        part = part.index_select(0, bucket.gather)
    return part.view(bucket.count, bucket.longest, *part.shape[1:]).transpose(1, 2)


def _causal(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, dropout: float, window: int | None
) -> Tensor:
    """`[B, heads, T, D]`; keys and values may have fewer heads. A window counts the token itself."""
    mask = None
    length = query.shape[2]
    if window is not None and length > window:
        mask = torch.ones((length, length), dtype=torch.bool, device=query.device).tril().triu(1 - window)
    return nn.functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def attend_varlen(
    kernel: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    packed: PackedRow,
    scaling: float | None,
    dropout: float,
    window: int | None,
) -> Tensor:
    """The packed row through a kernel with the interface of `flash_attn.flash_attn_varlen_func`."""
    longest = packed.lengths[0]
    out = kernel(
        *(x[0].transpose(0, 1) for x in (query, key, value)),
        cu_seqlens_q=packed.boundaries,
        cu_seqlens_k=packed.boundaries,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        dropout_p=dropout,
        softmax_scale=scaling,
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),  # keys before the token, and behind it
    )
    return out[None]


@cache
def _flash_attention() -> Callable[..., Tensor] | None:
    if not is_flash_attn_2_available():
        return None
    from flash_attn import flash_attn_varlen_func

    function: Callable[..., Tensor] = flash_attn_varlen_func
    return function


def enable_packing(model: Any) -> None:
    """Give a loaded, undistributed causal language model the attention of packed rows.

    Raises:
        UnpackableError: it says why the model cannot be packed; its attention is as it was.
    """
    config = model.config
    if unknown := set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES:
        raise UnpackableError(f"it has layers of type {', '.join(sorted(unknown))}")
    if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
        raise UnpackableError("its forward pass takes no position_ids")
    AttentionInterface.register(NAME, attend)
    before = config._attn_implementation
    try:
        model.set_attn_implementation(NAME)
        if config._attn_implementation != NAME:
            raise UnpackableError("its attention cannot be replaced")
        _check_isolation(model)
    except ValueError as error:
        model.set_attn_implementation(before)
        raise UnpackableError(str(error)) from error


def _check_isolation(model: Any) -> None:
    """Two sequences in a row: what the second computes depends on its own tokens, and on none of the first's.

    Held against exact zeros of a gradient: whatever the precision, there is nothing to tolerate.
    """
    packed = PackedRow.of([4, 3])
    leaves: list[Tensor] = []

    def cut(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[0]

    device = model.get_input_embeddings().weight.device
    hook = model.get_input_embeddings().register_forward_hook(cut)
    try:
        tokens = torch.arange(7, device=device)[None] % model.get_input_embeddings().weight.shape[0]
        with torch.enable_grad():
            hidden = model.base_model(**row_arguments(tokens, packed.to(device))).last_hidden_state
            second = hidden[0, 4:].float()
            second = second * torch.linspace(-1, 1, second.numel(), device=device).view_as(second)
            (of_all,) = torch.autograd.grad(second.sum(), leaves[0], retain_graph=True)
            (of_last,) = torch.autograd.grad(second[-1].sum(), leaves[0])
    finally:
        hook.remove()
    if of_all[0, :4].any():
        raise UnpackableError("its layers let one sequence of a row see another")
    if not of_last[0, 4].any():
        raise UnpackableError("its last token does not see the first of its sequence")


def row_arguments(tokens: Tensor, packed: PackedRow | None) -> dict[str, Any]:
    """Arguments of a base model's forward pass over `tokens` `[B, L]`."""
    arguments: dict[str, Any] = {"input_ids": tokens, "use_cache": False}
    if packed is not None:
        arguments |= {"position_ids": packed.position_ids, "packed": packed}
    return arguments
