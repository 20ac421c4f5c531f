"""Plots of measurements for people, each as SVG and PNG.

`ratios`: how many times better ours is than each peer, with its spread, and where it must be. `levels`, `levels-down`:
rates by zstd level, for each kind of data and each link.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files only: no display is asked for
from matplotlib import pyplot
from matplotlib.figure import Figure

from bench.required import DATA, EVERY, FIXED, LINKS, NEAR, REQUIRED, Bound

Summary = dict[str, Any]
REACHED, MISSED, NEITHER = "#4c9f70", "#c8553d", "#8a94a6"
BAR = 0.3  # inches of height


def draw(summaries: Sequence[Summary], directory: Path) -> list[Path]:
    """What there is to draw of these; the files that were written."""
    directory.mkdir(parents=True, exist_ok=True)
    drawn = {"ratios": _ratios(summaries), **{name: _levels(name, summaries) for name in ("levels", "levels-down")}}
    written = []
    for name, figure in drawn.items():
        if figure is None:
            continue
        for kind in ("svg", "png"):
            written.append(directory / f"{name}.{kind}")
            figure.savefig(written[-1], dpi=150, bbox_inches="tight")
        pyplot.close(figure)
    return written


def _bounds() -> dict[tuple[str, str, str, str], Bound]:
    every = (bound for each in REQUIRED for bound in each.bounds if bound.of == "ratio")
    return {(bound.benchmark, bound.row, bound.peer, bound.figure): bound for bound in every}


def _ratios(summaries: Sequence[Summary]) -> Figure | None:
    """A bar for the first figure of each comparison, and for every other that must be somewhere."""
    bounds, bars = _bounds(), []
    for summary in summaries:
        for peer, figures in summary["versus"].items():
            for number, (figure, values) in enumerate(figures.items()):
                key = (summary["benchmark"], summary["row"])
                bound = bounds.get((*key, peer, figure)) or bounds.get((*key, EVERY, figure))
                if number == 0 or bound is not None:
                    label = f"{' '.join(key)}: {summary['ways'][0]['name']} / {peer}, {figure}"
                    bars.append((label, values, bound))
    if not bars:
        return None
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + BAR * len(bars)))
    for place, (_, values, bound) in enumerate(reversed(bars)):
        ratio = values["ratio"]
        colour = NEITHER if bound is None else REACHED if bound.holds(ratio) else MISSED
        spread = [[ratio - values["ratio_min"]], [values["ratio_max"] - ratio]]
        axes.barh(place, ratio, height=0.6, color=colour, xerr=spread, error_kw={"elinewidth": 1, "capsize": 2})
        if bound is not None and bound.at_least is not None:
            axes.plot([bound.at_least] * 2, [place - 0.42, place + 0.42], color="black", linewidth=2)
    axes.set_yticks(range(len(bars)), [label for label, _, _ in reversed(bars)], fontsize=8)
    axes.set_xscale("log")
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set_xlabel("how many times better ours is: median and spread; black: required (green reached, red missed)")
    return figure


def _levels(name: str, summaries: Sequence[Summary]) -> Figure | None:
    """Rates by level, one plot for each kind of data and each link."""
    cells = {summary["row"]: summary for summary in summaries if summary["benchmark"] == name}
    if not cells:
        return None
    figure, grid = pyplot.subplots(len(DATA), len(LINKS), figsize=(11, 10), squeeze=False)
    for row, kind in enumerate(DATA):
        for column, link in enumerate(LINKS):
            axes = grid[row][column]
            axes.set_title(f"{kind}, {link}", fontsize=9)
            if summary := cells.get(f"{kind} {link}"):
                names = [way["name"] for way in summary["ways"]]
                ours = summary["ours"]["MB/s"]["median"]
                rates = [ours, *(summary["versus"][name]["MB/s"]["peer"] for name in names[1:])]
                colours = [REACHED if ours >= NEAR * max(rates) else MISSED] + [NEITHER] * len(FIXED)
                axes.bar(names, rates, color=colours[: len(rates)])
                axes.tick_params(labelsize=7)
                axes.set_ylabel("MB/s", fontsize=7)
            else:
                axes.set_axis_off()
    figure.tight_layout()
    return figure
