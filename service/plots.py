"""Pictures for people, on a headless machine too: tiles by Pillow, curves by Matplotlib's own canvas."""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from service.masks import Masking, coverage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CELL, _GAP, _LINE = 10, 12, 16
_HIDDEN, _CONTEXT = (226, 226, 226), (66, 112, 178)
_TARGETS = ((217, 95, 2), (231, 158, 44), (166, 86, 40), (240, 199, 94))
_SCALE, _MOST_CELLS, _FEW = "viridis", 12, 6  # of scores; values of a setting that make cells, that are all named
_BATCH, _STEPS = 64, 64  # draws that coverage maps average


def mask_sheet(masking: Masking, grid: tuple[int, int], seed: int, examples: int = 8) -> Image.Image:
    """Draw the masks of `examples` steps and, below, how often each patch is context and target.

    Blue is context; the shades of orange are targets, the later above the earlier; grey is neither.
    """
    drawn = [masking.draw(seed, step, 0, 1) for step in range(examples)]
    tiles = [_mask_tile(context[0], targets[0], grid) for context, targets in drawn]
    titles = [f"step {step}: {c.shape[1]} + {t.shape[1]} x {t.shape[2]}" for step, (c, t) in enumerate(drawn)]
    counted = [coverage(masking.draw(seed, step, 0, _BATCH), grid[0] * grid[1]) for step in range(_STEPS)]
    for name, share in zip(("context", "target"), np.mean(counted, 0), strict=True):
        tiles.append(_heat_tile(share.reshape(grid)))
        titles.append(f"{name} {share.min():.2f} … {share.max():.2f}")
    return tile_sheet(tiles, titles, columns=min(4, examples))


