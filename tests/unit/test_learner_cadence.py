"""Which versions are published, and that leaving some out neither breaks the bound on lag nor starves anybody."""

import time

import pytest

from learner.cadence import Cadence
from protocol.clock import ClockState, admission_limit


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(time, "monotonic", fake)
    return fake


def published(cadence: Cadence, clock: Clock, num_versions: int, seconds_each: float, first: int = 0) -> list[int]:
    due = []
    for version in range(first, first + num_versions):
        if cadence.due(version):
            due.append(version)
        clock.now += seconds_each
    return due


def test_without_seconds_every_version_is_published(clock: Clock) -> None:
    assert published(Cadence(seconds=0, max_lag=4), clock, 5, 0.0) == [0, 1, 2, 3, 4]


def test_versions_that_come_too_soon_are_left_out(clock: Clock) -> None:
    assert published(Cadence(seconds=10, max_lag=4), clock, 10, 5.0) == [0, 2, 4, 6, 8]


def test_no_more_than_max_lag_versions_pass_without_one(clock: Clock) -> None:
    assert published(Cadence(seconds=3600, max_lag=4), clock, 10, 1.0) == [0, 4, 8]


@pytest.mark.parametrize("max_lag", [0, 1])
def test_little_lag_leaves_nothing_out(clock: Clock, max_lag: int) -> None:
    assert published(Cadence(seconds=3600, max_lag=max_lag), clock, 4, 1.0) == [0, 1, 2, 3]


def test_a_resumed_session_publishes_its_first_version(clock: Clock) -> None:
    assert published(Cadence(seconds=3600, max_lag=4), clock, 3, 1.0, first=17) == [17]


@pytest.mark.parametrize("max_lag", range(6))
@pytest.mark.parametrize("updates_per_publish", [1, 3])
def test_admission_always_lets_the_next_update_be_filled(clock: Clock, max_lag: int, updates_per_publish: int) -> None:
    """With actors that have caught up, the groups of one more update are admissible whatever the seconds."""
    groups_per_step, base, base_version = 4, 20, 3
    groups_per_version = groups_per_step * updates_per_publish
    cadence = Cadence(seconds=3600, max_lag=max_lag)
    served = version = base_version
    assert cadence.due(version)
    for update in range(1, 40):
        state = ClockState(served, 0, 1, groups_per_version, max_lag, base, base_version)
        limit = admission_limit(state, served)
        assert base + update * groups_per_step <= limit
        # The last group admitted under `served` is trained at version (limit - 1 - base) // groups_per_version later.
        assert base_version + (limit - 1 - base) // groups_per_version - served <= max_lag
        if update % updates_per_publish == 0:
            version += 1
            if cadence.due(version):
                served = version
