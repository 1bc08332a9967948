"""What the recipe says of DeepSpeed is what DeepSpeed does; what it cannot do is refused by name."""

import json
import math

import pytest
import torch
from learner_samples import make_groups, make_settings, write_model

from learner.batch import build_step_batch
from learner.deepspeed_config import deepspeed_config
from learner.engine import MAX_SKIPPED_IN_A_ROW, Engine
from learner.schedule import learning_rate
from protocol.errors import NonFiniteError, SettingsError
from protocol.recipe import resolve


def _learner(**values):
    return make_settings("m", learner=values).learner


def _batch(seed=0):
    return build_step_batch(make_groups(4, seed=seed), micro_batch_tokens=10**6, normalise_std=False)


def test_offload_is_of_what_the_stage_shards():
    assert "offload_optimizer" not in deepspeed_config(_learner())["zero_optimization"]
    zero = deepspeed_config(_learner(zero_stage=2, offload="optimizer"))["zero_optimization"]
    assert zero["offload_optimizer"]["device"] == "cpu"
    assert "offload_param" not in zero
    zero = deepspeed_config(_learner(zero_stage=3, offload="parameters"))["zero_optimization"]
    assert zero["offload_param"]["device"] == zero["offload_optimizer"]["device"] == "cpu"
    with pytest.raises(ValueError, match="needs zero_stage = 3 or more, not 2"):
        _learner(zero_stage=2, offload="parameters")
    with pytest.raises(ValueError, match="needs zero_stage = 1 or more, not 0"):
        _learner(zero_stage=0, offload="optimizer")


def test_offload_of_a_learner_on_the_cpu_is_refused(tmp_path):
    directory = write_model(tmp_path / "m")
    with pytest.raises(SettingsError, match=r'learner.offload = "optimizer".*set it to "none"'):
        Engine(make_settings(directory, learner={"offload": "optimizer"}), directory)


def test_deepspeeds_own_keys_are_merged_last(tmp_path):
    table = {"zero_optimization": {"reduce_bucket_size": 1234}, "fp16": {"initial_scale_power": 4}, "unknown": True}
    config = deepspeed_config(_learner(zero_stage=2, deepspeed=table))
    assert config["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1234}
    assert (config["fp16"]["initial_scale_power"], config["fp16"]["enabled"], config["unknown"]) == (4, False, True)
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(table))
    assert deepspeed_config(_learner(zero_stage=2, deepspeed=str(path))) == config


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps is set by learner.micro_batch_tokens"),
        ({"train_batch_size": 4}, "train_batch_size"),
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu"),
        ({"zero_optimization": {"stage": 1}}, "zero_optimization.stage is set by learner.zero_stage"),
        ({"optimizer": {"type": "Adam"}}, "optimizer is set by"),
    ],
)
def test_keys_that_other_settings_decide_are_refused(tmp_path, table, named):
    with pytest.raises(ValueError, match=named):
        _learner(deepspeed=table)
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(table))
    with pytest.raises(SettingsError, match=named):
        deepspeed_config(_learner(deepspeed=str(path)))


@pytest.mark.parametrize("text", [None, "[1]", "{"])
def test_a_file_that_cannot_be_used_is_named(tmp_path, text):
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SettingsError, match=r"learner.deepspeed = '.*ds.json' cannot be used"):
        deepspeed_config(_learner(deepspeed=str(path)))


def test_every_layer_of_a_recipe_may_set_it(tmp_path):
    recipe = tmp_path / "r.toml"
    recipe.write_text('[model]\npath = "m"\n[learner.deepspeed.zero_optimization]\noverlap_comm = true\n')
    more = "learner.deepspeed.zero_optimization.reduce_bucket_size=5"
    table = resolve(recipe, [more], {}).settings.learner.deepspeed
    assert table == {"zero_optimization": {"overlap_comm": True, "reduce_bucket_size": 5}}
    assert resolve(recipe, ["learner.deepspeed=ds.json"], {}).settings.learner.deepspeed == "ds.json"
    inline = resolve(recipe, ["learner.deepspeed={wall_clock_breakdown = true}"], {}).settings.learner.deepspeed
    assert inline["wall_clock_breakdown"] is True


