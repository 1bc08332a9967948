"""`vespo export`: a model that transformers loads, out of any checkpoint, or an error that says why not."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from deploy.cli import app
from deploy.export import export_model
from protocol.errors import CheckpointError, LauncherError, SettingsError

pytest_plugins = ["learner_runs"]


@pytest.fixture
def run_dir(tmp_path, settings, learn, actors):
    """A run of six steps, with checkpoints of steps 4 and 6."""
    actors()
    learn(settings)
    return tmp_path / "run"


def _export(run_dir, target, step=None, dtype=None, force=False):
    return export_model(run_dir, target, step=step, dtype=dtype, force=force)


def test_the_newest_model_loads_and_is_the_one_trained(tmp_path, run_dir):
    outcome = CliRunner().invoke(app, ["export", str(run_dir), str(tmp_path / "out")])
    assert "model of checkpoint session-000001-step-000000006 (step 6, version 6)" in outcome.output
    exported, final = (load_file(path / "model.safetensors") for path in (tmp_path / "out", run_dir / "model"))
    assert exported.keys() == final.keys()
    assert all(torch.equal(exported[name], final[name]) for name in final)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(model.lm_head.weight, final["lm_head.weight"])


def test_an_earlier_checkpoint_in_another_dtype(tmp_path, run_dir):
    assert "step 4" in _export(run_dir, tmp_path / "out", step=4, dtype="bfloat16")
    exported, final = (load_file(path / "model.safetensors") for path in (tmp_path / "out", run_dir / "model"))
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}
    assert not torch.equal(exported["lm_head.weight"], final["lm_head.weight"].bfloat16())
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16


def test_what_is_there_is_replaced_only_by_force(tmp_path, run_dir):
    target = tmp_path / "out"
    target.mkdir()
    _export(run_dir, target)
    (target / "mine").write_text("keep")
    with pytest.raises(LauncherError, match="exists and is not empty"):
        _export(run_dir, target)
    assert (target / "mine").exists()
    _export(run_dir, target, force=True)
    assert not (target / "mine").exists()


def test_what_is_missing_or_damaged_is_named(tmp_path, run_dir):
    with pytest.raises(CheckpointError, match="no checkpoint of step 5; there are 6, 4"):
        _export(run_dir, tmp_path / "out", step=5)
    with pytest.raises(CheckpointError, match="no checkpoint; there are none at all"):
        _export(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(SettingsError, match="dtype 'int8' is none of float32"):
        _export(run_dir, tmp_path / "out", dtype="int8")
    newest = max((run_dir / "checkpoints").iterdir())
    with (newest / "model" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    with pytest.raises(CheckpointError, match=r"is damaged: model/model\.safetensors has .* name another step"):
        _export(run_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    _export(run_dir, tmp_path / "out", step=4)
