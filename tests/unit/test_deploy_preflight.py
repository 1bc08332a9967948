"""What is found before anything is started: models, tasks, servers, stores."""

import json
from pathlib import Path

import pytest

from buffer.connection import connect
from buffer.embedded import EmbeddedServer
from buffer.safetensors_format import encode_header
from deploy.connect import placed
from deploy.preflight import check_model, check_objective, check_task, preflight
from deploy.rundir import RunDirectory
from protocol.errors import SettingsError, WeightStoreError
from protocol.settings import Settings
from tests.deploy_samples import make_settings

CONFIG = {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "default"}}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "tokenizer.json").write_text("{}")
    (path / "model.safetensors").write_bytes(b"")
    return path


def settings(model: Path, tokens: int = 16) -> Settings:
    task = {"max_prompt_tokens": tokens, "max_completion_tokens": tokens}
    return Settings.model_validate({"model": {"path": str(model)}, "task": task})


def test_a_complete_model_directory_passes(model: Path) -> None:
    check_model(model, settings(model))


@pytest.mark.parametrize(
    ("missing", "fragment"),
    [("config.json", "no config.json"), ("tokenizer.json", "no tokenizer"), ("model.safetensors", "no weights")],
)
def test_an_incomplete_model_directory_is_named_with_what_it_lacks(model: Path, missing: str, fragment: str) -> None:
    (model / missing).unlink()
    with pytest.raises(SettingsError, match=fragment) as caught:
        check_model(model, settings(model))
    assert str(model) in str(caught.value)


def test_every_shard_of_the_index_must_be_there(model: Path) -> None:
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    (model / "model-1.safetensors").write_bytes(b"")
    with pytest.raises(SettingsError, match="lacks 1 of 2 weight files, first model-2"):
        check_model(model, settings(model))


def test_a_model_that_is_too_short_for_the_task(model: Path) -> None:
    with pytest.raises(SettingsError, match=r"= 66, .* 64 positions"):
        check_model(model, settings(model, tokens=33))
    (model / "config.json").write_text(json.dumps({**CONFIG, "rope_parameters": {"rope_type": "yarn"}}))
    check_model(model, settings(model, tokens=33))


def test_a_damaged_configuration_is_named(model: Path) -> None:
    (model / "config.json").write_text("{")
    with pytest.raises(SettingsError, match=r"config\.json cannot be read"):
        check_model(model, settings(model))


def test_the_reference_is_a_model_too_and_a_path_in_every_process(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.create("run")
    monkeypatch.chdir(tmp_path)
    task = {"max_prompt_tokens": 16, "max_completion_tokens": 16}
    sections = {"model": {"reference": "model", "toy": {}}, "objective": {"kl_coefficient": 0.1}, "task": task}
    settings = make_settings(**sections)
    assert preflight(settings, directory) == []
    assert placed(settings, directory, "").model.reference == str(model)
    (model / "model.safetensors").unlink()
    with pytest.raises(SettingsError, match=r"model\.reference = .* has no weights"):
        preflight(settings, directory)


@pytest.mark.parametrize("name", ["arithmetic", "actors.tasks.arithmetic:Arithmetic"])
def test_tasks_that_exist(name: str) -> None:
    check_task(make_settings(task={"name": name}))


@pytest.mark.parametrize("name", ["sums", "actors.tasks.none:X", "no.such:X", ":X", "actors.tasks:", "json.x:Y"])
def test_tasks_that_do_not(name: str) -> None:
    with pytest.raises(SettingsError, match=r"task\.name"):
        check_task(make_settings(task={"name": name}))


@pytest.mark.parametrize("name", ["grpo", "learner.objectives.tis:tis"])
def test_objectives_that_exist(name: str) -> None:
    check_objective(make_settings(objective={"name": name}))


@pytest.mark.parametrize("name", ["no.such:f", "json.x:f"])
def test_objectives_that_do_not(name: str) -> None:
    with pytest.raises(SettingsError, match=r"objective\.name.*there is no module"):
        check_objective(make_settings(objective={"name": name}))


def test_a_toy_on_an_embedded_server_passes(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.create("run")
    assert preflight(make_settings(), directory) == []


def test_an_external_server_without_a_file_is_warned_about(tmp_path: Path, server_directory: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    directory.create("run")
    url = EmbeddedServer.start(server_directory).url
    connect(url).config_set("appendonly", "no")
    (warning,) = preflight(make_settings(buffer={"url": url}), directory)
    assert "append-only" in warning


def test_a_store_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.create("run")
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightStoreError, match="file/weights"):
        preflight(make_settings(weights={"store": str(tmp_path / "file" / "weights")}), directory)


def test_a_model_too_large_for_the_server_is_refused_by_name(model: Path) -> None:
    num_elements = 80 << 20  # 160 MiB in bfloat16; the file's tail may be a hole
    with (model / "model.safetensors").open("wb") as file:
        file.write(encode_header([("w", "F32", (num_elements,), 4 * num_elements)], {}))
        file.truncate(file.tell() + 4 * num_elements)
    small = settings(model)
    directory = RunDirectory(model.parent / "run")
    directory.create("run")
    large = small.model_copy(update={"weights": small.weights.model_copy(update={"store": "redis"})})
    with pytest.raises(SettingsError, match=r"at most 128 MiB, .*model' has 160 MiB in bfloat16"):
        preflight(large, directory)
    assert placed(large, directory, "").weights.store == "redis"
    assert preflight(large, directory, learner=False) == []
