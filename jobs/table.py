"""The result table: representations × labels, with the trained encoder's gain over the best baseline."""

from __future__ import annotations

import io
from typing import Any

_QUALITY = {
    "effective_rank": "eff. rank",
    "rankme": "RankMe",
    "lidar": "LiDAR",
    "alpha_req": "α",
    "uniformity": "uniformity",
    "alignment": "alignment",
    "std_mean": "std",
}
_TITLES = {"raw_pixels": "raw pixels", "random_encoder": "random encoder", "trained": "trained encoder"}


def render(result: dict[str, Any]) -> str:
    """Lay out `scores` and `paired` of a result as text, or what it has instead."""
    if "scores" not in result:
        return f"linear probe {result['val_linear']:.2f} ± {result['val_linear_se']:.2f} % on validation\n"
    from rich import box
    from rich.console import Console
    from rich.table import Table

    scores, paired = result["scores"], result["paired"]
    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"top-1 accuracy in %, {result['reported_split']} split",
        caption="gain over the better baseline, with its 95 % paired interval",
    )
    table.add_column("representation")
    for column in scores["trained"]:
        table.add_column(_heading(column), justify="right")
    for name, row in scores.items():
        table.add_row(_title(name), *(f"{value:.1f}" for value in row.values()))
    table.add_section()
    gains = (paired[column] for column in scores["trained"])
    table.add_row("gain", *(f"{gain['points']:+.1f} ± {gain['half_width']:.1f}" for gain in gains))
    text = io.StringIO()
    Console(file=text, width=100).print(table, _quality_table(result["quality"]))
    return text.getvalue()


def _quality_table(quality: dict[str, dict[str, Any]]) -> Any:
    """Label-free metrics of the same features, one row a representation."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title="quality of the features, without labels")
    table.add_column("representation", no_wrap=True)
    for heading in _QUALITY.values():
        table.add_column(heading, justify="right")
    for name, metrics in quality.items():
        cells = (f"{metrics[metric]:.3g}" if metric in metrics else "–" for metric in _QUALITY)
        table.add_row(_title(name), *cells)
    return table


def _title(name: str) -> str:
    return _TITLES.get(name, name.replace("_", " "))


def _heading(column: str) -> str:
    if column.isdigit():
        return f"{column} label{'s' * (column != '1')}/class"
    return {"all": "all labels", "knn": "k-NN"}[column]
