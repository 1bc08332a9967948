"""Builds the toy model once per run directory; a marker written last tells a finished directory from a torn one."""

import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from actors.tasks import load_task
from deploy.toy.model import make_model, make_tokenizer
from deploy.toy.warm_start import AnsweredTask, warm_start
from protocol.errors import SettingsError
from protocol.settings import Settings, ToySettings

MARKER = "toy.json"
MIN_POSITIONS = 512
BUILDER_VERSION = 1  # part of the cache key: raise it when the same settings give another model

log = logging.getLogger(__name__)


def ensure_toy(settings: Settings, directory: Path) -> Path:
    """Build and warm-start the model of `settings.model.toy` unless `directory` holds just that model.

    The result depends on the settings alone (`run.seed` included), not on the caller's random state.

    Returns:
        `directory`, a Hugging Face model directory with float32 weights and a tokenizer.

    Raises:
        SettingsError: the warm start needs a task with an `answer(index)` method, or did not reach its accuracy.
    """
    toy = settings.model.toy
    if toy is None:
        raise ValueError("the settings have no [model.toy]")
    recipe = _recipe(settings)
    marker = directory / MARKER
    if marker.exists() and json.loads(marker.read_text())["recipe"] == recipe:
        return directory
    building = directory.with_name(f"{directory.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    outcome = _build(settings, toy, recipe["positions"], building)
    (building / MARKER).write_text(json.dumps({"recipe": recipe, **outcome}, indent=2))
    shutil.rmtree(directory, ignore_errors=True)
    building.rename(directory)
    return directory


def _recipe(settings: Settings) -> dict[str, Any]:
    """Everything the model depends on."""
    return {
        "builder": BUILDER_VERSION,
        "seed": settings.run.seed,
        "positions": max(MIN_POSITIONS, settings.task.max_prompt_tokens + settings.task.max_completion_tokens),
        "toy": settings.model.model_dump(mode="json")["toy"],
        "task": settings.task.model_dump(mode="json", include={"name", "options", "temperature"}),
    }


def _build(settings: Settings, toy: ToySettings, positions: int, directory: Path) -> dict[str, float]:
    started = time.monotonic()
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.learner.cpu_threads)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.run.seed)
            tokenizer = make_tokenizer()
            model = make_model(toy, tokenizer, positions)
            accuracy = _warm_start(settings, toy, model, tokenizer) if toy.warm_start_accuracy > 0 else 0.0
    finally:
        torch.set_num_threads(threads)
    model.eval()
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    log.info("toy model of %d parameters built, sampled accuracy %.3f", model.num_parameters(), accuracy)
    return {
        "num_parameters": model.num_parameters(),
        "accuracy": accuracy,
        "seconds": time.monotonic() - started,
    }


def _warm_start(
    settings: Settings, toy: ToySettings, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> float:
    task = load_task(settings.task.name, settings.task.options)
    if not isinstance(task, AnsweredTask):
        raise SettingsError(
            f"task {settings.task.name!r} has no answer(index), which the warm start of [model.toy] learns from; set "
            "model.toy.warm_start_accuracy = 0 or give model.path"
        )
    outcome = warm_start(
        model,
        tokenizer,
        task,
        accuracy=toy.warm_start_accuracy,
        temperature=settings.task.temperature,
        seed=settings.run.seed,
    )
    return outcome.accuracy
