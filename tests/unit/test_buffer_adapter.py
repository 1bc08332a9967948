"""Merging adapters: the arithmetic to the bit, against torch; and what cannot be merged is refused."""

import numpy as np
import pytest
import torch

from buffer.adapter import holds_adapters, merge
from buffer.payloads import RawTensor
from learner.weights import RAW_DTYPES, raw_tensors
from protocol.errors import WeightsDamagedError
from protocol.manifest import Manifest, Probe, TensorEntry


def bundle(dtype: torch.dtype, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "norm.weight": torch.randn(8, generator=generator).to(dtype),
        "q.weight": torch.randn(6, 8, generator=generator).to(dtype),
        "q.lora_A": torch.randn(2, 8, generator=generator),
        "q.lora_B": torch.randn(6, 2, generator=generator),
    }


def as_torch(raw: RawTensor) -> torch.Tensor:
    dtype = {name: dtype for dtype, name in RAW_DTYPES.items()}[raw.dtype]
    return torch.frombuffer(bytearray(raw.data), dtype=dtype).reshape(raw.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sum_is_taken_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    tensors = bundle(dtype)
    product = tensors["q.lora_B"].numpy() @ tensors["q.lora_A"].numpy()
    expected = (torch.from_numpy(product) + tensors["q.weight"].float()).to(dtype)
    merged = {raw.name: raw for raw in merge(raw_tensors(tensors))}
    assert list(merged) == ["norm.weight", "q.weight"]
    assert torch.equal(as_torch(merged["q.weight"]), expected)


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_bfloat16_rounds_as_torch_does() -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint32)
    values = torch.from_numpy(bits.view(np.float32).copy())
    values = torch.cat([values, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.3895314e38, 1e-45])])
    tensors = {
        "w.weight": torch.zeros(len(values), 1, dtype=torch.bfloat16),
        "w.lora_A": torch.ones(1, 1),
        "w.lora_B": values[:, None],
    }
    (merged,) = merge(raw_tensors(tensors))
    ours, theirs = as_torch(merged)[:, 0], values.to(torch.bfloat16)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours[~ours.isnan()], theirs[~theirs.isnan()])


def test_an_adapter_of_zeros_changes_no_bit() -> None:
    tensors = bundle(torch.bfloat16)
    tensors["q.lora_B"].zero_()
    merged = {raw.name: raw for raw in merge(raw_tensors(tensors))}
    assert torch.equal(as_torch(merged["q.weight"]), tensors["q.weight"])


def test_tensors_without_adapters_are_passed_on() -> None:
    tensors = raw_tensors({"a.weight": torch.ones(2), "b.bias": torch.ones(3)})
    assert merge(tensors) == tensors


def _without(name: str) -> list[RawTensor]:
    return [raw for raw in raw_tensors(bundle(torch.float32)) if raw.name != name]


@pytest.mark.parametrize(
    "tensors",
    [
        _without("q.weight"),
        _without("q.lora_B"),
        raw_tensors(bundle(torch.float32) | {"q.lora_B": torch.ones(5, 2)}),
        raw_tensors(bundle(torch.float32) | {"q.lora_A": torch.ones(3, 8)}),
        raw_tensors(bundle(torch.float32) | {"q.weight": torch.ones(6, 8, dtype=torch.int32)}),
    ],
    ids=["no weight", "no B", "wrong shape", "wrong rank", "integers"],
)
def test_what_cannot_be_merged_is_refused_by_name(tensors: list[RawTensor]) -> None:
    with pytest.raises(WeightsDamagedError, match="adapter of q cannot be merged"):
        merge(tensors)


@pytest.mark.parametrize(("name", "expected"), [("q.lora_A", True), ("q.weight", False)])
def test_a_manifest_tells_whether_there_is_something_to_merge(name: str, expected: bool) -> None:
    manifest = Manifest(
        version=0,
        step=0,
        epoch=1,
        kind="full",
        payload="p.safetensors",
        payload_bytes=64,
        tensors=(TensorEntry(name=name, dtype="F32", shape=(1,), xxh3="0" * 16),),
        probe=Probe(tokens=((1, 2),), logprobs=((-1.0,),)),
    )
    assert holds_adapters(manifest) is expected
