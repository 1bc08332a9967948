"""Fixtures and helpers of tests that run the whole learner on a real server; used as a pytest plugin."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from learner_samples import ScriptedActor, make_settings, write_model

from buffer.ledger import Ledger
from buffer.run import Buffer
from buffer.store import WeightStore
from learner.loop import run_learner
from protocol.records import StepRecord
from protocol.settings import Settings

PROBE_TOKENS = [[1, 2, 3, 4], [5, 6]]
STEPS = 6


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model directory."""
    return write_model(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture
def settings(model: Path) -> Settings:
    """A short run of small steps."""
    return make_settings(
        model, run={"steps": STEPS}, learner={"groups_per_step": 3, "checkpoint_every_steps": 2}, buffer={"max_lag": 2}
    )


@pytest.fixture
def learn(tmp_path: Path, model: Path, buffer: Buffer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs the learner in the calling thread."""
    monkeypatch.setattr("learner.feed.LEASE_SECONDS", 0.1)  # how long closing takes

    def run(settings: Settings, directory: str = "run") -> None:
        run_learner(
            settings,
            run_dir=tmp_path / directory,
            model_dir=model,
            buffer=buffer,
            store=WeightStore(str(tmp_path / directory / "weights")),
            probe_tokens=PROBE_TOKENS,
        )

    return run


@pytest.fixture
def actors(redis_url: str, run_name: str) -> Iterator[Callable[..., ScriptedActor]]:
    """Starts scripted actors, and stops them at the end."""
    started: list[ScriptedActor] = []

    def start(kind: type[ScriptedActor] = ScriptedActor) -> ScriptedActor:
        started.append(kind(redis_url, run_name, name=f"actor-{len(started)}"))
        started[-1].start()
        return started[-1]

    yield start
    for actor in started:
        actor.stop()


def changed(settings: Settings, **sections: dict[str, object]) -> Settings:
    """The settings with some values replaced."""
    tables = settings.model_dump()
    for name, values in sections.items():
        tables[name] |= values
    return Settings.model_validate(tables)


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Block until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.01)


def reached(buffer: Buffer, step: int) -> bool:
    """Whether the learner has done that many steps."""
    progress = buffer.control.progress()
    return progress is not None and progress.step >= step


def published(buffer: Buffer) -> bool:
    """Whether actors have a version to serve."""
    clock = buffer.clock.read()
    return clock is not None and clock.version >= 0


def records(run_dir: Path) -> list[StepRecord]:
    """Lines of metrics.jsonl."""
    return [StepRecord.model_validate_json(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def check_ledger(buffer: Buffer, trained: int) -> Ledger:
    """The ledger, which balances with that many tickets trained."""
    ledger = buffer.ledger()
    assert ledger.balanced, ledger.discrepancies
    assert ledger.states["trained"] == trained
    return ledger
