"""LoRA in the real engine: what moves, what is published, and that the merged model is the one that was trained."""

from contextlib import nullcontext

import pytest
import torch
from learner_samples import make_groups, make_settings, write_model
from transformers import AutoModelForCausalLM

from learner.batch import build_step_batch
from learner.engine import Engine
from learner.lora import LoraLinear, is_adapter
from learner.weights import merged_tensors, write_model_directory
from protocol.errors import SettingsError
from protocol.settings import Settings

LORA = {"rank": 4, "alpha": 6.0}
SEQUENCES = [[1, 2, 3, 4, 5, 6], [7, 8, 9]]


def settings_of(directory, lora=LORA, learner=None, **model) -> Settings:
    return make_settings(directory, model={"lora": lora} | model, learner={"learning_rate": 1e-2} | (learner or {}))


def train(engine: Engine, steps: int = 3) -> None:
    for seed in range(steps):
        groups = make_groups(4, seed=seed)
        assert engine.update(build_step_batch(groups, micro_batch_tokens=60, normalise_std=False)).grad_norm > 0


@pytest.mark.parametrize(("stage", "precision"), [(0, "float32"), (1, "float32"), (1, "bfloat16"), (2, "bfloat16")])
def test_adapters_move_and_the_model_does_not(tmp_path, stage, precision):
    directory = write_model(tmp_path / "m", tied=True)
    engine = Engine(settings_of(directory, learner={"zero_stage": stage, "precision": precision}), directory)
    before = engine.tensors()
    assert {t.dtype for n, t in before.items() if is_adapter(n)} == {torch.float32}
    adapted = {n.removesuffix(".lora_A") for n in before if n.endswith(".lora_A")}
    assert {n.rpartition(".")[2] for n in adapted} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    train(engine)
    after = engine.tensors()
    assert list(after) == list(before)
    assert {n for n in after if not torch.equal(before[n], after[n])} == {n for n in after if is_adapter(n)}
    assert all(after[n] is before[n] for n in after if not is_adapter(n))  # copied once, not at every publication
    optimized = sum(p.numel() for group in engine._deepspeed.optimizer.param_groups for p in group["params"])
    assert optimized == sum(t.numel() for n, t in after.items() if is_adapter(n))


def test_training_starts_from_the_model_itself(tmp_path):
    directory = write_model(tmp_path / "m")
    plain = Engine(make_settings(directory), directory)
    merged = merged_tensors(Engine(settings_of(directory), directory).tensors())
    assert merged.keys() == plain.tensors().keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in plain.tensors().items())


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.1)])
def test_the_exported_model_is_what_is_probed_and_what_is_trained(tmp_path, monkeypatch, precision, tolerance):
    directory = write_model(tmp_path / "m")
    engine = Engine(settings_of(directory, learner={"precision": precision}, dtype=precision), directory)
    train(engine)
    write_model_directory(engine.tensors(), directory, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=getattr(torch, precision))
    probe = engine.probe(SEQUENCES)
    monkeypatch.setattr(engine, "_evaluating", nullcontext)
    trained = engine.probe(SEQUENCES)
    for sequence, probed, unmerged in zip(SEQUENCES, probe.logprobs, trained.logprobs, strict=True):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([sequence])).logits[0].float()
        exact = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(sequence)[1:, None]).squeeze(1)
        assert (exact - torch.tensor(probed)).abs().max() < tolerance
        assert (exact - torch.tensor(unmerged)).abs().max() < tolerance
    initial = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, precision))
    assert not torch.equal(initial.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)


def test_the_gradient_is_that_of_the_merged_weight():
    torch.manual_seed(0)
    layer = LoraLinear(torch.nn.Linear(5, 7), rank=2, scale=1.5).double()
    torch.nn.init.normal_(layer.lora_B)
    inputs, weights = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 7, dtype=torch.float64)
    (layer(inputs) * weights).sum().backward()
    a, b = (p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B))
    merged = layer.weight.detach() + 1.5 * b @ a
    (torch.nn.functional.linear(inputs, merged, layer.bias.detach()) * weights).sum().backward()
    assert torch.allclose(layer.lora_A.grad, a.grad)
    assert torch.allclose(layer.lora_B.grad, b.grad)


def test_a_checkpoint_resumes_and_its_layout_names_the_adapters(tmp_path):
    directory = write_model(tmp_path / "m")
    settings = settings_of(directory)
    engine = Engine(settings, directory)
    train(engine)
    (tmp_path / "state").mkdir()
    engine.capture(tmp_path / "state")()
    train(engine)
    other = Engine(settings, directory)
    other.load(tmp_path / "state")
    train(other)
    assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in engine.tensors().items())
    layouts = {Engine(settings_of(directory, LORA | {"alpha": a}), directory).layout for a in (6.0, 7.0)}
    assert layouts == {engine.layout, engine.layout.replace("alpha 6", "alpha 7")}
    assert engine.layout != Engine(make_settings(directory), directory).layout


@pytest.mark.parametrize("target", ["q_projection", "lm_head", "embed_tokens"])
def test_what_is_no_linear_layer_cannot_be_adapted(tmp_path, target):
    directory = write_model(tmp_path / "m")
    with pytest.raises(SettingsError, match=rf"target_modules: .* no linear layer '{target}' .*q_proj"):
        Engine(settings_of(directory, LORA | {"target_modules": ["q_proj", target]}), directory)


def test_fused_experts_are_refused_and_attention_beside_them_is_not(tmp_path):
    directory = write_model(tmp_path / "m", experts=4)
    with pytest.raises(SettingsError, match=r"experts fused into one tensor .* model.lora.target_modules"):
        Engine(settings_of(directory), directory)
    engine = Engine(settings_of(directory, LORA | {"target_modules": ["q_proj", "v_proj"]}), directory)
    train(engine)
    tensors = engine.tensors()
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in tensors if is_adapter(n)} == {"q_proj", "v_proj"}
    assert merged_tensors(tensors).keys() == Engine(make_settings(directory), directory).tensors().keys()


@pytest.mark.parametrize(
    ("section", "message"),
    [({"learner": {"zero_stage": 3}}, "zero_stage = 3"), ({"weights": {"delta": "never"}}, "every time")],
)
def test_settings_that_do_not_go_with_adapters(tmp_path, section, message):
    with pytest.raises(ValueError, match=message):
        make_settings(tmp_path, model={"lora": LORA}, **section)
