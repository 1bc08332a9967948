"""A learner of two processes, started as torchrun starts them: it trains, checkpoints, and resumes after what dies."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from learner_runs import check_ledger, reached, records, wait_until
from safetensors.torch import load_file

from deploy.export import export_model
from deploy.rundir import RunDirectory

pytest_plugins = ["learner_runs"]

RECIPE = """
[run]
name = "{name}"
steps = {steps}
[model]
dtype = "float32"
device = "cpu"
[model.toy]
hidden_size = 32
num_layers = 1
warm_start_accuracy = 0
[task]
max_prompt_tokens = 32
max_completion_tokens = 16
[learner]
precision = "float32"
learning_rate = 1e-3
groups_per_step = 3
checkpoint_every_steps = 2
zero_stage = {stage}
[buffer]
url = "{url}"
max_lag = 2
hard_max_lag = 1000
"""
ENDLESS = 100_000


class Crew:
    """The processes of one learner."""

    def __init__(self, directory: Path, recipe: str) -> None:
        self.directory = directory
        self.run_dir = directory / "run"
        (directory / "recipe.toml").write_text(recipe)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.ranks = [self._start(rank, port) for rank in range(2)]

    def _start(self, rank: int, port: int) -> subprocess.Popen[bytes]:
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        command = [sys.executable, "-m", "deploy", "learner", "recipe.toml", "--run-dir", str(self.run_dir)]
        with (self.directory / f"rank-{rank}.log").open("ab") as output:
            return subprocess.Popen(command, env=environment, cwd=self.directory, stdout=output, stderr=output)

    def wait(self, seconds: float) -> list[int]:
        """Exit codes of all ranks."""
        deadline = time.monotonic() + seconds
        return [rank.wait(max(0.1, deadline - time.monotonic())) for rank in self.ranks]

    def log(self, rank: int) -> str:
        return (self.directory / f"rank-{rank}.log").read_text()

    def kill(self) -> None:
        for rank in self.ranks:
            rank.kill()
            rank.wait()


@pytest.fixture
def crew(tmp_path, redis_url, run_name):
    """Starts learners of two ranks, and leaves none behind."""
    started = []

    def start(*, steps, stage):
        recipe = RECIPE.format(name=run_name, steps=steps, stage=stage, url=redis_url)
        started.append(Crew(tmp_path, recipe))
        return started[-1]

    yield start
    for each in started:
        each.kill()


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_train_a_whole_run(crew, buffer, actors, stage):
    actors()
    learner = crew(steps=6, stage=stage)
    assert learner.wait(240) == [0, 0], learner.log(0) + learner.log(1)
    steps = records(learner.run_dir)
    assert [record.step for record in steps] == list(range(1, 7))
    assert all(record.num_groups == 3 and record.grad_norm > 0 for record in steps)
    check_ledger(buffer, 18)
    newest = max((learner.run_dir / "checkpoints").iterdir())
    files = json.loads((newest / "checkpoint.json").read_text())["files"]
    assert {f"state/random_rank_0000{rank}.pt" for rank in range(2)} < files.keys()
    assert sum("optim_states" in name for name in files) == 2
    export_model(learner.run_dir, learner.directory / "out", step=None, dtype=None, force=False)
    exported, final = (
        load_file(path / "model.safetensors") for path in (learner.directory / "out", learner.run_dir / "model")
    )
    assert exported.keys() == final.keys()
    assert all(torch.equal(exported[name], final[name]) for name in final)
    assert RunDirectory(learner.run_dir).summary.exists()


@pytest.mark.parametrize(("stage", "victim"), [(2, 1), (3, 0), (3, 1)])
def test_when_a_rank_is_killed_all_end_and_the_next_start_resumes(crew, buffer, actors, stage, victim):
    actors()
    learner = crew(steps=ENDLESS, stage=stage)
    wait_until(lambda: reached(buffer, 5), 240)
    learner.ranks[victim].send_signal(signal.SIGKILL)
    killed_at = time.monotonic()
    codes = learner.wait(60)
    assert time.monotonic() - killed_at < 30
    assert codes[victim] == -signal.SIGKILL
    assert codes[1 - victim] == 1, learner.log(1 - victim)
    assert "another rank of the learner is gone" in learner.log(1 - victim)
    ledger = buffer.ledger()
    assert ledger.balanced
    done = ledger.states["trained"] // 3
    assert done >= 2
    learner = crew(steps=done + 30, stage=stage)
    assert learner.wait(240) == [0, 0], learner.log(0) + learner.log(1)
    assert "resumed at step" in learner.log(0)
    assert [record.step for record in records(learner.run_dir)] == list(range(1, done + 31))
    check_ledger(buffer, 3 * (done + 30))


def test_an_error_on_rank_0_ends_the_others_by_name(crew, buffer, actors):
    actors()
    learner = crew(steps=ENDLESS, stage=2)
    wait_until(lambda: reached(buffer, 3), 240)
    buffer.begin_epoch(
        run_id=json.loads((learner.run_dir / "run.json").read_text())["run_id"],
        groups_per_version=3,
        max_lag=2,
        max_attempts=3,
        max_bytes=1 << 20,
    )
    assert learner.wait(60) == [1, 1], learner.log(0) + learner.log(1)
    assert "rank 0 failed: FencedError: " in learner.log(1)
