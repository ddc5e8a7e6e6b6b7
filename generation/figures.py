"""The figures of a report, each a function of plain data: numbers in, a matplotlib Figure out.

    figure = curves({"nll": (steps, values)}, "nats")
    figure.savefig("nll.png")
    log.image("nll", pixels(figure), step)          # in TensorBoard
    svg(figure, "nll")                              # an element for a page, which takes the page's colours

Every figure has one pair of axes and the width of a narrow telephone, so that its text can be read there; a page with
more room shows several beside each other. Colours differ for the colour-blind and are never the only sign: lines have
dashes and points have shapes of their own.
"""

import functools
import io
import re
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

SIZE = (4.7, 3.4)  # inches of 72 units each
INK, GRID, QUIET = "#20262d", "#d5dae0", "#66707b"
COLORS = ("#0a66b0", "#b8500a", "#08735a", "#86479a", "#8a6d00")
DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "^", "s", "D", "v")
# What a page replaces by its own colours, light or dark.
VARIABLES = {INK: "ink", GRID: "grid", QUIET: "quiet"} | {color: f"c{i}" for i, color in enumerate(COLORS)}
STYLE = {
    "font.size": 9.5,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": GRID,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "figure.dpi": 72,
    "text.parse_math": False,
}


def styled(draw: Callable) -> Callable:
    """A function in which matplotlib has the style of these figures, also for texts that it makes on its own."""

    @functools.wraps(draw)
    def drawn(*args, **kwargs):
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return drawn


@styled
def new_axes(xlabel: str, ylabel: str, size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    """An empty figure and its axes."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    return figure, axes


def legend(axes: Axes) -> None:
    """A legend above the axes, where it hides nothing."""
    columns = min(3, len(axes.get_legend_handles_labels()[0]))
    if columns:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=columns, handlelength=1.8)


@styled
def settle(figure: Figure) -> None:
    """Lay the figure out once and for all, so that points are where in_view says."""
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


def svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element without size, whose colours and text follow the page; name: unique on the page."""
    settle(figure)
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None}, dpi=150)
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(
        r'(<svg[^>]*?) width="[^"]*pt"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*pt"', r"\1", text, count=1)
    )
    for color, variable in VARIABLES.items():
        text = re.sub(rf"(stroke|fill): {color}", rf"\1: var(--{variable}, {color})", text)
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--font, sans-serif)", text)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    return re.sub(r"\s*\n\s*", "\n", text)


def pixels(figure: Figure, dpi: int = 110) -> np.ndarray:
    """The figure as a picture (H, W, 3) of bytes, on white."""
    figure.set_dpi(dpi)
    canvas = FigureCanvasAgg(figure)
    with matplotlib.rc_context(STYLE):
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def in_view(figure: Figure, x: Sequence[float], y: Sequence[float]) -> np.ndarray:
    """Where points lie in the figure's SVG (n, 2), in units of its viewBox; NaN where they lie outside the axes."""
    settle(figure)
    axes = figure.axes[0]
    places = axes.transData.transform(np.column_stack([x, y])) * 72 / figure.dpi
    inside = axes.get_window_extent().expanded(1.01, 1.01)
    places[:, 1] = figure.get_figheight() * 72 - places[:, 1]
    low, high = inside.min * 72 / figure.dpi, inside.max * 72 / figure.dpi
    bottom, top = figure.get_figheight() * 72 - high[1], figure.get_figheight() * 72 - low[1]
    within = (places[:, 0] >= low[0]) & (places[:, 0] <= high[0]) & (places[:, 1] >= bottom) & (places[:, 1] <= top)
    return np.where(within[:, None], places, np.nan)


# ------------------------------------------------------------------------------------------------- NAS dataset


