"""The weights bench without an engine: what a delta saves, what is measured, and what is left out where vLLM is not."""

from pathlib import Path

import numpy as np
import pytest

from deploy.bench import weights, weights_actor
from deploy.bench.weights_learner import LEARNING_RATE, Trajectory
from protocol.errors import EngineError


def test_updates_move_few_of_the_published_bits_and_every_master_weight(tmp_path: Path) -> None:
    trajectory = Trajectory(weights.QUICK_SIZE, tmp_path)
    masters = [parameter.detach().clone() for parameter in trajectory._model.parameters()]
    before = trajectory.tensors()
    trajectory.update()
    after = trajectory.tensors()
    pairs = list(zip(before, after, strict=True))
    changed = [np.frombuffer(a.data, np.uint16) != np.frombuffer(b.data, np.uint16) for a, b in pairs]
    assert 0 < np.concatenate(changed).mean() < 0.1
    for parameter, master in zip(trajectory._model.parameters(), masters, strict=True):
        assert 0 < (parameter.detach() - master).abs().max() < 3 * LEARNING_RATE


def test_without_an_engine_everything_but_the_pause_is_measured(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class InThisProcess:
        """Runs what is submitted at once, on a machine where vLLM does not start."""

        def __init__(self, *_: object, **__: object) -> None: ...

        def __enter__(self) -> "InThisProcess":
            return self

        def __exit__(self, *_: object) -> None: ...

        def submit(self, call, *arguments, engine: bool = False):  # type: ignore[no-untyped-def]
            if engine:
                return Answer(error=EngineError("no such engine"))
            options = {"engine": False} if call is weights_actor.begin else {}
            return Answer(call(*arguments, **options))

    class Answer:
        def __init__(self, value: object = None, error: Exception | None = None) -> None:
            self.value, self.error = value, error

        def result(self) -> object:
            if self.error is not None:
                raise self.error
            return self.value

    monkeypatch.setattr(weights, "ProcessPoolExecutor", InThisProcess)
    (figures,) = list(weights.rounds(quick=True))
    assert "no pause is measured: no such engine" in capfd.readouterr().err
    assert figures["delta_over_full"].value == pytest.approx(figures["delta_bytes"].value / figures["full_bytes"].value)
    assert figures["delta_over_full"].value < 0.1
    for leg in ("publish_full", "publish_delta", "fetch_full", "fetch_delta", "apply_delta", "copy"):
        assert figures[f"{leg}_seconds"].value > 0
    assert not {"pause_seconds", "own_load_seconds", "pause_over_own_load"} & figures.keys()


def test_targets_are_of_figures_that_are_measured() -> None:
    manifest = weights.Manifest.model_construct(payload_bytes=10)
    legs = weights.Legs(1.0, 1.0, 1.0, pause_seconds=3.0, own_load_seconds=2.0)
    figures = weights._figures(weights._Published(manifest, manifest, 1.0, 1.0), legs, 1.0)
    assert {target.figure for target in weights.TARGETS} <= figures.keys()
    assert figures["pause_over_own_load"].value == 1.5
