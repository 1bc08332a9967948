"""What is shown while a run goes on, with and without a terminal."""

import io
import os
import pty
import signal
import time
from pathlib import Path

import pytest

from buffer.run import Buffer
from deploy.interrupts import Interrupts
from deploy.live import Lines, clock, describe, figures, make_view, sparkline
from deploy.rundir import RunDirectory
from deploy.snapshot import Snapshot, Trend, take_snapshot
from protocol.errors import LauncherError, RunMismatchError
from protocol.records import ActorStatus
from tests.deploy_samples import make_record, make_settings


def status(tokens: int) -> ActorStatus:
    return ActorStatus(state="serving", pid=1, host="h", served_version=4, tokens_generated=tokens)


def snapshot(step: int, tokens: int = 0) -> Snapshot:
    return Snapshot("running", None, None, make_record(step), [("actor-0.1", 0.1, status(tokens))])


def test_trend_measures_speed_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    trend = Trend(100, [make_record(1, reward_mean=0.5)])
    assert trend.seconds_left is None
    for step in range(2, 12):
        trend.add(snapshot(step, tokens=step * 1000))
        now[0] += 2.0
    assert trend.tokens_per_second == pytest.approx(500, rel=0.2)
    assert trend.seconds_left == pytest.approx((100 - 11) * 2)
    assert trend.wait_share == pytest.approx(0.2)
    assert sorted(trend.rewards) == list(range(1, 12))


def test_a_snapshot_of_a_buffer_nobody_has_begun(buffer: Buffer) -> None:
    empty = take_snapshot(buffer)
    assert (empty.clock, empty.depth, empty.progress, empty.actors) == (None, None, None, [])
    assert figures(empty, Trend(10)) == []


def test_a_snapshot_shows_what_is_there(buffer: Buffer) -> None:
    buffer.begin_epoch(run_id="x", groups_per_version=4, max_lag=1, max_attempts=3, max_bytes=1 << 20)
    buffer.control.put_progress(make_record(5))
    buffer.actors.heartbeat("actor-0.1", status(7))
    full = take_snapshot(buffer)
    trend = Trend(10)
    trend.add(full)
    text = str(figures(full, trend)) + describe(make_settings(), full, trend)
    for word in ("0.", "ESS", "kernel mass", "log W", "1 serving v4", "groups waiting", "step 5/"):
        assert word in text


def test_sparklines() -> None:
    assert sparkline([]) == ""
    assert sparkline([0.0, 1.0]) == "▁█"
    assert len(set(sparkline([0.5, 0.5, 0.5]))) == 1
    assert len(sparkline([float(i) for i in range(1000)])) == 32


def test_durations() -> None:
    assert (clock(5.9), clock(65), clock(3725)) == ("0:05", "1:05", "1:02:05")


def test_without_a_terminal_there_are_plain_lines() -> None:
    stream = io.StringIO()
    view = make_view(make_settings(), stream)
    assert isinstance(view, Lines)
    trend = Trend(10)
    view.update("starting engines", None, trend)
    view.update("starting engines", None, trend)
    view.update("", snapshot(3), trend)
    view.note("actor-0 [ended]")
    view.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 3
    assert "starting engines" in lines[0]
    assert "step 3/" in lines[1]
    assert "[ended]" in lines[2]
    assert all(line.isprintable() for line in lines)


def test_a_terminal_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    leader, follower = pty.openpty()
    monkeypatch.setenv("TERM", "xterm")
    stream = io.TextIOWrapper(os.fdopen(follower, "wb", buffering=0), write_through=True)
    view = make_view(make_settings(), stream)
    assert not isinstance(view, Lines)
    trend = Trend(10)
    view.update("starting engines", None, trend)
    view.note("actor-0 [red]ended[/red]")
    view.update("", snapshot(3), trend)
    view.close()
    os.set_blocking(leader, False)
    shown = os.fdopen(leader, "rb").read().decode()  # all of it: one read gives what the terminal has in one piece
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor is hidden and shown again
    assert "[red]ended[/red]" in shown


def test_the_first_signal_asks_and_the_second_interrupts() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with Interrupts() as interrupts:
        assert not interrupts.requested.is_set()
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.requested.wait(1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_run_directory_keeps_its_identity(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run")
    first = directory.create("a")
    assert directory.create("a") == first
    with pytest.raises(RunMismatchError, match=r"'a'.*'b'"):
        directory.create("b")
    directory.identity.write_text("{")
    with pytest.raises(LauncherError, match=r"run\.json"):
        directory.read()


def test_a_run_directory_is_held_by_one_process(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.create("a")
    with directory.lock(), pytest.raises(LauncherError, match=str(os.getpid())), RunDirectory(tmp_path).lock():
        pass
    with directory.lock():
        pass


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LauncherError, match="cannot be written"):
        RunDirectory(tmp_path / "file" / "run").create("a")


def test_sessions_are_kept_even_when_they_fail(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.create("a")
    with pytest.raises(ZeroDivisionError), directory.session() as history:
        history.restarts["actor-0"] = 1
        raise ZeroDivisionError
    kept = directory.read_history()
    assert kept.restarts == {"actor-0": 1}
    assert kept.sessions[0].ended_at is not None
