"""Figures of ``python -m train.diffusion.radiomap.experiments``: scores over the reuse ratio, and strips of maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agents.figures import save_figure
from agents.figures.canvas import add_grid, add_legend_above, new_figure
from agents.figures.style import BLACK, BLUE, GREEN, VERMILION
from refine_env.evaluation import Table
from refine_env.radiomap import BLACK_DBM, WHITE_DBM
from train.diffusion.scene_sheet import BUILDING, STAR, draw_plan

__all__ = ["draw_quality", "draw_strips"]

TITLES = {"S1": "S1: the transmitter moves", "S2": "S2: cars appear", "S3": "S3: buildings change"}
_MODES: dict[str, dict[str, Any]] = {
    "vanilla": {"color": VERMILION, "marker": "o"},
    "two-stage": {"color": BLUE, "marker": "D"},
}
_TICKS = (0.02, 0.05, 0.1, 0.2, 0.5)
_LINES = {"copying": (BLACK, "-."), "regressor": (GREEN, "--")}


def draw_quality(summary: Table, folder: Path) -> list[Path]:
    """``radiomap-reuse.png`` and ``.pdf``: NMSE against the truth over R; a column an experiment, a line of panels a T.

    Args:
        summary: rows of ``train.diffusion.radiomap.experiments.SUMMARY_COLUMNS``.
        folder: for the files, which are returned.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    experiments = list(dict.fromkeys(row["experiment"] for row in summary))
    lengths = sorted({row["num_steps"] for row in summary})
    figure, panels = new_figure(
        3.2 * len(experiments), 2.7 * len(lengths) + 0.5, len(lengths), len(experiments), sharex=True, sharey=True,
        squeeze=False,
    )  # fmt: skip
    for line, num_steps in zip(panels, lengths, strict=True):
        for axes, experiment in zip(line, experiments, strict=True):
            rows = [row for row in summary if (row["experiment"], row["num_steps"]) == (experiment, num_steps)]
            (full,) = [row for row in rows if row["mode"] == "full"]
            for mode, style in _MODES.items():
                own = [row for row in rows if row["mode"] == mode]
                if not own:
                    continue
                own = [full, *own]
                ratios = [row["ratio"] for row in own]
                axes.plot(
                    ratios, [row["nmse_truth"] for row in own], label=mode, markersize=3.5, linewidth=1.2, **style
                )
                low, high = ([row[f"nmse_truth_{end}"] for row in own] for end in ("low", "high"))
                axes.fill_between(ratios, low, high, color=style["color"], alpha=0.15, lw=0)
            for mode, (color, pattern) in _LINES.items():
                for row in rows:
                    if row["mode"] == mode:
                        label = "copying the old map" if mode == "copying" else mode
                        axes.axhline(row["nmse_truth"], color=color, linestyle=pattern, linewidth=1.0, label=label)
            axes.set_yscale("log")
            axes.set_yticks(_TICKS, [f"{value:g}" for value in _TICKS])
            axes.minorticks_off()
            add_grid(axes)
        line[0].set_ylabel(f"T = {num_steps}\nNMSE against the truth")
    for axes, experiment in zip(panels[0], experiments, strict=True):
        axes.set_title(TITLES[experiment], fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("reuse ratio $R$")
    add_legend_above(figure, panels[0][0])
    return save_figure(figure, folder, "radiomap-reuse")


def draw_strips(strips: Sequence[dict[str, Any]], folder: Path) -> list[Path]:
    """``radiomap-changes.png`` and ``.pdf``: of each experiment old and new scene, their truths, and the maps over R.

    Args:
        strips: of ``train.diffusion.radiomap.experiments.strip``.
        folder: for the files, which are returned.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    modes = list(strips[0]["modes"])
    ratios = strips[0]["ratios"]
    columns = 3 + len(ratios)
    lines = len(modes) * len(strips)
    figure, grid = new_figure(1.12 * columns + 1.4, 1.16 * lines + 0.5, lines, columns, squeeze=False)
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.02, wspace=0.0, hspace=0.0)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_linewidth(0.4)
    for number, strip in enumerate(strips):
        top, *below = grid[number * len(modes) : (number + 1) * len(modes)]
        for axes, which in ((top[0], "old"), *((line[0], "new") for line in below[:1])):
            scene = strip[which]
            axes.imshow(draw_plan(scene), extent=(0, scene.side, scene.side, 0), interpolation="nearest")
            axes.plot(*scene.transmitter, marker="*", markersize=8, color=STAR, markeredgecolor="white")
            axes.set_xlabel(f"{which} scene", fontsize=7, labelpad=2)
        for axes, which in ((top[1], "old truth"), *((line[1], "truth") for line in below[:1])):
            shown = _show(axes, strip[which], strip["old" if which == "old truth" else "new"])
            axes.set_xlabel(which, fontsize=7, labelpad=2)
        _show(top[2], strip["full"], strip["new"])
        for axes in [line[2] for line in below]:
            axes.set_axis_off()
        for line, mode in zip((top, *below), modes, strict=True):
            for axes, gray_map in zip(line[3:], strip["modes"][mode], strict=True):
                shown = _show(axes, gray_map, strip["new"])
            line[-1].yaxis.set_label_position("right")
            line[-1].set_ylabel(mode, fontsize=8)
        top[0].set_ylabel(strip["label"].replace(", ", "\n"), fontsize=8)
    for axes, title in zip(grid[0][2:], ["R = 0", *(f"R = {ratio:g}" for ratio in ratios)], strict=True):
        axes.set_title(title, fontsize=8)
    grid[0][0].set_title("scene", fontsize=8)
    grid[0][1].set_title("truth", fontsize=8)
    figure.colorbar(shown, ax=grid, shrink=0.5, aspect=40, pad=0.01, label="received power [dBm]")
    return save_figure(figure, folder, "radiomap-changes")


def _show(axes: Any, gray_map: Any, scene: Any) -> Any:
    """A map in dBm, with the scene's buildings over it."""
    power = BLACK_DBM + np.ma.masked_array(gray_map, mask=scene.buildings) * (WHITE_DBM - BLACK_DBM)
    axes.set_facecolor(BUILDING)
    return axes.imshow(power, interpolation="nearest", cmap="viridis", vmin=BLACK_DBM, vmax=WHITE_DBM)
