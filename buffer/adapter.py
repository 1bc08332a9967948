"""Low-rank adapters in a version's tensors, and the weights they stand for.

A version of a model trained by LoRA holds the frozen weights as they always were, and beside each adapted `NAME.weight`
the float32 tensors `NAME.lora_A` `[rank, in]` and `NAME.lora_B` `[out, rank]`, the latter with LoRA's scale multiplied
in. What is served and exported is `weight + lora_B @ lora_A`, added in float32 and rounded once to the weight's own
format. Actor and learner both compute it here, from the same bytes, so they get the same bits.

Frozen weights never change, so a delta (`buffer.payloads`) of such a version holds its adapters and nothing else.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from buffer.payloads import RawTensor
from protocol.errors import WeightsDamagedError
from protocol.manifest import Manifest

SUFFIX_A, SUFFIX_B = ".lora_A", ".lora_B"
_FLOATS = {"F64": np.float64, "F32": np.float32, "F16": np.float16}

Array = np.ndarray[Any, np.dtype[Any]]


def holds_adapters(manifest: Manifest) -> bool:
    """Whether a version's tensors have to be merged before they are served."""
    return any(entry.name.endswith(SUFFIX_A) for entry in manifest.tensors)


def merge(tensors: Sequence[RawTensor]) -> list[RawTensor]:
    """The weights that a version stands for: those without an adapter are passed on as they are.

    Raises:
        WeightsDamagedError: an adapter is incomplete, or does not fit its weight.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    merged = dict(by_name)
    for name in by_name:
        if name.endswith(SUFFIX_A):
            target = name.removesuffix(SUFFIX_A)
            try:
                weight, b = by_name[f"{target}.weight"], by_name[target + SUFFIX_B]
                merged[weight.name] = _adapted(weight, by_name[name], b)
            except (KeyError, ValueError) as error:
                raise WeightsDamagedError(f"the adapter of {target} cannot be merged: {error!r}") from error
            del merged[name], merged[target + SUFFIX_B]
    return list(merged.values())


def _adapted(weight: RawTensor, a: RawTensor, b: RawTensor) -> RawTensor:
    total = _floats(b) @ _floats(a)
    if total.shape != weight.shape:
        raise ValueError(f"a weight of {weight.shape} and an adapter of {total.shape}")
    total += _floats(weight)
    return RawTensor(weight.name, weight.dtype, weight.shape, _bytes(total, weight.dtype))


def _floats(tensor: RawTensor) -> Array:
    """The tensor in float32, exactly for every format below it."""
    if tensor.dtype == "BF16":
        bits = np.frombuffer(tensor.data, np.uint16).astype(np.uint32) << 16
        return bits.view(np.float32).reshape(tensor.shape)
    if tensor.dtype not in _FLOATS:
        raise ValueError(f"tensor {tensor.name} is of {tensor.dtype}")
    return np.frombuffer(tensor.data, _FLOATS[tensor.dtype]).astype(np.float32).reshape(tensor.shape)


def _bytes(values: Array, dtype: str) -> memoryview:
    if dtype != "BF16":
        return values.astype(_FLOATS[dtype]).reshape(-1).view(np.uint8).data
    bits = values.reshape(-1).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16  # to the nearest, ties to even
    rounded[np.isnan(values.reshape(-1))] = 0x7FC0  # a carry must not turn it into a number
    return rounded.astype(np.uint16).view(np.uint8).data
