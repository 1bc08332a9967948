"""The whole loop for real: Ray, vLLM, DeepSpeed and the embedded server, started, killed, drained and resumed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from buffer.connection import connect
from buffer.embedded import EmbeddedServer
from buffer.run import Buffer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(420)]

RECIPE = "deploy/recipes/arithmetic.toml"
GROUPS_PER_STEP = 32


class Run:
    """One run directory, and the commands started on it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.log = directory.parent / "log"
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str) -> "subprocess.Popen[bytes]":
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "deploy", *arguments, "--run-dir", str(self.directory)],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def finish(self, process: "subprocess.Popen[bytes]", timeout_seconds: float = 240) -> None:
        try:
            code = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {timeout_seconds} s:\n{self.tail()}")
        assert code == 0, self.tail()

    def tail(self) -> str:
        logs = [self.log, *sorted((self.directory / "logs").glob("*.log"))]
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-2500:]}" for path in logs)

    @property
    def steps(self) -> list[dict[str, Any]]:
        try:
            text = (self.directory / "metrics.jsonl").read_text()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.directory / "summary.json").read_text())

    def wait_for_step(self, step: int, process: "subprocess.Popen[bytes]", timeout_seconds: float = 180) -> None:
        deadline = time.monotonic() + timeout_seconds
        while not (self.steps and self.steps[-1]["step"] >= step):
            assert process.poll() is None, self.tail()
            assert time.monotonic() < deadline, self.tail()
            time.sleep(0.1)

    def buffer(self) -> Buffer:
        url = EmbeddedServer.find(self.directory / "buffer")
        assert url is not None
        return Buffer(connect(url), "arithmetic")

    def kill_everything(self) -> None:
        """SIGKILL of every process that was started here, the server included."""
        processes = [psutil.Process(p.pid) for p in self._started if p.poll() is None]
        victims = [child for process in processes for child in process.children(recursive=True)] + processes
        state = self.directory / "buffer" / "redis.json"
        if state.exists() and psutil.pid_exists(pid := json.loads(state.read_text())["pid"]):
            victims.append(psutil.Process(pid))
        for victim in victims:
            try:
                victim.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(victims, timeout=20)
        for process in self._started:
            process.wait()
        self._started.clear()


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path / "run")
    yield run
    run.kill_everything()


def check_exactly_once(run: Run, steps: int) -> None:
    assert [record["step"] for record in run.steps] == list(range(1, steps + 1))
    summary = run.summary
    assert summary["complete"]
    assert summary["groups_trained"] == steps * GROUPS_PER_STEP
    assert summary["ledger"]["trained"] == steps * GROUPS_PER_STEP
    assert summary["ledger_balanced"]
    assert summary["lag"]["max"] <= 4


def test_a_run_learns_although_its_actor_is_killed(run: Run) -> None:
    process = run.start("run", RECIPE)
    run.wait_for_step(20, process)
    [(_, _, actor)] = run.buffer().actors.list(60)
    os.kill(actor.pid, signal.SIGKILL)
    run.finish(process)
    check_exactly_once(run, 100)
    summary = run.summary
    assert summary["reward_first"] <= 0.5
    assert summary["reward_last"] >= 0.85
    assert summary["lag"]["mean"] > 0
    assert summary["parity_max"] < 1e-4
    assert summary["restarts"] == {"actor-0": 1}
    assert (run.directory / "model" / "config.json").exists()
    assert "<svg" in (run.directory / "report.html").read_text()


def test_adapters_learn_and_only_they_are_published(run: Run) -> None:
    process = run.start("run", RECIPE, "run.steps=30", "model.lora.rank=8", "learner.learning_rate=4e-3")
    run.finish(process)
    check_exactly_once(run, 30)
    summary = run.summary
    assert summary["reward_last"] >= summary["reward_first"] + 0.2
    assert summary["parity_max"] < 1e-4
    sizes = {path.name: path.stat().st_size for path in (run.directory / "weights").glob("v*")}
    full = [name for name in sizes if name.endswith(".safetensors")]
    assert full == ["v00000000-e1.safetensors"]
    assert len(sizes) > 4
    assert max(size for name, size in sizes.items() if name not in full) < sizes[full[0]] / 5
    assert (run.directory / "model" / "model.safetensors").stat().st_size < sizes[full[0]]  # merged


def test_killed_altogether_it_resumes_and_trains_every_group_once(run: Run) -> None:
    process = run.start("run", RECIPE, "run.steps=60")
    run.wait_for_step(28, process)
    run.kill_everything()
    run.finish(run.start("run", RECIPE, "run.steps=60"))
    check_exactly_once(run, 60)
    assert run.summary["sessions"] == 2
    started = time.monotonic()
    run.finish(run.start("run", RECIPE, "run.steps=60"))
    assert time.monotonic() - started < 10


def test_drained_by_ctrl_c_it_goes_on_by_hand_with_two_actors(run: Run) -> None:
    process = run.start("run", RECIPE, "run.steps=60", "buffer.max_lag=1")
    run.wait_for_step(10, process)
    process.send_signal(signal.SIGINT)
    run.finish(process, 120)
    drained = run.summary
    assert not drained["complete"]
    assert drained["ledger"]["generating"] == 0
    assert drained["ledger_balanced"]
    assert 10 <= drained["steps"] < 60

    server = EmbeddedServer.start(run.directory / "buffer")
    by_hand = (RECIPE, "run.steps=60", "buffer.max_lag=1")
    learner = run.start("learner", *by_hand)
    actors = [run.start("actor", *by_hand, "--name", f"hand-{number}") for number in range(2)]
    run.finish(learner)
    for actor in actors:
        run.finish(actor, 60)
    server.stop()
    check_exactly_once(run, 60)
    assert run.summary["lag"]["max"] <= 1


@pytest.fixture
def in_vain() -> Callable[..., tuple[float, str]]:
    def attempt(*arguments: str) -> tuple[float, str]:
        started = time.monotonic()
        result = subprocess.run(
            [sys.executable, "-m", "deploy", *arguments], capture_output=True, text=True, timeout=60
        )
        assert result.returncode != 0
        assert "Traceback" not in result.stderr
        return time.monotonic() - started, result.stderr

    return attempt


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("learner.lerning_rate=1", ["learner.lerning_rate", "learner.learning_rate"]),
        ("actors.top_p=0.9", ["actors.top_p", "task.top_p"]),
        ("task.top_p=0.9", ["top_p", "importance weight"]),
        ("task.group_size=1", ["task.group_size", "2"]),
        ("objective.k_pos=0.5", ["objective.k_pos", "1"]),
        ("model.path=/no/such/model", ["/no/such/model"]),
        ("buffer.url=redis://127.0.0.1:1/0", ["127.0.0.1:1"]),
    ],
)
def test_wrong_input_fails_at_once_and_says_what_and_where(
    in_vain: Callable[..., tuple[float, str]], tmp_path: Path, override: str, words: list[str]
) -> None:
    seconds, message = in_vain("run", RECIPE, "--run-dir", str(tmp_path / "run"), override)
    assert all(word in message for word in words), message
    assert seconds < 2
