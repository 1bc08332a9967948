"""Plots of a run, as inline SVG that follows the page's light or dark colours, and one picture for a README.

Colours that must follow the page are drawn as placeholders and replaced by CSS variables. Long runs are averaged into
at most `MAX_COLUMNS` columns, so that a report stays small.
"""

import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from protocol.records import StepRecord

INK, GRID = "#010203", "#010204"  # placeholders for var(--ink), var(--grid)
BLUE, ORANGE, GREEN, RED = "#3b82f6", "#f59e0b", "#10b981", "#ef4444"
TEAL, VIOLET = "#0f766e", "#8b5cf6"
MAX_COLUMNS = 300
SMOOTH_STEPS = 10
SIZE_INCHES = (4.8, 2.7)
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "vespo",
    "font.size": 9,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
}
Array = NDArray[np.float64]


class Series:
    """Metrics as columns over steps, averaged where the run is long."""

    def __init__(self, records: Sequence[StepRecord]) -> None:
        """`records`: at least one."""
        self.records = records
        count = min(len(records), MAX_COLUMNS)
        self._edges = [len(records) * i // count for i in range(count)]
        self.steps = self.column("step")

    def column(self, name: str) -> Array:
        """`[N]` means of a number of the record."""
        return self._reduce(np.array([getattr(r, name) for r in self.records], np.float64))

    def quantiles(self, name: str) -> Array:
        """`[N, Q]` means of a list of the record."""
        return self._reduce(np.array([getattr(r, name) for r in self.records], np.float64))

    def lag_shares(self) -> Array:
        """`[L, N]` share of the sequences of each column that had each lag from 0 to L - 1."""
        counts = np.zeros((len(self.records), 1 + max(r.lag_max for r in self.records)))
        for row, record in enumerate(self.records):
            for lag, count in record.lag_counts.items():
                counts[row, lag] = count
        sums = np.add.reduceat(counts, self._edges, axis=0)
        shares: Array = (sums / np.maximum(sums.sum(1, keepdims=True), 1)).T
        return shares

    def _reduce(self, values: Array) -> Array:
        sizes = np.diff([*self._edges, len(self.records)])
        means: Array = (np.add.reduceat(values, self._edges, axis=0).T / sizes).T
        return means


def all_plots(records: Sequence[StepRecord]) -> list[str]:
    """Every plot of the report, as SVG elements; none for a run without steps."""
    if not records:
        return []
    series = Series(records)
    return [_svg(draw, series) for draw in PLOTS]


def plot_png(records: Sequence[StepRecord], path: Path) -> None:
    """Reward, lag and importance weights side by side, on white.

    Raises:
        ValueError: there is no step to plot.
    """
    if not records:
        raise ValueError("no steps to plot")
    series = Series(records)
    style = {key: {INK: "#1f2937", GRID: "#e5e7eb"}.get(str(value), value) for key, value in STYLE.items()}
    with mpl.rc_context(style):
        figure = Figure(figsize=(11, 2.9), layout="constrained")
        for axes, draw in zip(figure.subplots(1, 3), (_reward, _lag, _log_w), strict=True):
            draw(axes, series)
            axes.set_xlabel("step")
        figure.savefig(path, dpi=130, facecolor="white")


def _svg(draw: Callable[[Axes, Series], None], series: Series) -> str:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=SIZE_INCHES, layout="constrained")
        axes = figure.subplots()
        draw(axes, series)
        axes.set_xlabel("step")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = text.replace(INK, "var(--ink)").replace(GRID, "var(--grid)")
    return text.replace("'DejaVu Sans'", "system-ui, sans-serif")