def test_schedules():
    def rates(schedule, warmup):
        learner = {"learning_rate": 1.0, "schedule": schedule, "warmup_steps": warmup}
        settings = make_settings("m", run={"steps": 10}, learner=learner)
        return [learning_rate(settings, step) for step in range(10)]

    assert rates("constant", 0) == [1.0] * 10
    assert rates("constant", 4) == pytest.approx([0.25, 0.5, 0.75] + [1.0] * 7)
    assert rates("linear", 0) == pytest.approx([1 - step / 10 for step in range(10)])
    assert rates("linear", 2) == pytest.approx([0.5, 1.0] + [1 - step / 8 for step in range(8)])
    assert rates("cosine", 0) == pytest.approx([(1 + math.cos(math.pi * step / 10)) / 2 for step in range(10)])
    assert rates("cosine", 50)[-1] == pytest.approx(0.2)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_resumed_schedule_goes_on_where_it_was(tmp_path, stage):
    directory = write_model(tmp_path / "m")
    learner = {"schedule": "cosine", "warmup_steps": 2, "zero_stage": stage}
    settings = make_settings(directory, run={"steps": 6}, learner=learner)
    engine = Engine(settings, directory)
    updates = [engine.update(_batch(seed)) for seed in range(3)]
    (tmp_path / "state").mkdir()
    engine.capture(tmp_path / "state")()
    updates += [engine.update(_batch(seed)) for seed in range(3, 6)]
    assert [update.learning_rate for update in updates] == [learning_rate(settings, step) for step in range(6)]
    other = Engine(settings, directory)
    other.load(tmp_path / "state")
    for seed in range(3, 6):
        assert other.update(_batch(seed)).learning_rate == updates[seed].learning_rate
    final = engine.tensors()
    assert all(torch.equal(final[name], tensor) for name, tensor in other.tensors().items())


def test_the_rate_is_the_optimizers(tmp_path):
    """With warm-up over two steps, Adam's first update is half as long."""
    directory = write_model(tmp_path / "m")

    def moved(**learner):
        engine = Engine(make_settings(directory, learner=learner), directory)
        before = engine.tensors()["lm_head.weight"]
        engine.update(_batch())
        return engine.tensors()["lm_head.weight"] - before

    assert torch.allclose(moved(warmup_steps=2), moved() / 2, atol=1e-6)
    assert moved(adam_epsilon=1e3).abs().max() < 1e-6 < moved().abs().max()


@pytest.fixture
def half_precision(monkeypatch, tmp_path):
    """A device that DeepSpeed takes for one with float16; torch computes it on any CPU, slowly."""
    Engine(make_settings(write_model(tmp_path / "first")), tmp_path / "first")  # chooses the accelerator
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_search_for_a_loss_scale_is_no_failure(tmp_path, half_precision, stage):
    """Far more steps are skipped than end a run otherwise, and then training goes on."""
    directory = write_model(tmp_path / "m")
    deepspeed = {"fp16": {"initial_scale_power": 20}}
    learner = {"precision": "float16", "zero_stage": stage, "deepspeed": deepspeed}
    engine = Engine(make_settings(directory, learner=learner), directory)
    engine._policy.model.lm_head.register_forward_hook(_overflow_above(65504.0 / 6))
    before = engine.tensors()
    skipped = 0
    while (update := engine.update(_batch())).skipped:
        assert all(torch.equal(before[name], tensor) for name, tensor in engine.tensors().items())
        skipped += 1
    assert skipped > MAX_SKIPPED_IN_A_ROW
    assert 0 < update.grad_norm < 100
    assert any(not torch.equal(before[name], tensor) for name, tensor in engine.tensors().items())


def _overflow_above(limit):
    def hook(_, __, output):
        if output[0].requires_grad:
            output[0].register_hook(
                lambda gradient: torch.where(gradient.abs().sum() * 1e4 > limit, math.inf, gradient)
            )

    return hook


def test_gradients_that_no_scale_makes_finite_end_the_run(tmp_path, half_precision):
    directory = write_model(tmp_path / "m")
    learner = {"precision": "float16", "deepspeed": {"fp16": {"initial_scale_power": 3}}}
    engine = Engine(make_settings(directory, learner=learner), directory)
    engine._policy.model.lm_head.register_forward_hook(_overflow_above(-1.0))
    for _ in range(3 + MAX_SKIPPED_IN_A_ROW - 1):  # 8, 4, 2, and then the smallest scale
        assert engine.update(_batch()).skipped
    with pytest.raises(NonFiniteError):
        engine.update(_batch())


def test_float16_needs_a_device_that_has_it(tmp_path, half_precision, monkeypatch):
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    with pytest.raises(SettingsError, match='take "bfloat16"'):
        Engine(make_settings(tmp_path / "first", learner={"precision": "float16"}), tmp_path / "first")


def test_half_precision_is_not_accumulated_without_zero():
    for precision in ("bfloat16", "float16"):
        with pytest.raises(ValueError, match=f"zero_stage = 0 would accumulate gradients in {precision}"):
            _learner(zero_stage=0, precision=precision)
