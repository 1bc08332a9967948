"""Report and summary: what is computed from the files of a run, and that the page holds nothing foreign."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from buffer.run import Buffer
from deploy.environment import write_environment
from deploy.plots import MAX_COLUMNS, Series
from deploy.report import write_picture, write_report
from deploy.rundir import History, RunDirectory, Session, write_atomically
from deploy.summary import build_summary, format_summary, read_metrics, read_summary, summarise_lag, write_summary
from protocol.errors import LauncherError
from protocol.recipe import Row
from tests.deploy_samples import make_record, make_run, make_settings, make_summary

VOID = {"meta", "br", "path", "use", "image", "rect"}


class WellFormed(HTMLParser):
    """Checks that tags close in the order in which they open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def test_a_report_is_self_contained_and_well_formed(tmp_path: Path) -> None:
    directory = make_run(tmp_path, 30)
    write_atomically(directory.summary, make_summary().model_dump_json())
    write_environment(directory)
    page = write_report(directory).read_text("utf-8")
    parser = WellFormed()
    parser.feed(page)
    assert parser.open == []
    assert all(link.startswith(("#", "data:")) for link in parser.links)
    assert page.count("<svg") == 8
    assert "<text" in page  # text stays text
    assert "DejaVu" not in page
    for word in ("Reward", "Lag in versions", "importance weights", "kernel", "Ledger", "torch"):
        assert word in page


def test_everything_in_a_report_is_escaped(tmp_path: Path) -> None:
    directory = make_run(tmp_path / "<i>dir", 3)
    directory.write_settings([Row("task.options.x", "<script>alert(1)</script>", "recipe <b>.toml", "A & B")])
    summary = make_summary(ledger={"<u>state": 1}, restarts={"<s>": 1})
    write_atomically(directory.summary, summary.model_dump_json())
    page = write_report(directory).read_text("utf-8")
    assert not re.search(r"<(script|i|b\.toml|u|s)>", page)
    assert "&lt;script&gt;" in page
    assert "A &amp; B" in page


def test_a_report_of_a_run_without_steps(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    with pytest.raises(LauncherError, match="holds no run"):
        write_report(directory)
    directory.create("x")
    assert "No step has been trained" in write_report(directory).read_text()


def test_a_long_run_makes_a_small_report(tmp_path: Path) -> None:
    directory = make_run(tmp_path, 3000)
    assert write_report(directory).stat().st_size < 1 << 20


def test_series_average_long_runs_and_keep_short_ones() -> None:
    short = Series([make_record(step, lag_counts={0: step, 3: 1}, lag_max=3) for step in (1, 2, 3)])
    assert short.steps.tolist() == [1, 2, 3]
    assert short.lag_shares().shape == (4, 3)
    assert short.lag_shares().sum(0).tolist() == pytest.approx([1, 1, 1])
    assert short.lag_shares()[3].tolist() == pytest.approx([1 / 2, 1 / 3, 1 / 4])
    long = Series([make_record(step) for step in range(1, 1001)])
    assert len(long.steps) == MAX_COLUMNS
    assert long.column("reward_mean").mean() == pytest.approx(sum(r.reward_mean for r in long.records) / 1000, rel=1e-2)


def test_the_picture(tmp_path: Path) -> None:
    picture = write_picture(make_run(tmp_path, 20), tmp_path / "plot.png")
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(LauncherError, match="no steps"):
        write_picture(RunDirectory(tmp_path / "none"), tmp_path / "none.png")


def test_lines_that_a_crash_cut_short_are_left_out(tmp_path: Path) -> None:
    directory = make_run(tmp_path, 3)
    with directory.metrics.open("a") as file:
        file.write('{"step": 4, "vers')
    assert [record.step for record in read_metrics(directory.metrics)] == [1, 2, 3]
    assert read_metrics(tmp_path / "none") == []


def test_a_summary_covers_all_sessions(buffer: Buffer, tmp_path: Path) -> None:
    buffer.begin_epoch(run_id="x", groups_per_version=4, max_lag=1, max_attempts=3, max_bytes=1 << 20)
    records = [make_record(step, reward_mean=step / 100, epoch=1 if step <= 12 else 2) for step in range(1, 21)]
    records[0] = records[0].model_copy(update={"wait_seconds": 50.0, "step_seconds": 51.0})
    history = History(
        sessions=[Session(started_at=1000.0), Session(started_at=1012.5, ended_at=1025.0)], restarts={"actor-0": 2}
    )
    summary = build_summary(make_settings(run={"steps": 20}), records, buffer, history)
    assert summary.complete
    assert summary.reward_first == pytest.approx(0.03)
    assert summary.reward_last == pytest.approx(0.155)
    assert summary.wall_seconds == pytest.approx(12 + 12.5)  # the first session was killed after step 12
    assert summary.training_seconds == pytest.approx(18 * 1.0 + 2 * 0.8)  # waits for engines are not training
    assert summary.learner_wait_fraction == pytest.approx(18 * 0.2 / 19.6)
    assert summary.lag.model_dump() == {"mean": 1.5, "p50": 1.0, "p95": 2.0, "max": 2}
    assert summary.ledger_balanced
    assert (summary.sessions, summary.restarts) == (2, {"actor-0": 2})
    directory = make_run(tmp_path, 20)
    write_summary(make_settings(run={"steps": 30}), directory, buffer, history)
    kept = read_summary(directory)
    assert kept is not None
    assert not kept.complete
    assert "the same command goes on" in format_summary(kept, directory)


def test_a_summary_without_steps_is_all_zeros(buffer: Buffer) -> None:
    summary = build_summary(make_settings(), [], buffer, History())
    assert (summary.steps, summary.reward_last, summary.lag.max, summary.complete) == (0, 0.0, 0, False)
    json.loads(summary.model_dump_json())


def test_lag_quantiles_count_sequences() -> None:
    records = [make_record(1, lag_counts={0: 95, 7: 5}), make_record(2, lag_counts={0: 100})]
    assert summarise_lag(records).model_dump() == pytest.approx({"mean": 35 / 200, "p50": 0, "p95": 0, "max": 7})