def _smooth(values: Array) -> Array:
    """Mean of the last `SMOOTH_STEPS` values at each place."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    starts = np.maximum(0, np.arange(1, len(values) + 1) - SMOOTH_STEPS)
    ends = np.arange(1, len(values) + 1)
    means: Array = (sums[ends] - sums[starts]) / (ends - starts)
    return means


def _line(axes: Axes, series: Series, name: str, label: str, colour: str) -> None:
    axes.plot(series.steps, series.column(name), color=colour, label=label)


def _band(axes: Axes, series: Series, name: str, colour: str) -> None:
    quantiles = series.quantiles(name)
    axes.fill_between(series.steps, quantiles[:, 0], quantiles[:, 4], color=colour, alpha=0.18, lw=0, label="5–95 %")
    axes.fill_between(series.steps, quantiles[:, 1], quantiles[:, 3], color=colour, alpha=0.35, lw=0, label="25–75 %")
    axes.plot(series.steps, quantiles[:, 2], color=colour, label="median")
    axes.legend(loc="best", ncols=3)


def _reward(axes: Axes, series: Series) -> None:
    reward = series.column("reward_mean")
    axes.set_title("Reward")
    axes.plot(series.steps, reward, ".", color=BLUE, alpha=0.35, markersize=4, label="step mean")
    axes.plot(series.steps, _smooth(reward), color=BLUE, label=f"mean of {SMOOTH_STEPS}")
    axes.legend(loc="lower right")


def _lag(axes: Axes, series: Series) -> None:
    shares = series.lag_shares()  # [L, N]
    pixels = np.zeros((*shares.shape, 4))
    pixels[..., :3] = mpl.colors.to_rgb(ORANGE)
    pixels[..., 3] = np.sqrt(shares) * 0.85
    first, last = series.steps[0], series.steps[-1]
    axes.set_title("Lag in versions (shade: share of sequences)")
    axes.imshow(
        pixels,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(first - 0.5, last + 0.5, -0.5, len(shares) - 0.5),
    )
    _line(axes, series, "lag_mean", "mean", BLUE)
    _line(axes, series, "lag_max", "max", RED)
    axes.set_ylim(-0.5, len(shares) + 0.5)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(visible=False)
    axes.legend(loc="upper right", ncols=2)


def _log_w(axes: Axes, series: Series) -> None:
    axes.set_title("log W, the sequences' importance weights")
    _band(axes, series, "log_w_quantiles", BLUE)


def _effective(axes: Axes, series: Series) -> None:
    axes.set_title("Effective sample size and kernel mass")
    _line(axes, series, "ess_w", "ESS of W", BLUE)
    _line(axes, series, "ess_phi", "ESS of φ", ORANGE)
    _line(axes, series, "kernel_mass", "kernel mass Σφ|A| / Σ|A|", GREEN)
    _line(axes, series, "starved_positive_share", "starved positives", RED)
    axes.set_ylim(bottom=0)
    axes.legend(loc="best")


def _phi(axes: Axes, series: Series) -> None:
    axes.set_title("φ(W), the kernel's weights")
    _band(axes, series, "phi_quantiles", GREEN)


def _gradient(axes: Axes, series: Series) -> None:
    axes.set_title("Gradient norm before clipping")
    _line(axes, series, "grad_norm", "gradient norm", BLUE)


def _entropy(axes: Axes, series: Series) -> None:
    axes.set_title("Entropy and drift a token, in nats")
    _line(axes, series, "entropy", "entropy", BLUE)
    _line(axes, series, "behaviour_kl", "behaviour − policy log-prob", ORANGE)
    axes.legend(loc="best")


def _time(axes: Axes, series: Series) -> None:
    optimizer = series.column("optimizer_seconds")
    parts = [series.column("train_seconds") - optimizer, optimizer]
    parts += [series.column(f"{name}_seconds") for name in ("publish", "checkpoint", "build", "wait")]
    axes.set_title("Seconds of the learner a step")
    axes.stackplot(
        series.steps,
        *parts,
        labels=["forward, backward", "optimizer", "publish", "checkpoint", "lay out", "wait for groups"],
        colors=[GREEN, TEAL, BLUE, VIOLET, ORANGE, RED],
        alpha=0.7,
    )
    axes.set_ylim(0, 1.3 * float(np.quantile(np.sum(parts, axis=0), 0.95)) or 1.0)  # the first wait is for engines
    axes.legend(loc="upper right", ncols=3)


PLOTS = (_reward, _lag, _log_w, _effective, _phi, _gradient, _entropy, _time)
