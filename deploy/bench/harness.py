"""What every bench shares: rounds become medians with their spread, and are held against targets.

Left out: statistics beyond that. A median and its extremes over interleaved rounds tell whether a difference is real.
"""

import importlib
import os
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from types import ModuleType
from typing import Any

from deploy.bench import BENCHES
from deploy.bench.machine import describe_machine
from deploy.console import format_table
from protocol.errors import SettingsError


@dataclass(frozen=True, slots=True)
class Reading:
    """One measurement. `unit` is "groups/s", "MB/s", "s", or "" for a ratio."""

    value: float
    unit: str = ""


Round = dict[str, Reading]
"""What one round measured, by figure."""


@dataclass(frozen=True, slots=True)
class Target:
    """The median of `figure` shall be at least `value`, or at most if `at_most`."""

    figure: str
    value: float
    at_most: bool = False

    def verdict(self, median: float | None) -> dict[str, Any]:
        """`value`, `target`, `bound` and `met` as they are printed; a figure that was not measured meets no target."""
        met = median is not None and (median <= self.value if self.at_most else median >= self.value)
        bound = "at most" if self.at_most else "at least"
        return {"value": median, "target": self.value, "bound": bound, "met": met}


@dataclass(frozen=True, slots=True)
class Figure:
    """Median, least and greatest of a figure's readings."""

    median: float
    min: float
    max: float
    runs: int
    unit: str


def summarise(rounds: Iterable[Round]) -> dict[str, Figure]:
    """Figures in the order in which they were first measured.

    Raises:
        ValueError: a figure changes its unit.
    """
    readings: dict[str, list[Reading]] = {}
    for measured in rounds:
        for name, reading in measured.items():
            readings.setdefault(name, []).append(reading)
    return {name: _figure(name, of_figure) for name, of_figure in readings.items()}


def _figure(name: str, readings: Sequence[Reading]) -> Figure:
    units = {reading.unit for reading in readings}
    if len(units) > 1:
        raise ValueError(f"figure {name} is measured in several units: {sorted(units)}")
    values = [float(reading.value) for reading in readings]
    return Figure(statistics.median(values), min(values), max(values), len(values), units.pop())


def run_bench(name: str, *, quick: bool) -> dict[str, Any]:
    """Run one bench; its report as it is printed with `--json`."""
    module = _module(name)
    machine = describe_machine()
    measured: list[Round] = []
    with _stdout_on_stderr():
        for number, figures in enumerate(module.rounds(quick), 1):
            measured.append(figures)
            progress(f"bench {name}: round {number} is done")
    figures = summarise(measured)
    medians = {figure: summary.median for figure, summary in figures.items()}
    return {
        "bench": name,
        "machine": machine,
        "figures": {figure: asdict(summary) for figure, summary in figures.items()},
        "targets": {target.figure: target.verdict(medians.get(target.figure)) for target in module.TARGETS},
    }


def names_of(name: str) -> list[str]:
    """The benches that `name` stands for: itself, or every one for "all".

    Raises:
        SettingsError: there is none of that name; the message names the nearest.
    """
    if name == "all":
        return list(BENCHES)
    if name in BENCHES:
        return [name]
    known = [*BENCHES, "all"]
    nearest = get_close_matches(name, known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(known)}"
    raise SettingsError(f"there is no bench {name!r}; {hint}")


def format_report(report: dict[str, Any]) -> str:
    """A report as tables for a person."""
    machine = report["machine"]
    packages = ", ".join(f"{package} {version}" for package, version in machine["packages"].items())
    rows = [
        (name, *(_shown(figure[key]) for key in ("median", "min", "max")), figure["runs"], figure["unit"])
        for name, figure in report["figures"].items()
    ]
    lines = [
        f"bench {report['bench']}: {machine['cores']} cores of {machine['cpu']}, {machine['memory_gib']:.0f} GiB, "
        f"Python {machine['python']}",
        packages,
        "",
        format_table(["figure", "median", "min", "max", "runs", "unit"], rows),
    ]
    if report["targets"]:
        verdicts = [
            (name, _shown(target["value"]), f"{target['bound']} {_shown(target['target'])}", _met(target["met"]))
            for name, target in report["targets"].items()
        ]
        lines += ["", format_table(["target", "median", "wanted", ""], verdicts)]
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _met(met: bool) -> str:
    return "met" if met else "MISSED"


def progress(message: str) -> None:
    """A line for whoever watches, on standard error."""
    print(message, file=sys.stderr, flush=True)


def _module(name: str) -> ModuleType:
    return importlib.import_module(BENCHES[name])


@contextmanager
def _stdout_on_stderr() -> Iterator[None]:
    """What this process, its libraries and its children print to standard output goes to standard error instead."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
