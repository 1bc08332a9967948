"""The parity gate: what may be served, what is held back, and when an engine is given up."""

import math

import pytest

from actors.engine.base import Scored
from actors.engine.scripted import ScriptedEngine
from actors.weights.follower import StagedVersion
from actors.weights.gate import Verdict, VersionGate
from protocol.errors import ParityError
from protocol.manifest import Manifest, Probe, TensorEntry

PROBE = Probe(tokens=((1, 2, 3), (4, 5)), logprobs=((-1.0, -2.0), (-0.5,)))


def staged(version: int) -> StagedVersion:
    entry = TensorEntry(name="w", dtype="F32", shape=(1,), xxh3="0" * 16)
    manifest = Manifest(
        version=version,
        step=version,
        epoch=1,
        kind="full",
        payload="p.safetensors",
        payload_bytes=64,
        tensors=(entry,),
        probe=PROBE,
    )
    return StagedVersion(manifest, [])


def settle(gate: VersionGate, engine: ScriptedEngine) -> list[Verdict]:
    return [gate.answer(result) for result in engine.step() if isinstance(result, Scored)]


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine(lambda prompt, number: [1])


def test_a_version_is_served_after_its_whole_probe(engine: ScriptedEngine) -> None:
    gate = VersionGate(engine, 1e-4)
    gate.offer(staged(0))
    gate.load_offered()
    assert gate.verifying
    assert gate.served_version == -1
    assert settle(gate, engine) == [Verdict.PENDING, Verdict.VERIFIED]
    assert gate.served_version == 0
    assert not gate.verifying


def test_the_newest_offer_wins_and_waits_for_the_verdict(engine: ScriptedEngine) -> None:
    gate = VersionGate(engine, 1e-4)
    gate.offer(staged(0))
    gate.load_offered()
    gate.offer(staged(1))
    gate.offer(staged(4))
    gate.load_offered()
    assert engine.version == 0
    settle(gate, engine)
    gate.load_offered()
    assert engine.version == 4
    gate.offer(staged(2))
    settle(gate, engine)
    gate.load_offered()
    assert gate.served_version == 4


@pytest.mark.parametrize("error", [2e-4, -2e-4, math.nan, math.inf])
def test_a_violation_quarantines_and_one_reload_is_tried(engine: ScriptedEngine, error: float) -> None:
    gate = VersionGate(engine, 1e-4)
    gate.offer(staged(3))
    engine.probe_error = error
    gate.load_offered()
    assert Verdict.VIOLATED in [gate.answer(r) for r in engine.step()[:1] if isinstance(r, Scored)]
    assert gate.quarantined
    assert gate.served_version == -1
    engine.probe_error = 0.0
    gate.load_offered()
    assert settle(gate, engine)[-1] is Verdict.VERIFIED
    assert not gate.quarantined
    assert gate.parity_max <= 1e-4


def test_a_second_violation_gives_the_engine_up(engine: ScriptedEngine) -> None:
    gate = VersionGate(engine, 1e-4)
    engine.probe_error = 0.1
    gate.offer(staged(3))
    gate.load_offered()
    first = next(r for r in engine.step() if isinstance(r, Scored))
    assert gate.answer(first) is Verdict.VIOLATED
    gate.load_offered()
    with pytest.raises(ParityError, match=r"version 3 differs .* 0\.1 .* after a full reload"):
        settle(gate, engine)
