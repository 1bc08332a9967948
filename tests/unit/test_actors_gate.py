"""The parity gate: what may be served, what is held back, and when an engine is replaced or given up."""

import math

import pytest

from actors.engine.base import Scored
from actors.engine.scripted import ScriptedEngine
from actors.weights.follower import StagedVersion
from actors.weights.gate import Verdict, VersionGate
from protocol.errors import EngineError, ParityError
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


def gate_on(*faults: dict[int, float | EngineError], drains: bool = False) -> VersionGate:
    """A gate whose engines, one after the other, fail as told; there is no engine after the last."""
    engines = iter([ScriptedEngine(lambda prompt, number: [1] * 5, each) for each in faults or ({},)])
    return VersionGate(lambda: next(engines), 1e-4, drains=drains)


def settle(gate: VersionGate) -> list[Verdict]:
    return [gate.answer(result) for result in gate.engine.step() if isinstance(result, Scored)]


def test_a_version_is_served_after_its_whole_probe() -> None:
    gate = gate_on()
    gate.offer(staged(0))
    assert gate.update(idle=True)
    assert gate.verifying
    assert gate.served_version == -1
    assert gate.served_seconds == 0
    assert settle(gate) == [Verdict.PENDING, Verdict.VERIFIED]
    assert gate.served_version == 0
    assert 0 < gate.served_seconds < 10
    assert not gate.verifying


def test_the_newest_offer_wins_and_waits_for_the_verdict() -> None:
    gate = gate_on()
    gate.offer(staged(0))
    gate.update(idle=True)
    gate.offer(staged(1))
    gate.offer(staged(4))
    gate.update(idle=True)
    assert gate.engine.version == 0
    settle(gate)
    gate.update(idle=True)
    assert gate.engine.version == 4
    gate.offer(staged(2))
    settle(gate)
    gate.update(idle=True)
    assert gate.served_version == 4


@pytest.mark.parametrize("error", [2e-4, -2e-4, math.nan, math.inf])
def test_a_violation_quarantines_and_the_version_is_loaded_again(error: float) -> None:
    gate = gate_on({0: error})
    engine = gate.engine
    gate.offer(staged(3))
    gate.update(idle=True)
    assert settle(gate) == [Verdict.VIOLATED, Verdict.PENDING]
    assert gate.quarantined
    assert not gate.engine_lost
    assert not gate.verifying
    assert gate.served_version == -1
    gate.update(idle=True)
    assert settle(gate)[-1] is Verdict.VERIFIED
    assert not gate.quarantined
    assert gate.engine is engine
    assert (gate.violations, gate.reloads, gate.rebuilds) == (1, 1, 0)
    assert gate.parity_max <= 1e-4


def test_a_second_violation_leads_to_a_fresh_engine() -> None:
    gate = gate_on({0: 0.1, 1: 0.1}, {})
    lost = gate.engine
    gate.offer(staged(3))
    for _ in range(2):
        gate.update(idle=True)
        assert Verdict.VIOLATED in settle(gate)
    assert gate.engine_lost
    assert gate.update(idle=True)
    assert gate.engine is not lost
    with pytest.raises(EngineError, match="closed"):
        lost.step()
    assert settle(gate)[-1] is Verdict.VERIFIED
    assert gate.served_version == 3
    assert (gate.violations, gate.reloads, gate.rebuilds) == (2, 1, 1)


def test_a_fresh_engine_that_violates_too_ends_it() -> None:
    always = {0: 0.1, 1: 0.1}
    gate = gate_on(always, always)
    gate.offer(staged(3))
    for _ in range(2):
        gate.update(idle=True)
        settle(gate)
    gate.update(idle=True)
    with pytest.raises(ParityError, match=r"version 3 differs .* 0\.1 .* in a fresh engine too"):
        settle(gate)
    assert gate.served_version == -1


def test_a_verified_version_makes_every_remedy_available_again() -> None:
    gate = gate_on({1: 0.1, 2: 0.1}, {1: 0.1, 2: 0.1}, {})
    for version in range(3):
        gate.offer(staged(version))
        while gate.served_version < version:
            assert gate.update(idle=True)
            settle(gate)
    assert (gate.violations, gate.reloads, gate.rebuilds) == (4, 2, 2)


def test_an_error_during_an_update_leads_to_a_fresh_engine_with_the_newest_version() -> None:
    gate = gate_on({1: EngineError("half loaded")}, {})
    gate.offer(staged(0))
    gate.update(idle=True)
    settle(gate)
    gate.offer(staged(1))
    assert not gate.update(idle=False)
    assert gate.quarantined
    assert gate.engine_lost
    assert "half loaded" in gate.error
    gate.offer(staged(2))
    assert gate.update(idle=False)
    assert settle(gate)[-1] is Verdict.VERIFIED
    assert gate.served_version == 2
    assert (gate.violations, gate.reloads, gate.rebuilds) == (0, 0, 1)


def test_an_error_in_a_fresh_engine_ends_it() -> None:
    gate = gate_on({0: EngineError("half loaded")}, {0: EngineError("again")})
    gate.offer(staged(0))
    assert not gate.update(idle=True)
    with pytest.raises(EngineError, match="again, in a fresh engine too"):
        gate.update(idle=True)


def test_draining_waits_until_nothing_is_in_generation() -> None:
    gate = gate_on(drains=True)
    assert not gate.draining
    gate.offer(staged(0))
    assert gate.draining
    gate.update(idle=False)
    assert gate.draining
    assert gate.engine.version == -1
    gate.update(idle=True)
    assert not gate.draining
    assert gate.engine.version == 0


def test_a_failed_update_leaves_nothing_draining() -> None:
    gate = gate_on({0: EngineError("half loaded")}, {}, drains=True)
    gate.offer(staged(0))
    assert not gate.update(idle=True)
    assert gate.update(idle=True)
    settle(gate)
    assert not gate.draining
    assert gate.served_version == 0
