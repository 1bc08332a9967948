"""report.html: one self-contained page about a run, for light and dark screens of any width.

Everything on it comes from files of the run directory; all text is escaped.
"""

import html
import json
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from deploy.environment import read_environment
from deploy.plots import all_plots, plot_png
from deploy.rundir import RunDirectory, write_atomically
from deploy.summary import read_metrics, read_summary
from protocol.errors import LauncherError
from protocol.records import Summary

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --ink: #1f2937; --dim: #6b7280; --grid: #e5e7eb; --page: #ffffff; --box: #f3f4f6; }}
@media (prefers-color-scheme: dark) {{
  :root {{ --ink: #e5e7eb; --dim: #9ca3af; --grid: #374151; --page: #111827; --box: #1f2937; }}
}}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.5rem; margin: 0; }} h2 {{ font-size: 1.1rem; margin: 2rem 0 .5rem; }}
.dim {{ color: var(--dim); }}
.tiles, .plots {{ display: grid; gap: .75rem; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); }}
.plots {{ margin-top: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(21rem, 100%), 1fr)); }}
.tile {{ background: var(--box); border-radius: .5rem; padding: .6rem .8rem; }}
.tile b {{ display: block; font-size: 1.25rem; }}
svg {{ width: 100%; height: auto; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .875rem; width: 100%; }}
th, td {{ text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--grid);
  vertical-align: top; }}
code {{ font-size: .85em; overflow-wrap: anywhere; }}
.bad {{ color: #ef4444; }}
</style></head><body>
<h1>{title}</h1>
<p class="dim">{subtitle}</p>
{body}
</body></html>
"""


def write_report(directory: RunDirectory) -> Path:
    """Write report.html.

    Raises:
        LauncherError: the directory holds no run.
    """
    run = directory.read()
    if run is None:
        raise LauncherError(f"{directory.path} holds no run: it has no {directory.identity.name}")
    records = read_metrics(directory.metrics)
    summary = read_summary(directory)
    history = directory.read_history()
    started = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(run.created_at))
    plots = "".join(f"<figure style='margin:0'>{plot}</figure>" for plot in all_plots(records))
    parts = [
        _tiles(summary) if summary is not None else "<p>No summary yet.</p>",
        f"<div class='plots'>{plots}</div>" if plots else "<p>No step has been trained.</p>",
        _ledger(summary) if summary is not None else "",
        _section("Processes started again", ["process", "times"], history.restarts.items()),
        _section("Settings", ["key", "value", "from", "meaning"], _settings_rows(directory)),
        _section("Environment", ["", "version"], read_environment(directory).items()),
    ]
    page = PAGE.format(
        title=_text(f"Run {run.name}"),
        subtitle=_text(f"started {started} · {len(history.sessions)} sessions · {directory.path}"),
        body="\n".join(parts),
    )
    write_atomically(directory.report, page)
    return directory.report


def write_picture(directory: RunDirectory, path: Path) -> Path:
    """Write a PNG of reward, lag and importance weights.

    Raises:
        LauncherError: the run has no steps yet.
    """
    records = read_metrics(directory.metrics)
    if not records:
        raise LauncherError(f"the run in {directory.path} has no steps to plot yet")
    plot_png(records, path)
    return path


def _tiles(summary: Summary) -> str:
    figures = [
        ("reward, first 5 steps", f"{summary.reward_first:.3f}"),
        ("reward, last 10 steps", f"{summary.reward_last:.3f}"),
        ("steps", f"{summary.steps}" + ("" if summary.complete else " so far")),
        ("versions", summary.versions),
        ("training", f"{summary.training_seconds:.0f} s of {summary.wall_seconds:.0f} s"),
        ("lag: mean, 95 %, max", f"{summary.lag.mean:.2f}, {summary.lag.p95:g}, {summary.lag.max}"),
        ("groups trained", f"{summary.groups_trained:,}"),
        ("tokens generated", f"{summary.tokens_generated:,}"),
        ("actors busy", f"{summary.actor_busy_fraction:.0%}"),
        ("learner waited", f"{summary.learner_wait_fraction:.0%}"),
        ("largest parity", f"{summary.parity_max:.1e}"),
        ("ledger", "balanced" if summary.ledger_balanced else "NOT balanced"),
    ]
    tiles = (f"<div class='tile'><span class='dim'>{_text(n)}</span><b>{_text(v)}</b></div>" for n, v in figures)
    return f"<div class='tiles'>{''.join(tiles)}</div>"


def _ledger(summary: Summary) -> str:
    verdict = (
        "Every ticket ever issued is in exactly one state."
        if summary.ledger_balanced
        else "<span class='bad'>The states do not add up to the tickets issued.</span>"
    )
    return _section("Ledger", ["state", "tickets"], summary.ledger.items()) + f"<p class='dim'>{verdict}</p>"


def _settings_rows(directory: RunDirectory) -> list[list[Any]]:
    rows = directory.read_settings()
    return [[row["key"], json.dumps(row["value"], ensure_ascii=False), row["origin"], row["doc"]] for row in rows]


def _section(title: str, headings: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A heading and a table; nothing if there are no rows."""
    body = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    if not body:
        return ""
    head = "".join(f"<th>{_text(heading)}</th>" for heading in headings)
    return (
        f"<h2>{_text(title)}</h2><div class='scroll'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _text(value: Any) -> str:
    return html.escape(str(value))
