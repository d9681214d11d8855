"""Pictures for people, on a headless machine too: tiles by Pillow, curves by Matplotlib's own canvas."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from service.masks import Masking, coverage

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CELL, _GAP, _LINE = 10, 12, 16
_HIDDEN, _CONTEXT = (226, 226, 226), (66, 112, 178)
_TARGETS = ((217, 95, 2), (231, 158, 44), (166, 86, 40), (240, 199, 94))
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = sorted({name for row in metrics.values() for name in row})
    shown = {title: chosen for title, wanted in _PANELS.items() if (chosen := [n for n in names if wanted(n)])}
    figure = Figure(figsize=(12, 3 * -(-max(1, len(shown)) // 2)), layout="constrained")
    FigureCanvasAgg(figure)
    for number, (title, chosen) in enumerate(shown.items(), 1):
        axes = figure.add_subplot(-(-len(shown) // 2), 2, number, title=title, xlabel="step")
        for name in chosen:
            points = [(step, metrics[step][name]) for step in sorted(metrics) if name in metrics[step]]
            axes.plot(*zip(*points, strict=True), label=name.removeprefix("monitor/"), linewidth=1)
        axes.set_yscale("log" if title == _NORMS else "linear")
        axes.legend(fontsize="small")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=100)
    return png.getvalue()