def tile_sheet(tiles: list[NDArray[Any]], titles: list[str], columns: int) -> Image.Image:
    """Put RGB pictures of one size, (H, W, 3) uint8, into rows with a line of text above each."""
    height, width = tiles[0].shape[:2]
    width = max(width, 150)
    rows = -(-len(tiles) // columns)
    size = columns * (width + _GAP) + _GAP, rows * (height + _LINE + _GAP) + _GAP
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    for number, (tile, title) in enumerate(zip(tiles, titles, strict=True)):
        row, column = divmod(number, columns)
        left, top = _GAP + column * (width + _GAP), _GAP + row * (height + _LINE + _GAP)
        draw.text((left, top), title, fill="black")
        sheet.paste(Image.fromarray(tile), (left, top + _LINE))
    return sheet


def _mask_tile(context: NDArray[Any], targets: NDArray[Any], grid: tuple[int, int]) -> NDArray[np.uint8]:
    cells = np.full((grid[0] * grid[1], 3), _HIDDEN, np.uint8)
    cells[context] = _CONTEXT
    for number, target in enumerate(targets):
        cells[target] = _TARGETS[number % len(_TARGETS)]
    return _enlarge(cells.reshape(*grid, 3))


def _heat_tile(share: NDArray[np.float64]) -> NDArray[np.uint8]:
    """White for 0, dark for the largest share."""
    level = share / max(share.max(), 1e-9)
    colour = 255 - level[..., None] * (255 - np.array((33, 60, 110)))
    return _enlarge(colour.astype(np.uint8))


def _enlarge(cells: NDArray[np.uint8]) -> NDArray[np.uint8]:
    big = cells.repeat(_CELL, 0).repeat(_CELL, 1)
    big[_CELL - 1 :: _CELL], big[:, _CELL - 1 :: _CELL] = 255, 255
    return big


_NORMS = "norm of gradient and weights"
_SPECTRAL, _SPREAD = ("effective_rank", "rankme", "lidar"), ("std_mean", "std_min")
_PANELS: dict[str, Callable[[str], bool]] = {
    "loss": lambda name: name == "loss",
    "learning rate": lambda name: name == "lr",
    "momentum of the target encoder": lambda name: name == "momentum",
    "rank": lambda name: name.startswith("monitor/") and name.endswith(_SPECTRAL),
    "standard deviation of a dimension": lambda name: name.startswith("monitor/") and name.endswith(_SPREAD),
    _NORMS: lambda name: name in ("monitor/grad_norm", "monitor/weight_norm"),
    "validation probe, %": lambda name: name == "val_linear",
}


_PLATE = {"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 1}
_PHASES = {
    "step": "#4270b2",
    "lost": "#d95f02",
    "down": "#a6260b",
    "start": "#e79e2c",
    "restore": "#f0c763",
    "checkpoint": "#6aa56a",
    "evaluate": "#8c7fb8",
    "data": "#9a9a9a",
}


def goodput(
    seconds: Mapping[str, float],
    legs: Sequence[Sequence[tuple[float, int]]],
    commits: Sequence[tuple[float, int]],
    faults: Sequence[float],
) -> bytes:
    """Draw where a run's wall time went, and its steps over time: a PNG.

    Args:
        seconds: by phase.
        legs: of each leg, (seconds, steps done).
        commits: (seconds, step) of checkpoints, as dots.
        faults: seconds at which a driver saw one, as dashed lines.
    """
    figure = _figure(12, 5)
    bar, steps = figure.subplots(2, 1, height_ratios=(1, 4))
    left, total = 0.0, sum(seconds.values()) or 1.0
    for phase, colour in _PHASES.items():
        minutes = seconds.get(phase, 0.0) / 60
        bar.barh(0, minutes, left=left, color=colour, label=f"{phase} {minutes * 6000 / total:.1f} %")
        left += minutes
    bar.set(title="wall time, minutes", yticks=[])
    bar.legend(fontsize="small", ncols=len(_PHASES), loc="upper center", bbox_to_anchor=(0.5, -0.3))
    for points in legs:
        steps.plot([at / 60 for at, _ in points], [step for _, step in points], color=_PHASES["step"], linewidth=1)
    steps.scatter([at / 60 for at, _ in commits], [step for _, step in commits], s=8, color=_PHASES["checkpoint"])
    for at in faults:
        steps.axvline(at / 60, color=_PHASES["down"], linestyle="--", linewidth=1)
    steps.set(xlim=bar.get_xlim(), ylabel="steps done", xlabel="minutes; dots are checkpoints, dashed lines faults")
    return _png(figure)


def curves(metrics: Mapping[int, Mapping[str, float]]) -> bytes:
    """Draw a run's metrics, by step, over its steps: a PNG with the panels that have any."""
    names = sorted({name for row in metrics.values() for name in row})
    shown = {title: chosen for title, wanted in _PANELS.items() if (chosen := [n for n in names if wanted(n)])}
    figure = _figure(12, 3 * -(-max(1, len(shown)) // 2))
    for number, (title, chosen) in enumerate(shown.items(), 1):
        axes = figure.add_subplot(-(-len(shown) // 2), 2, number, title=title, xlabel="step")
        for name in chosen:
            points = [(step, metrics[step][name]) for step in sorted(metrics) if name in metrics[step]]
            axes.plot(*zip(*points, strict=True), label=name.removeprefix("monitor/"), linewidth=1)
        axes.set_yscale("log" if title == _NORMS else "linear")
        axes.legend(fontsize="small")
    return _png(figure)


def heat_map(
    points: Sequence[Mapping[str, Any]],
    scores: Sequence[float],
    marks: Sequence[str],
    axes: Sequence[str],
    title: str,
    logarithmic: Collection[str] = (),
) -> bytes:
    """Draw scores over two settings: cells where both have few values, else dots; a PNG.

    Args:
        points: settings of each trial.
        scores: of each trial.
        marks: a word on each trial, such as why it ended early; '' for none.
        axes: names of the two settings, across and up.
        title: what the scores are.
        logarithmic: settings drawn on a logarithmic scale.
    """
    figure = _figure(8, 6)
    plot = figure.add_subplot(1, 1, 1, title=title, xlabel=axes[0], ylabel=axes[1])
    values = [_levels([point[axis] for point in points]) for axis in axes]
    if all(len(each) <= _MOST_CELLS for each in values):
        shown = _cells(plot, points, scores, marks, axes, values)
    else:
        across, up = ([_number(point[axis], each) for point in points] for axis, each in zip(axes, values, strict=True))
        shown = plot.scatter(across, up, c=scores, s=120, cmap=_SCALE, edgecolors="#404040")
        for x, y, mark in zip(across, up, marks, strict=True):
            plot.annotate(mark, (x, y), xytext=(0, 8), textcoords="offset points", fontsize="x-small", ha="center")
        plot.set(xscale=_scale(axes[0], logarithmic), yscale=_scale(axes[1], logarithmic))
    figure.colorbar(shown)
    return _png(figure)


def _cells(
    plot: Axes,
    points: Sequence[Mapping[str, Any]],
    scores: Sequence[float],
    marks: Sequence[str],
    axes: Sequence[str],
    values: Sequence[Sequence[Any]],
) -> Any:
    """Fill a cell with the best of its trials' scores, and say it; grey cells have none."""
    cells: dict[tuple[int, int], tuple[float, str]] = {}
    for point, score, mark in zip(points, scores, marks, strict=True):
        at = values[1].index(point[axes[1]]), values[0].index(point[axes[0]])
        cells[at] = max(cells.get(at, (-np.inf, "")), (score, mark))
    grid = np.full((len(values[1]), len(values[0])), np.nan)
    for at, (score, _) in cells.items():
        grid[at] = score
    plot.set_facecolor("#e2e2e2")
    shown = plot.imshow(grid, cmap=_SCALE, origin="lower", aspect="auto")
    middle = (np.nanmin(grid) + np.nanmax(grid)) / 2
    for (row, column), (score, mark) in cells.items():
        colour = "white" if score < middle else "black"
        plot.text(column, row, f"{score:.4g}\n{mark}".strip(), ha="center", va="center", color=colour, fontsize="small")
    plot.set_xticks(range(len(values[0])), [_label(value) for value in values[0]])
    plot.set_yticks(range(len(values[1])), [_label(value) for value in values[1]])
    return shown


def parallel_coordinates(
    points: Sequence[Mapping[str, Any]], scores: Sequence[float], title: str, logarithmic: Collection[str] = ()
) -> bytes:
    """Draw each trial as a line through its settings to its score, the better the lighter; a PNG."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    columns = {name: [point[name] for point in points] for name in points[0]} | {title: list(scores)}
    heights = [_heights(values, name in logarithmic, name != title) for name, values in columns.items()]
    figure = _figure(2.2 * len(columns) + 2, 5)
    plot = figure.add_subplot(1, 1, 1)
    shade = Normalize(min(scores), max(scores))
    for number in np.argsort(scores):
        path = [each[number] for each in heights]
        plot.plot(range(len(path)), path, color=colormaps[_SCALE](shade(scores[number])), linewidth=1.5)
    for x, (values, places) in enumerate(zip(columns.values(), heights, strict=True)):
        plot.axvline(x, color="#9a9a9a", linewidth=0.8)
        for value, height in _ticks(values, places):
            plot.text(x - 0.02, height, _label(value), fontsize="small", ha="right", va="center", bbox=_PLATE)
    plot.set_xticks(range(len(columns)), list(columns))
    plot.set(yticks=[], xlim=(-0.4, len(columns) - 0.8), ylim=(-0.05, 1.05))
    plot.spines[:].set_visible(False)
    return _png(figure)


def importance(shares: Mapping[str, float], title: str) -> bytes:
    """Draw the share of the variance of `title` that each setting explains; a PNG."""
    figure = _figure(7, 1 + 0.5 * len(shares))
    plot = figure.add_subplot(1, 1, 1, title=f"share of the variance of {title}", xlim=(0, 1))
    names = list(shares)[::-1]
    plot.barh(names, [shares[name] for name in names], color=_PHASES["step"])
    return _png(figure)


def _levels(values: Sequence[Any]) -> list[Any]:
    """Distinct values in order: numbers by size, all else as they come."""
    distinct: list[Any] = []
    for value in values:
        if value not in distinct:
            distinct.append(value)
    return sorted(distinct, key=_order)


def _order(value: Any) -> tuple[int, float, str]:
    number = isinstance(value, int | float)
    return (0, float(value), "") if number else (1, 0.0, str(value))


def _number(value: Any, levels: Sequence[Any]) -> float:
    return float(value) if all(isinstance(each, int | float) for each in levels) else float(levels.index(value))


def _heights(values: Sequence[Any], logarithmic: bool, even: bool) -> NDArray[np.float64]:
    """Places of values on an axis from 0 to 1; `even` spaces few of them evenly."""
    levels = _levels(values)
    if even and len(levels) <= _FEW:
        return np.array([levels.index(value) / max(1, len(levels) - 1) for value in values])
    numbers = np.array([_number(value, levels) for value in values])
    numbers = np.log(numbers) if logarithmic and (numbers > 0).all() else numbers
    low, high = numbers.min(), numbers.max()
    return (numbers - low) / (high - low) if high > low else np.full(len(numbers), 0.5)


def _ticks(values: Sequence[Any], heights: NDArray[np.float64]) -> list[tuple[Any, float]]:
    """Values to write on an axis: all where there are few, else the ends and one in the middle."""
    distinct = sorted({height: value for value, height in zip(values, heights.tolist(), strict=True)}.items())
    chosen = distinct if len(distinct) <= _FEW else [distinct[0], distinct[len(distinct) // 2], distinct[-1]]
    return [(value, height) for height, value in chosen]


def _label(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(_label(each) for each in value.values())
    if isinstance(value, list | tuple):
        return "–".join(map(_label, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _scale(name: str, logarithmic: Collection[str]) -> str:
    return "log" if name in logarithmic else "linear"


def _figure(width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100)
    return png.getvalue()