@styled
def histogram(values: Sequence[float], xlabel: str, cuts: Sequence[float] = ()) -> Figure:
    """How many cells have which value. cuts: boundaries between classes, as lines."""
    figure, axes = new_axes(xlabel, "cells")
    axes.hist(values, bins=min(40, max(5, len(values) // 10)), color=COLORS[0], alpha=0.75)
    for i, cut in enumerate(cuts):
        axes.axvline(cut, color=COLORS[1], linestyle="--", label="" if i else "class boundary")
    legend(axes)
    return figure


def pareto_front(cost: Sequence[float], value: Sequence[float]) -> np.ndarray:
    """The places of the points that no other point beats in both: lower cost, higher value. By rising cost."""
    order = np.lexsort((-np.asarray(value), np.asarray(cost)))
    best = np.maximum.accumulate(np.asarray(value)[order])
    better = np.concatenate([[True], best[1:] > best[:-1]]) if len(order) else np.zeros(0, bool)
    return order[better]


def _draw_real(axes: Axes, x: Sequence[float], y: Sequence[float], alpha: float, label: str = "NAS dataset") -> None:
    """The real cells as points, small ones where there are many, and one for the legend."""
    many = len(x) > 300
    look = {"s": 5, "alpha": alpha} if many else {"s": 16, "alpha": 0.7}
    axes.scatter(x, y, color=QUIET, linewidths=0, rasterized=many, **look)
    axes.scatter([], [], s=14, color=QUIET, alpha=0.7, linewidths=0, label=label)


@styled
def cloud(
    x: Sequence[float],
    y: Sequence[float],
    xlabel: str,
    ylabel: str,
    cuts: Sequence[float] = (),
    front: bool = True,
    label: str = "NAS dataset",
) -> Figure:
    """All cells as points, with the Pareto front (little x, much y).

    cuts: class boundaries of y. label: what the points are.
    """
    figure, axes = new_axes(xlabel, ylabel)
    _draw_real(axes, x, y, 0.4, label)
    for i, cut in enumerate(cuts):
        axes.axhline(cut, color=COLORS[1], linestyle="--", linewidth=1, label="" if i else "class boundary")
    if front:
        best = pareto_front(x, y)
        axes.plot(np.asarray(x)[best], np.asarray(y)[best], color=COLORS[0], marker="o", ms=3, label="Pareto front")
    legend(axes)
    return figure


@styled
def over_cloud(real: tuple, sets: dict[str, tuple], limits: tuple[float, float], xlabel: str, ylabel: str) -> Figure:
    """Generated cells over the cloud of real ones.

    real: x and y of them. sets: name of a class -> x and y of its cells.
    limits: between which x was asked to lie, infinite where there is none; what is outside is shaded.
    """
    figure, axes = new_axes(xlabel, ylabel)
    _draw_real(axes, *real, 0.3)
    for i, (name, (x, y)) in enumerate(sets.items()):
        marks = {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
        axes.scatter(x, y, s=20, alpha=0.9, linewidths=0, label=name, **marks)
    left, right = axes.get_xlim()
    for low, high, edge in ((left, max(left, limits[0]), limits[0]), (min(right, limits[1]), right, limits[1])):
        if low < high:
            axes.axvspan(low, high, color=GRID, alpha=0.6, linewidth=0)
            axes.axvline(edge, color=INK, linestyle="--", linewidth=1)
    axes.set_xlim(left, right)
    legend(axes)
    return figure


@styled
def agreement(a: Sequence[float], b: Sequence[float], xlabel: str, ylabel: str) -> Figure:
    """Two measurements of the same cells against each other, with the line on which they agree."""
    figure, axes = new_axes(xlabel, ylabel)
    axes.scatter(a, b, s=6, color=COLORS[0], alpha=0.4, linewidths=0, rasterized=len(a) > 300)
    both = [*a, *b]
    axes.plot([min(both), max(both)], [min(both), max(both)], color=QUIET, linestyle="--", linewidth=1, label="equal")
    legend(axes)
    return figure


@styled
def calibration(predicted: Sequence[float], true: Sequence[float], bins: int = 10) -> Figure:
    """What a predictor says against what is true, both places in a ranking from 0 to 1, and the mean in each tenth."""
    figure, axes = new_axes("predicted place in the ranking", "true place in the ranking")
    predicted, true = np.asarray(predicted), np.asarray(true)
    axes.scatter(predicted, true, s=7, color=QUIET, alpha=0.5, linewidths=0, label="held-out cells")
    place = np.clip((predicted * bins).astype(int), 0, bins - 1)
    filled = [i for i in range(bins) if (place == i).any()]
    means = [[values[place == i].mean() for i in filled] for values in (predicted, true)]
    axes.plot(*means, color=COLORS[0], marker="o", ms=4, label="mean of a tenth")
    axes.plot([0, 1], [0, 1], color=COLORS[1], linestyle="--", linewidth=1, label="equal")
    legend(axes)
    return figure


# ---------------------------------------------------------------------------------------------------- training


@styled
def curves(
    lines: dict[str, tuple],
    ylabel: str,
    xlabel: str = "epoch",
    marks: dict[str, float] | None = None,
    levels: dict[str, float] | None = None,
) -> Figure:
    """Values over steps. lines: name -> (steps, values). marks: name -> step of a vertical line, levels: -> of a level.

    A value of None is a gap.
    """
    figure, axes = new_axes(xlabel, ylabel)
    for i, (name, (steps, values)) in enumerate(lines.items()):
        values = [np.nan if value is None else value for value in values]
        marker = MARKERS[i % len(MARKERS)] if len(values) < 30 else None
        look = {"color": COLORS[i % len(COLORS)], "linestyle": DASHES[i % len(DASHES)], "marker": marker, "ms": 4}
        axes.plot(steps, values, label=name, **look)
    for name, step in (marks or {}).items():
        axes.axvline(step, color=QUIET, linestyle=":", linewidth=1.2, label=name)
    for i, (name, level) in enumerate((levels or {}).items()):
        axes.axhline(level, color=QUIET, linestyle=DASHES[1 + i % 4], linewidth=1.2, label=name)
    axes.xaxis.get_major_locator().set_params(integer=True)
    legend(axes)
    return figure


@styled
def heat_map(counts: np.ndarray, xlabel: str, ylabel: str, names: Sequence[str] | None = None) -> Figure:
    """Counts (C, C): the colour is the share of a row, the number the count. names: of the classes."""
    counts = np.asarray(counts)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    size = len(counts)
    figure, axes = new_axes(xlabel, ylabel, SIZE if size < 6 else (4.7, 4.3))
    mesh = axes.pcolormesh(shares, cmap="cividis_r", vmin=0, vmax=1, rasterized=size > 20)
    for row in range(size if size <= 20 else 0):
        for column in range(size):
            color = "white" if shares[row, column] > 0.55 else "black"
            axes.text(column + 0.5, row + 0.5, str(counts[row, column]), ha="center", va="center", color=color,
                      fontsize=11 if size < 6 else 7.5)  # fmt: skip
    ticks = np.arange(size) + 0.5
    labels = list(names) if names is not None else list(map(str, range(size)))
    if size <= 20:
        axes.set_xticks(ticks, labels, rotation=0 if size < 6 else 60, ha="center" if size < 6 else "right")
        axes.set_yticks(ticks, labels)
    axes.invert_yaxis()
    axes.grid(False)
    bar = figure.colorbar(mesh, ax=axes, shrink=0.9)
    bar.set_label("share of the row", color=INK)
    bar.ax.tick_params(colors=INK)
    bar.outline.set_visible(False)
    return figure


@styled
def heat_maps(panels: dict[str, np.ndarray], xlabel: str, ylabel: str, names: Sequence[str]) -> Figure:
    """Several tables of counts (C, C) beside each other, for a wide page: colour and number are the share of a row.

    panels: title -> counts. names: of the classes.
    """
    figure = Figure(figsize=(2.55 * len(panels), 2.75), layout="constrained")
    for axes, (title, counts) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        shares = np.asarray(counts) / np.maximum(np.sum(counts, 1, keepdims=True), 1)
        axes.pcolormesh(shares, cmap="cividis_r", vmin=0, vmax=1, edgecolors="white", linewidth=2)
        for row, column in np.ndindex(*shares.shape):
            color = "white" if shares[row, column] > 0.55 else "black"
            place = {"ha": "center", "va": "center", "color": color, "fontsize": 12}
            axes.text(column + 0.5, row + 0.5, f"{shares[row, column]:.2f}", **place)
        ticks = np.arange(len(names)) + 0.5
        axes.set_xticks(ticks, names)
        axes.set_yticks(ticks, names, rotation=90, va="center")
        axes.set(title=title, xlabel=xlabel, ylabel=ylabel, aspect="equal")
        axes.title.set_fontsize(10.5)
        axes.tick_params(length=0)
        for side in axes.spines.values():
            side.set_visible(False)
        axes.invert_yaxis()
        axes.grid(False)
    return figure


@styled
def grouped_bars(groups: dict[str, np.ndarray], labels: Sequence[str], xlabel: str) -> Figure:
    """Shares side by side. groups: name of a set of cells -> its shares, one for each label."""
    figure, axes = new_axes(xlabel, "share")
    width = 0.8 / max(len(groups), 1)
    for i, (name, shares) in enumerate(groups.items()):
        places = np.arange(len(labels)) + (i - (len(groups) - 1) / 2) * width
        look = {"color": COLORS[i % len(COLORS)], "hatch": ("", "///", "...")[i % 3], "edgecolor": "white"}
        axes.bar(places, shares, width * 0.92, label=name, linewidth=0, **look)
    long = max(map(len, labels), default=0) > 4
    axes.set_xticks(range(len(labels)), labels, rotation=30 if long else 0, ha="right" if long else "center")
    axes.grid(axis="x", visible=False)
    legend(axes)
    return figure


# ------------------------------------------------------------------------------------------- rankings and search


@styled
def ranks_by_epoch(rounds: list[list[tuple[int, float]]]) -> Figure:
    """The place of every candidate among those trained as long, by epochs.

    rounds: for each candidate, (epochs, accuracy) after each round that it was trained in; the best at the end first.
    """
    figure, axes = new_axes("epochs", "rank (1 is best)")
    reached: dict[int, list[float]] = {}
    for measured in rounds:
        for epochs, accuracy in measured:
            reached.setdefault(epochs, []).append(accuracy)
    for i, measured in reversed(list(enumerate(rounds))):
        ranks = [1 + sum(other > accuracy for other in reached[epochs]) for epochs, accuracy in measured]
        look = {"color": COLORS[i], "linewidth": 2, "zorder": 3} if i < 3 else {"color": QUIET, "alpha": 0.5}
        label = f"best {i + 1}" if i < 3 else None
        axes.plot([epochs for epochs, _ in measured], ranks, marker=MARKERS[min(i, 3)], ms=4, label=label, **look)
    axes.set_xticks(sorted(reached))
    axes.invert_yaxis()
    axes.yaxis.get_major_locator().set_params(integer=True)
    legend(axes)
    return figure


@styled
def regret(methods: dict[str, np.ndarray], ylabel: str = "regret") -> Figure:
    """Regret after each query. methods: name -> (seeds, queries).

    The line is the mean over seeds, the band one standard deviation.
    """
    figure, axes = new_axes("queries", ylabel)
    lowest = min((values[values > 0].min() for values in methods.values() if (values > 0).any()), default=1e-4)
    for i, (name, values) in enumerate(methods.items()):
        queries, mean, spread = np.arange(1, values.shape[1] + 1), values.mean(0), values.std(0)
        look = {"color": COLORS[i % len(COLORS)]}
        axes.plot(queries, np.maximum(mean, lowest / 2), linestyle=DASHES[i % len(DASHES)], label=name, **look)
        band = (np.maximum(mean - spread, lowest / 2), np.maximum(mean + spread, lowest / 2))
        axes.fill_between(queries, *band, alpha=0.15, linewidth=0, **look)
    axes.set(xscale="log", yscale="log")
    for axis in (axes.xaxis, axes.yaxis):  # plain numbers: powers would need mathematical text
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_minor_formatter(NullFormatter())
    legend(axes)
    return figure
