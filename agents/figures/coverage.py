"""How early a vehicle has a usable radio map: the least deadline over the reuse ratio, and the maps of one episode."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.figures.canvas import add_legend_above, add_power_bar, save_figure
from agents.figures.reuse import TITLES, draw_deadlines
from agents.figures.style import GRAY
from agents.studies.coverage import Maps
from refine_env.errors import import_extra
from refine_env.evaluation import Table

__all__ = ["draw_coverage"]


def draw_coverage(table: Table, maps: Maps | None, folder: Path) -> list[Path]:
    """``coverage.png`` and ``.pdf``: a panel a policy, and below them what a vehicle shows at several deadlines.

    Args:
        table: rows of :data:`agents.studies.coverage.COVERAGE_COLUMNS`.
        maps: of one episode; None leaves them out.
        folder: folder for the files, which are returned.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    policies = list(dict.fromkeys(row["agent"] for row in table))
    rows = 0 if maps is None else len(maps.pictures)
    figure = import_extra("matplotlib.figure", "plot").Figure(
        figsize=(5.0 * len(policies), 4.2 + 1.45 * rows), layout="constrained"
    )
    above, *below = figure.subfigures(
        1 + bool(rows), 1, height_ratios=[4.2, 1.45 * rows][: 1 + bool(rows)], squeeze=False
    )[:, 0]
    panels = above.subplots(1, len(policies), squeeze=False, sharey=True)[0]
    for policy, axes in zip(policies, panels, strict=True):
        draw_deadlines(axes, [row for row in table if row["agent"] == policy])
        axes.set_title(TITLES.get(policy, policy), fontsize=10)
    panels[0].set_ylabel(f"least deadline with a mean\ncoverage IoU of {table[0]['usable']:g} [slots]")
    panels[0].errorbar([], [], linestyle="--", color=GRAY, label="the vehicle has $x_m$, too")
    add_legend_above(above, panels[0])
    if maps is not None:
        _draw_maps(below[0], maps)
    return save_figure(figure, folder, "coverage")


def _draw_maps(figure: Any, maps: Maps) -> None:
    """A row a start, a column a deadline; beside them the server's map and the truth."""
    rows, columns = maps.pictures.shape[:2]
    panels = figure.subplots(rows, columns + 2, squeeze=False, width_ratios=[*[1.0] * columns, 0.15, 1.0])
    for line, ratio, shared, pictures, coverage in zip(
        panels, maps.ratios, maps.shared, maps.pictures, maps.coverage, strict=True
    ):
        for axes, picture, value in zip(line, pictures, coverage, strict=False):
            _show(axes, picture)
            axes.set_xlabel(f"IoU {value:.2f}", fontsize=8, labelpad=2)
        label = "no reuse" if ratio == 0.0 else f"R = {ratio:g}" + (",\n$x_m$ at the\nvehicle" if shared else "")
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    for axes, deadline in zip(panels[0], maps.deadlines, strict=False):
        axes.set_title(f"$T_d$ = {deadline}", fontsize=8)
    others = [("server's map $x_0$", maps.clean)] + ([("truth", maps.truth)] if maps.truth.size else [])
    for axes in panels[:, columns:].flat:
        axes.set_axis_off()
    for axes, (title, picture) in zip(panels[:, -1], others, strict=False):
        axes.set_axis_on()
        _show(axes, picture)
        axes.set_title(title, fontsize=8)
    title = f"the vehicle's map at the deadline, {maps.agent}, {maps.snr_db:g} dB"
    figure.suptitle(title, fontsize=9)
    if maps.scale is not None:
        add_power_bar(figure, panels, maps.scale, aspect=12 * rows)


def _show(axes: Any, picture: NDArray[np.uint8]) -> None:
    axes.imshow(picture, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_linewidth(0.4)
