"""Weights leave the learner under the names and in the layout of a Hugging Face checkpoint."""

import json

import pytest
import torch
from learner_samples import write_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from buffer.store import WeightStore
from learner.logprobs import Policy
from learner.weights import checkpoint_tensors, raw_tensors, write_model_directory
from protocol.manifest import Probe

MODELS = [(False, 0), (True, 0), (False, 4), (True, 4)]


def _policy_model(directory):
    model = AutoModelForCausalLM.from_pretrained(directory)
    Policy(model)  # replaces the head, as in training
    return model


@pytest.mark.parametrize(("tied", "experts"), MODELS)
def test_names_and_values_are_those_of_the_checkpoint(tmp_path, tied, experts):
    directory = write_model(tmp_path / "m", tied=tied, experts=experts)
    expected = load_file(directory / "model.safetensors")
    actual = checkpoint_tensors(_policy_model(directory), torch.float32, gather=False)
    assert actual.keys() == expected.keys()
    assert ("lm_head.weight" in actual) == (not tied)
    if experts:
        assert "model.layers.0.mlp.experts.3.down_proj.weight" in actual
    for name, tensor in actual.items():
        assert torch.equal(tensor, expected[name])
        assert tensor.is_contiguous()


def test_tensors_are_copies_in_the_published_dtype(tmp_path):
    model = _policy_model(write_model(tmp_path / "m"))
    tensors = checkpoint_tensors(model, torch.bfloat16, gather=False)
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(tensors[name], before[name]) for name in tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_raw_tensors_survive_the_weight_store(tmp_path, dtype):
    tensors = checkpoint_tensors(_policy_model(write_model(tmp_path / "m")), dtype, gather=False)
    store = WeightStore(str(tmp_path / "store"))
    manifest = store.write(0, 1, 0, raw_tensors(tensors), Probe(tokens=((1, 2),), logprobs=((-1.0,),)))
    for raw in store.read(manifest):
        read = torch.frombuffer(bytearray(raw.data), dtype=dtype).reshape(raw.shape)
        assert torch.equal(read, tensors[raw.name])


@pytest.mark.parametrize(("tied", "experts"), MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_written_directory_loads_as_the_same_model(tmp_path, tied, experts, dtype):
    source = write_model(tmp_path / "m", tied=tied, experts=experts)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    tokens = torch.arange(10)[None]
    logits = model(input_ids=tokens).logits
    Policy(model)
    for _ in range(2):  # the second replaces the first
        write_model_directory(checkpoint_tensors(model, dtype, gather=False), source, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == dtype
    assert torch.equal(loaded(input_ids=tokens).logits, logits)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(p.name for p in source.iterdir())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert {p.name for p in tmp_path.iterdir()} == {"m", "out"}
