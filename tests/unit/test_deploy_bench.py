"""What the benches share: medians and targets, one JSON object and nothing else, an answer to a name that is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from deploy.bench import BENCHES
from deploy.bench.harness import Figure, Reading, Target, format_report, names_of, run_bench, summarise
from deploy.bench.machine import describe_machine
from deploy.cli import app
from protocol.errors import SettingsError

ROOT = Path(__file__).parents[2]
FAKE = "tests.fake_bench"


@pytest.fixture
def two_benches(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake bench under two names, and no other."""
    for name in list(BENCHES):
        monkeypatch.delitem(BENCHES, name)
    monkeypatch.setitem(BENCHES, "first", FAKE)
    monkeypatch.setitem(BENCHES, "second", FAKE)


def test_figures_are_medians_with_their_spread() -> None:
    rounds = [{"a": Reading(value, "s")} for value in (5.0, 1.0, 2.0)] + [{"b": Reading(4)}, {"b": Reading(6)}]
    assert summarise(rounds) == {"a": Figure(2.0, 1.0, 5.0, 3, "s"), "b": Figure(5.0, 4.0, 6.0, 2, "")}


def test_a_figure_keeps_its_unit() -> None:
    with pytest.raises(ValueError, match=r"figure a .*\['MB/s', 's'\]"):
        summarise([{"a": Reading(1, "s")}, {"a": Reading(1, "MB/s")}])


@pytest.mark.parametrize(
    ("target", "median", "met"),
    [
        (Target("a", 0.8), 0.8, True),
        (Target("a", 0.8), 0.79, False),
        (Target("a", 0.8, at_most=True), 0.8, True),
        (Target("a", 0.8, at_most=True), 0.81, False),
        (Target("a", 0.8), None, False),
    ],
)
def test_targets_are_bounds_that_include_their_value(target: Target, median: float | None, met: bool) -> None:
    verdict = target.verdict(median)
    assert verdict["met"] is met
    assert (verdict["value"], verdict["target"]) == (median, 0.8)


def test_a_report_has_machine_figures_and_targets(two_benches: None) -> None:
    report = run_bench("first", quick=False)
    assert list(report) == ["bench", "machine", "figures", "targets"]
    assert report["bench"] == "first"
    assert report["figures"]["ours"] == {"median": 3.0, "min": 1.0, "max": 4.0, "runs": 3, "unit": "requests/s"}
    assert report["figures"]["seconds"]["runs"] == 1
    assert {figure: target["met"] for figure, target in report["targets"].items()} == {
        "ours": True,
        "ours_over_theirs": False,
        "seconds": True,
        "only_on_large_machines": False,
    }


def test_the_machine_is_described() -> None:
    machine = describe_machine()
    assert machine["cpu"]
    assert machine["cores"] >= 1
    assert machine["memory_gib"] > 0.1
    assert machine["packages"]["redis"][0].isdigit()


def test_json_is_one_object_and_nothing_else(two_benches: None, capfd: pytest.CaptureFixture[str]) -> None:
    result = CliRunner().invoke(app, ["bench", "first", "--json", "--quick"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["figures"]["ours"]["runs"] == 1
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "and so is a child" in captured.err


def test_all_runs_every_bench(two_benches: None) -> None:
    report = json.loads(CliRunner().invoke(app, ["bench", "all", "--json", "--quick"]).stdout)
    assert list(report) == ["benches"]
    assert [bench["bench"] for bench in report["benches"]] == ["first", "second"]


def test_a_person_gets_tables(two_benches: None) -> None:
    text = format_report(run_bench("first", quick=False))
    lines = text.splitlines()
    assert lines[0].startswith("bench first: ")
    assert any(line.split() == ["ours", "3", "1", "4", "3", "requests/s"] for line in lines)
    assert any(line.split() == ["ours_over_theirs", "1.5", "at", "least", "2", "MISSED"] for line in lines)
    assert any(line.split() == ["seconds", "0.25", "at", "most", "0.5", "met"] for line in lines)
    assert any(line.split() == ["only_on_large_machines", "-", "at", "least", "1", "MISSED"] for line in lines)


@pytest.mark.parametrize(("name", "hint"), [("frist", "did you mean first?"), ("zzz", "there are first, second, all")])
def test_a_wrong_name_names_the_nearest(two_benches: None, name: str, hint: str) -> None:
    with pytest.raises(SettingsError) as error:
        names_of(name)
    assert str(error.value) == f"there is no bench '{name}'; {hint}"


def test_a_wrong_name_is_an_error_of_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "deploy", "bench", "bufer", "--json"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "vespo: there is no bench 'bufer'; did you mean buffer?\n"


def test_the_registry_loads_nothing_heavy() -> None:
    script = (
        "import sys, importlib; from deploy.bench import BENCHES; "
        "[importlib.import_module(module) for module in BENCHES.values()]; "
        "print([m for m in ('torch', 'ray', 'vllm', 'deepspeed', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
