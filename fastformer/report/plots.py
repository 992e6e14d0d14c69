"""Pictures for reports: PNG files, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from fastformer.report import tables

# Okabe & Ito's colours: told apart with any colour vision.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vP*"
INK = "#333333"
SMOOTHING = 0.02  # the share of a run that the smoothed curve averages over


class Curve(NamedTuple):
    """A metric over steps."""

    steps: Sequence[int]
    values: Sequence[float]


class Panel(NamedTuple):
    """One measure of several arms: ``values[arm]`` holds one number a seed."""

    title: str
    unit: str
    values: Mapping[str, Sequence[float]]


def loss_curve(path: Path, train: Curve, heldout: Curve, title: str) -> None:
    """Write the picture of a run: the loss of each logged step, its running mean, the held-out points.

    Args:
      train, heldout: in nats per token; either may be empty.
    """
    figure, (axes,) = _figure(1, 7.2, 4.0)
    if train.steps:
        axes.plot(*train, color=COLOURS[0], alpha=0.25, linewidth=0.8)
        axes.plot(
            train.steps, smooth(train.values), color=COLOURS[0], linewidth=1.8, label="train (running mean)"
        )
    if heldout.steps:
        axes.plot(*heldout, "o-", color=COLOURS[1], markersize=5, linewidth=1.2, label="held out")
        place = {"xytext": (0, 9), "textcoords": "offset points", "ha": "right"}
        axes.annotate(
            f"{heldout.values[-1]:.3f}", (heldout.steps[-1], heldout.values[-1]), color=COLOURS[1], **place
        )
    axes.set(title=title, xlabel="step", ylabel="loss (nats per token)")
    _zoom(axes, [*train.values[len(train.values) // 50 :], *heldout.values])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    if train.steps or heldout.steps:
        axes.legend(frameon=False)
    _save(figure, path)


def smooth(values: Sequence[float]) -> np.ndarray:
    """Return the mean of each value and those around it, SMOOTHING of all, fewer at the ends."""
    half = max(1, round(len(values) * SMOOTHING / 2))
    totals = np.concatenate([[0.0], np.cumsum(np.asarray(values, np.float64))])
    centre = np.arange(len(values))
    reach = np.minimum(half, np.minimum(centre, len(values) - 1 - centre))
    return (totals[centre + reach + 1] - totals[centre - reach]) / (2 * reach + 1)


def arms(path: Path, names: Sequence[str], panels: Sequence[Panel]) -> None:
    """Write one panel a measure, one row an arm: the mean with its standard deviation, a dot a seed."""
    height = 1.3 + 0.42 * len(names)
    figure, axes_row = _figure(len(panels), 1.2 + 3.0 * len(panels), height)
    rows = np.arange(len(names))[::-1]
    for index, (axes, panel) in enumerate(zip(axes_row, panels)):
        for row, name in zip(rows, names):
            values = np.asarray(panel.values.get(name, ()), np.float64)
            if not values.size:
                place = {"transform": axes.get_yaxis_transform(), "ha": "center", "va": "center"}
                axes.text(0.5, row, tables.NOT_RUN, color="0.6", **place)
                continue
            std = values.std(ddof=1) if values.size > 1 else 0.0
            axes.plot(
                values, np.full(values.size, row - 0.22), "|", color=COLOURS[0], alpha=0.6, markersize=6
            )
            axes.errorbar(values.mean(), row, xerr=std, fmt="o", color=COLOURS[0], capsize=4, markersize=6)
        axes.set_title(panel.title)
        axes.set_xlabel(panel.unit)
        axes.set_ylim(-0.6, len(names) - 0.4)
        axes.set_yticks(rows, names if index == 0 else [""] * len(names))
        axes.margins(x=0.12)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.12g}"))
        axes.grid(axis="y", visible=False)
    _save(figure, path)


def lines(path: Path, panels: Sequence[tuple[str, str, Mapping[str, Curve]]], xlabel: str) -> None:
    """Write one panel for each ``(title, unit, {name: curve})``, on logarithmic axes with a shared legend."""
    figure, axes_row = _figure(len(panels), 0.6 + 3.9 * len(panels), 3.9)
    names = list(dict.fromkeys(name for _, _, curves in panels for name in curves))
    handles = {}
    for axes, (title, unit, curves) in zip(axes_row, panels):
        for name, curve in curves.items():
            index = names.index(name)
            look = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
            handles[name] = axes.plot(*curve, markersize=5, alpha=0.85, **look)[0]
        axes.set(title=title, xlabel=xlabel, ylabel=unit, xscale="log", yscale="log")
        ticks = sorted({x for curve in curves.values() for x in curve.steps})
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(ticks, [f"{x:,}" for x in ticks])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.12g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=min(len(names), 7), frameon=False
    )
    _save(figure, path)


def _figure(columns: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    row = list(figure.subplots(1, columns, squeeze=False)[0])
    for axes in row:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=INK)
    return figure, row


def _zoom(axes: Axes, values: Sequence[float]) -> None:
    """Show these values; the first moments of a run, far above them, may leave the picture."""
    finite = [value for value in values if np.isfinite(value)]
    if finite and max(finite) > min(finite):
        room = 0.06 * (max(finite) - min(finite))
        axes.set_ylim(min(finite) - room, max(finite) + room)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})
