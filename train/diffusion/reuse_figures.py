"""Figures of ``python -m train.diffusion.reuse``, each a function of its tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.figures import save_figure
from agents.figures.canvas import add_grid, add_legend_above, new_figure
from agents.figures.style import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY_BLUE, VERMILION
from refine_env.evaluation import Table

__all__ = ["KIND_LABELS", "draw_quality", "draw_similarity", "draw_strips"]

KIND_LABELS = {"tone": "another skin tone", "role": "another role or gender", "unrelated": "unrelated"}
_MODE_STYLES: dict[str, dict[str, Any]] = {
    "vanilla": {"color": BLACK, "marker": "o"},
    "switch": {"color": VERMILION, "marker": "s"},
    "two-stage": {"color": BLUE, "marker": "D"},
    "mean": {"color": GREEN, "marker": "^"},
    "mean-plain": {"color": PURPLE, "marker": "v", "linestyle": "--"},
}
_KIND_COLORS = dict(zip(KIND_LABELS, (ORANGE, SKY_BLUE, BLACK), strict=True))
_SCORE_LABELS = {
    "nmse": "NMSE against the full run",
    "psnr_db": "PSNR against the full run [dB]",
    "family_kept": "family kept",
}


def draw_quality(summary: Table, folder: Path) -> list[Path]:
    """``reuse-quality.png`` and ``.pdf``: scores over the reuse ratio, a column a kind of pairs.

    Args:
        summary: rows of ``train.diffusion.reuse.SUMMARY_COLUMNS``.
        folder: for the files, which are returned.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    kinds = list(dict.fromkeys(row["kind"] for row in summary))
    modes = list(dict.fromkeys(row["mode"] for row in summary))
    figure, panels = new_figure(
        3.4 * len(kinds), 8.2, len(_SCORE_LABELS), len(kinds), sharex=True, sharey="row", squeeze=False
    )
    for line, (score, label) in zip(panels, _SCORE_LABELS.items(), strict=True):
        for axes, kind in zip(line, kinds, strict=True):
            for mode in modes:
                rows = [row for row in summary if row["kind"] == kind and row["mode"] == mode and row["ratio"] > 0.0]
                ratios = [row["ratio"] for row in rows]
                style = _MODE_STYLES[mode]
                axes.plot(ratios, [row[score] for row in rows], label=mode, markersize=4, linewidth=1.2, **style)
                low, high = ([row[score + end] for row in rows] for end in ("_low", "_high"))
                axes.fill_between(ratios, low, high, color=style["color"], alpha=0.1, lw=0)
            add_grid(axes)
        line[0].set_ylabel(label)
    for axes, kind in zip(panels[0], kinds, strict=True):
        axes.set_title(KIND_LABELS.get(kind, kind), fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("reuse ratio $R$")
        axes.set_ylim(0.0, 1.05)
    for axes in panels[0]:
        axes.set_ylim(bottom=0.0)
    add_legend_above(figure, panels[0][0])
    return save_figure(figure, folder, "reuse-quality")


def draw_similarity(rows: Table, folder: Path) -> list[Path]:
    """``reuse-similarity.png`` and ``.pdf``: cosine, NMSE and divergence with its bound, over the step t.

    Args:
        rows: of ``train.diffusion.reuse.SIMILARITY_COLUMNS``.
        folder: for the files, which are returned.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    figure, panels = new_figure(11.0, 3.8, 1, 3)
    labels = {"cosine": "cosine of $x_t(c)$ and $x_t(c')$", "nmse": "NMSE of $x_t$", "divergence": "KL [nat]"}
    for axes, (name, label) in zip(panels, labels.items(), strict=True):
        for kind, color in _KIND_COLORS.items():
            own = [row for row in rows if row["kind"] == kind and (name != "divergence" or row["divergence"] > 0.0)]
            steps = [row["step"] for row in own]
            axes.plot(steps, [row[name] for row in own], color=color, label=KIND_LABELS[kind])
            low, high = ([row[name + end] for row in own] for end in ("_low", "_high"))
            axes.fill_between(steps, low, high, color=color, alpha=0.15, lw=0)
            if name == "divergence":
                axes.plot(steps, [row["bound"] for row in own], color=color, linestyle="--", linewidth=1.0)
        axes.set_xlabel("step $t$ (the run goes from right to left)", fontsize=9)
        axes.set_ylabel(label)
        add_grid(axes)
    panels[2].set_yscale("log")
    panels[2].plot([], [], color=BLACK, linestyle="--", linewidth=1.0, label="the bound")
    panels[2].legend(fontsize=8)
    return save_figure(figure, folder, "reuse-similarity")


def draw_strips(tiles: NDArray[np.uint8], labels: Sequence[str], titles: Sequence[str], folder: Path) -> list[Path]:
    """``reuse-strip.png`` and ``.pdf``: images over the reuse ratio, a line a pair and mode.

    Args:
        tiles: uint8 (lines, columns, height, width, 3).
        labels: of the lines.
        titles: of the columns.
        folder: for the files, which are returned.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    lines, columns = tiles.shape[:2]
    figure, grid = new_figure(2.6 + 0.72 * columns, 0.4 + 0.74 * lines, lines, columns, squeeze=False)
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.02, wspace=0.0, hspace=0.0)
    for line, images, label in zip(grid, tiles, labels, strict=True):
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_linewidth(0.4)
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=7)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=8)
    return save_figure(figure, folder, "reuse-strip")
