"""What a person sees while a run goes on: a live panel in a terminal, a line now and then elsewhere."""

import os
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol, TextIO

from deploy.snapshot import Snapshot, Trend
from protocol.settings import Settings

if TYPE_CHECKING:
    from rich.table import Table

BLOCKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 32
LINE_SECONDS = 5.0


class View(Protocol):
    """Somewhere to show a run."""

    def update(self, phase: str, snapshot: Snapshot | None, trend: Trend) -> None:
        """Show the newest state; `phase` names what goes on while there is no step yet, else it is empty."""

    def note(self, text: str) -> None:
        """Say something that stays."""

    def close(self) -> None:
        """Leave the terminal as it was found."""


class Lines:
    """`View` for logs and pipes: one line every few seconds, and whenever the phase changes."""

    def __init__(self, settings: Settings, stream: TextIO) -> None:
        self._settings = settings
        self._stream = stream
        self._started = time.monotonic()
        self._printed = -LINE_SECONDS
        self._shown = ""

    def update(self, phase: str, snapshot: Snapshot | None, trend: Trend) -> None:
        """See `View`."""
        now = time.monotonic() - self._started
        head = phase or "step"
        if head == self._shown and now - self._printed < LINE_SECONDS:
            return
        text = phase or (describe(self._settings, snapshot, trend) if snapshot is not None else "")
        if text:
            self._shown, self._printed = head, now
            self._print(now, text)

    def note(self, text: str) -> None:
        """See `View`."""
        self._print(time.monotonic() - self._started, text)

    def _print(self, seconds: float, text: str) -> None:
        print(f"{clock(seconds)}  {text}", file=self._stream, flush=True)

    def close(self) -> None:
        """See `View`."""


class Panel:
    """`View` for terminals: a few lines that are drawn anew in place."""

    def __init__(self, settings: Settings, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        self._settings = settings
        self._started = time.monotonic()
        self._phase, self._phase_since = "", self._started
        self._console = Console(file=stream)
        self._live = Live(console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
        self._live.start()

    def update(self, phase: str, snapshot: Snapshot | None, trend: Trend) -> None:
        """See `View`."""
        from rich.table import Table

        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._phase_since = phase, now
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold cyan", no_wrap=True)
        table.add_column()
        table.add_row(self._settings.run.name, self._progress(snapshot, trend, now))
        if phase:
            table.add_row("now", f"{phase}  [dim]{clock(now - self._phase_since)}[/dim]")
        if snapshot is not None:
            for name, text in figures(snapshot, trend):
                table.add_row(name, text)
        self._live.update(table, refresh=True)

    def _progress(self, snapshot: Snapshot | None, trend: Trend, now: float) -> "Table":
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        done = snapshot.progress.step if snapshot is not None and snapshot.progress is not None else 0
        steps = self._settings.run.steps
        left = trend.seconds_left
        row = Table.grid(padding=(0, 2))
        row.add_row(
            f"step {done}/{steps}",
            ProgressBar(total=steps, completed=min(done, steps), width=30),
            f"{clock(now - self._started)} elapsed" + (f", {clock(left)} left" if left is not None else ""),
        )
        return row

    def note(self, text: str) -> None:
        """See `View`."""
        from rich.text import Text

        self._console.print(Text(f"{clock(time.monotonic() - self._started)}  {text}", style="yellow"))

    def close(self) -> None:
        """See `View`."""
        self._live.stop()


def make_view(settings: Settings, stream: TextIO) -> View:
    """The panel if `stream` is a terminal that can redraw, lines otherwise."""
    able = stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    return Panel(settings, stream) if able else Lines(settings, stream)


def figures(snapshot: Snapshot, trend: Trend) -> list[tuple[str, str]]:
    """Rows of the panel: a name and a text each."""
    rows: list[tuple[str, str]] = []
    record, depth, version = snapshot.progress, snapshot.depth, snapshot.clock
    if record is not None:
        rewards = [trend.rewards[step] for step in sorted(trend.rewards)]
        rows.append(("reward", f"{record.reward_mean:.3f}  {sparkline(rewards)}"))
        rows.append(("lag", f"mean {record.lag_mean:.2f}, max {record.lag_max} versions"))
        rows.append(
            (
                "weights",
                f"ESS {record.ess_w:.2f}   kernel mass {record.kernel_mass:.2f}   "
                f"log W {record.log_w_mean:+.3f} ± {record.log_w_std:.3f}",
            )
        )
        rows.append(("learner", f"{record.step_seconds:.2f} s a step, waits {trend.wait_share:.0%} of the time"))
    if depth is not None and version is not None:
        rows.append(
            ("buffer", f"version {version.version}, {depth.buffered} groups waiting, {depth.leased} with the learner")
        )
    if snapshot.actors:
        states = ", ".join(_count_states(snapshot))
        rows.append(("actors", f"{states}   {trend.tokens_per_second:,.0f} tokens/s"))
    return rows


def describe(settings: Settings, snapshot: Snapshot, trend: Trend) -> str:
    """The same on one line."""
    record = snapshot.progress
    if record is None:
        return ""
    left = trend.seconds_left
    waiting = snapshot.depth.buffered if snapshot.depth is not None else 0
    return (
        f"step {record.step}/{settings.run.steps}  version {record.version}  reward {record.reward_mean:.3f}  "
        f"lag {record.lag_mean:.2f} (max {record.lag_max})  buffer {waiting}  "
        f"actors {len(snapshot.actors)} ({trend.tokens_per_second:,.0f} tokens/s)  wait {trend.wait_share:.0%}  "
        f"ESS {record.ess_w:.2f}  kernel mass {record.kernel_mass:.2f}"
        + (f"  left {clock(left)}" if left is not None else "")
    )


def sparkline(values: list[float]) -> str:
    """Values over time as a row of blocks, averaged to fit; from their smallest to their largest."""
    if not values:
        return ""
    width = min(SPARK_WIDTH, len(values))
    edges = [len(values) * i // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    top = len(BLOCKS) - 1
    return "".join(BLOCKS[round((m - low) / (high - low) * top) if high > low else top // 2] for m in means)


def clock(seconds: float) -> str:
    """Duration as m:ss or h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _count_states(snapshot: Snapshot) -> list[str]:
    groups: dict[str, list[int]] = {}
    for _, _, status in snapshot.actors:
        groups.setdefault(status.state, []).append(status.served_version)
    return [
        f"{len(versions)} {state}" + (f" v{max(versions)}" if max(versions) >= 0 else "")
        for state, versions in sorted(groups.items())
    ]
