"""The `vespo` command as a person meets it: quick answers, errors on one line that say what and where."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from buffer.run import Buffer
from protocol.errors import VespoError
from tests.deploy_samples import make_run

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "deploy/recipes/arithmetic.toml"
QUICK_SECONDS = 1.0
WRONG_INPUT_SECONDS = 2.0


class Result:
    """How a command ended; the best of two times, since other work on the machine must not fail a test."""

    def __init__(self, *arguments: object, cwd: Path, runs: int = 1, **environ: str) -> None:
        clean = {key: value for key, value in os.environ.items() if key not in ("TERM", "COLUMNS")}
        clean = {key: value for key, value in clean.items() if not key.startswith("VESPO_")}
        times = []
        for _ in range(runs):
            started = time.monotonic()
            done = subprocess.run(
                [sys.executable, "-m", "deploy", *map(str, arguments)],
                cwd=cwd,
                env={**clean, "PYTHONPATH": str(ROOT), **environ},
                capture_output=True,
                text=True,
                timeout=60,
            )
            times.append(time.monotonic() - started)
        self.seconds = min(times)
        self.code, self.out, self.err = done.returncode, done.stdout, done.stderr


def test_help_answers_at_once(tmp_path: Path) -> None:
    result = Result("--help", cwd=tmp_path, runs=3)
    assert result.code == 0
    assert "learner" in result.out
    assert result.seconds < QUICK_SECONDS


def test_the_command_line_loads_nothing_heavy(tmp_path: Path) -> None:
    script = (
        "import sys, deploy.cli, deploy.preflight, deploy.launcher, deploy.worker; "
        "print([m for m in ('torch', 'ray', 'vllm', 'deepspeed', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_buffer_stats_and_audit_of_a_live_run(tmp_path: Path, buffer: Buffer, redis_url: str) -> None:
    where = ("--url", redis_url, "--run", buffer.run)
    assert "no learner has begun it" in Result("buffer", "stats", *where, cwd=tmp_path).out
    buffer.begin_epoch(run_id="x", groups_per_version=4, max_lag=1, max_attempts=3, max_bytes=1 << 20)
    result = Result("buffer", "stats", *where, cwd=tmp_path, runs=3)
    assert result.code == 0
    assert "issued 0" in result.out
    assert result.seconds < QUICK_SECONDS
    audit = Result("buffer", "audit", *where, cwd=tmp_path)
    assert (audit.code, audit.out.splitlines()[-1]) == (0, "the ledger balances")
    assert Result("buffer", "purge", "--yes", *where, cwd=tmp_path).out == f"run {buffer.run}: deleted\n"
    assert buffer.clock.read() is None


def test_config_shows_origins(tmp_path: Path) -> None:
    result = Result("config", RECIPE, "buffer.max_lag=2", cwd=tmp_path, VESPO_RUN__SEED="5")
    assert result.code == 0
    lines = {line.split(" = ")[0]: line for line in result.out.splitlines() if " = " in line}
    assert lines["max_lag"].endswith("# command line")
    assert lines["seed"].endswith("# environment VESPO_RUN__SEED")
    assert lines["group_size"].endswith(f"# recipe {RECIPE}")
    rows = json.loads(Result("config", RECIPE, "--json", cwd=tmp_path).out)
    assert {"key", "value", "origin", "doc"} == set(rows[0])


def test_config_prints_a_valid_recipe(tmp_path: Path) -> None:
    for name, arguments in (("vespo", []), ("grpo", ["objective.name=grpo", "objective.dual_clip=off"])):
        (tmp_path / "again.toml").write_text(Result("config", RECIPE, *arguments, cwd=tmp_path).out)
        rows = json.loads(Result("config", tmp_path / "again.toml", "--json", cwd=tmp_path).out)
        values = {row["key"]: row["value"] for row in rows}
        assert values["objective.name"] == name
        assert values.get("objective.dual_clip", "off") == "off"


@pytest.mark.parametrize(
    ("arguments", "code", "fragments"),
    [
        (["learner.lr=1"], 2, ["learner.lr", "learner.learning_rate", "command line"]),
        (["task.top_p=0.9"], 2, ["top_p", "biased"]),
        (["task.group_size=1"], 2, ["task.group_size", "greater than or equal to 2"]),
        (["objective.k_pos=0.9"], 2, ["objective.k_pos", "second moment"]),
        (["objective.name=grpo", "objective.clip_hi=0.1"], 2, ["objective.clip_hi", "objective.clip_high"]),
        (["objective.name=grpo", "objective.k_pos=3"], 2, ["objective.k_pos", "grpo", "clip_low"]),
        (["objective.name=no_such_module:loss"], 2, ["objective.name", "no_such_module"]),
        (["model.path=nowhere"], 2, ["nowhere", "no directory"]),
        (["task.name=no_such_module:Task"], 2, ["no_such_module"]),
        (["task.name=sums"], 2, ["arithmetic", "package.module:Class"]),
        (["buffer.url=redis://:hunter2@127.0.0.1:1/0"], 1, ["127.0.0.1:1", "cannot be reached"]),
        (["buffer.url=http://127.0.0.1"], 2, ["buffer.url", "redis://"]),
        (["weights.store=/proc/nowhere"], 1, ["/proc/nowhere"]),
    ],
)
def test_wrong_input_fails_quickly_and_says_what_and_where(
    tmp_path: Path, arguments: list[str], code: int, fragments: list[str]
) -> None:
    result = Result("run", RECIPE, "--run-dir", "run", *arguments, cwd=tmp_path)
    assert result.code == code
    assert all(fragment in result.err for fragment in fragments), result.err
    assert "Traceback" not in result.err
    assert "hunter2" not in result.err
    assert result.seconds < WRONG_INPUT_SECONDS


def test_a_server_that_evicts_is_refused(tmp_path: Path, redis_url: str, redis_client: object) -> None:
    redis_client.config_set("maxmemory-policy", "allkeys-lru")  # type: ignore[attr-defined]
    try:
        result = Result("run", RECIPE, "--run-dir", "run", f"buffer.url={redis_url}", cwd=tmp_path)
    finally:
        redis_client.config_set("maxmemory-policy", "noeviction")  # type: ignore[attr-defined]
    assert result.code == 1
    assert "allkeys-lru" in result.err
    assert result.seconds < WRONG_INPUT_SECONDS


def test_a_run_of_another_directory_is_not_touched(tmp_path: Path, buffer: Buffer, redis_url: str) -> None:
    buffer.begin_epoch(run_id="someone-else", groups_per_version=4, max_lag=1, max_attempts=3, max_bytes=1 << 20)
    overrides = [f"buffer.url={redis_url}", f"run.name={buffer.run}"]
    result = Result("run", RECIPE, "--run-dir", "run", *overrides, cwd=tmp_path)
    assert result.code == 1
    assert "someone-else" in result.err


def test_an_actor_needs_a_server_to_join(tmp_path: Path) -> None:
    result = Result("actor", RECIPE, "--run-dir", "run", cwd=tmp_path)
    assert result.code == 1
    assert "buffer.url" in result.err


def test_a_missing_recipe_is_an_error_of_one_line(tmp_path: Path) -> None:
    result = Result("run", "no.toml", cwd=tmp_path)
    assert (result.code, result.err) == (2, "vespo: recipe no.toml does not exist\n")


def test_report_and_status_of_a_directory_without_a_run(tmp_path: Path) -> None:
    for command in (["report", "x"], ["status", "--run-dir", "x"], ["buffer", "stats", "--run-dir", "x"]):
        result = Result(*command, cwd=tmp_path)
        assert result.code == 1
        assert "holds no run" in result.err


def test_status_of_a_run_that_is_not_running(tmp_path: Path) -> None:
    make_run(tmp_path / "run", 3)
    result = Result("status", "--run-dir", "run", cwd=tmp_path)
    assert "3 steps" in result.out
    assert "not running" in result.out


def test_errors_have_exit_codes() -> None:
    assert VespoError.exit_code == 1
