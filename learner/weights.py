"""A policy's weights as a Hugging Face checkpoint names them: in memory for publishing, or as a model directory.

transformers keeps some weights in another layout than the checkpoint (a mixture of experts is fused); engines load the
checkpoint's names, so the conversion that `save_pretrained` does is done here, in memory.
"""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from buffer.adapter import SUFFIX_A, merge
from buffer.store import RawTensor

RAW_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".gguf", ".index.json")


def checkpoint_tensors(model: Any, dtype: torch.dtype, *, gather: bool, keep: bool = True) -> dict[str, Tensor]:
    """Copies of a transformers model's weights on the CPU, contiguous, under their checkpoint names.

    Parameters are cast to `dtype`, persistent buffers keep theirs. Tied weights appear once, by the name of the first.

    Args:
        gather: parameters are partitioned over ranks (ZeRO-3), and the device never holds more than one of them whole;
            every rank must call.
        keep: whether this rank wants them; without it nothing is copied and nothing returned.
    """
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        with _gathered(tensor) if gather and is_parameter else nullcontext():
            if keep:
                state[name] = tensor.detach().to("cpu", dtype if is_parameter else tensor.dtype, copy=True)
    if not keep:
        return {}
    return {name: tensor.contiguous() for name, tensor in revert_weight_conversion(model, state).items()}


def _gathered(parameter: Tensor) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


def raw_tensors(tensors: dict[str, Tensor]) -> list[RawTensor]:
    """The same tensors as the weight store takes them; their memory is shared, not copied."""
    return [
        RawTensor(
            name=name,
            dtype=RAW_DTYPES[tensor.dtype],
            shape=tuple(tensor.shape),
            data=tensor.reshape(-1).view(torch.uint8).numpy().data,
        )
        for name, tensor in tensors.items()
    ]


def merged_tensors(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that published tensors stand for, as actors compute them; the same where nothing is adapted."""
    if not any(name.endswith(SUFFIX_A) for name in tensors):
        return tensors
    dtypes = {name: dtype for dtype, name in RAW_DTYPES.items()}
    return {
        raw.name: torch.frombuffer(raw.data, dtype=dtypes[raw.dtype]).reshape(raw.shape)
        for raw in merge(raw_tensors(tensors))
    }


def write_model_directory(tensors: dict[str, Tensor], skeleton: Path, directory: Path) -> None:
    """Write a complete Hugging Face model: `tensors`, with config, tokenizer and the rest copied from `skeleton`.

    Adapters are merged. An existing `directory` is replaced only once the new one is complete.
    """
    tensors = merged_tensors(tensors)
    fresh = directory.with_name(f".{directory.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(skeleton, fresh, ignore=lambda _, names: [n for n in names if n.endswith(WEIGHT_SUFFIXES)])
    save_file(tensors, fresh / "model.safetensors", metadata={"format": "pt"})
    config_file = fresh / "config.json"
    config = json.loads(config_file.read_text())
    config.pop("torch_dtype", None)
    config["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    config_file.write_text(json.dumps(config, indent=2) + "\n")
    old = directory.with_name(f".{directory.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    fresh.rename(directory)
    shutil.rmtree(old, ignore_errors=True)
