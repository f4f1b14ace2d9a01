"""Curves over the SNR, from the summary of an evaluation: [K] Fig. 3a and Fig. 3b."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from agents.figures.canvas import SNR_LABEL, add_grid, add_legend_above, add_note, new_figure, save_figure
from agents.figures.series import no_delivery_level, policy_curves, zero_floor
from agents.figures.style import GRAY
from refine_env import ConfigurationError
from refine_env.evaluation import Table
from refine_env.metrics import MAX_PSNR_DB

__all__ = ["IMAGE_PANELS", "draw_fig3a", "draw_fig3b", "draw_policies", "image_columns"]

IMAGE_PANELS = {
    "lpips": "LPIPS at the deadline (lower is better)",
    "psnr_db": "PSNR at the deadline [dB]",
    "ssim": "SSIM at the deadline",
}
"""Columns of image metrics, with the labels of their axes."""


def image_columns(summary: Table) -> list[str]:
    """The image metrics that a summary has, in the order of :data:`IMAGE_PANELS`."""
    return [name for name in IMAGE_PANELS if any(row[name] is not None for row in summary)]


def draw_policies(axes: Any, summary: Table, column: str, floor: float = -math.inf) -> None:
    """Draw a line with error bars for each policy; a value of exactly 0 stands, hollow, at a floor above 0."""
    for curve in policy_curves(summary, column, floor):
        style = curve.style
        axes.errorbar(curve.snrs_db, curve.values, yerr=curve.bars, capsize=2.0, **style)
        at_floor = [row["snr_db"] for row in curve.rows if row[column] == 0.0]
        if at_floor and floor > 0.0:
            axes.plot(
                at_floor,
                [floor] * len(at_floor),
                linestyle="none",
                marker=style["marker"],
                markersize=style["markersize"] + 1.0,
                markerfacecolor="white",
                markeredgecolor=style["color"],
                zorder=6,
            )
    axes.set_xlabel(SNR_LABEL)
    add_grid(axes)


def draw_fig3a(summary: Table, out: Path) -> list[Path]:
    """Latent MSE at the deadline against SNR ([K] Fig. 3a), log axis, with 95 % intervals.

    Means of exactly 0 are drawn, hollow, at a marked floor a decade below the smallest positive mean.

    Args:
        summary: rows with :data:`refine_env.evaluation.SUMMARY_COLUMNS`.
        out: folder for ``fig3a.png`` and ``fig3a.pdf``, which are returned.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    floor = zero_floor(row["latent_mse"] for row in summary)
    figure, axes = new_figure(6.4, 4.6)
    draw_policies(axes, summary, "latent_mse", floor)
    axes.set_yscale("log")
    level = no_delivery_level(summary)
    axes.axhline(level, color=GRAY, linewidth=0.8, linestyle=":")
    add_note(axes, "nothing delivered", (1.0, level), (-3, 3), ha="right")
    if any(row["latent_mse"] == 0.0 for row in summary):
        axes.axhline(floor, color=GRAY, linewidth=0.8)
        add_note(axes, "exactly 0 (hollow)", (0.0, floor), (4, 4))
        axes.set_ylim(bottom=floor / 2.0)
    axes.set_ylabel("latent MSE at the deadline")
    axes.set_xticks(sorted({row["snr_db"] for row in summary}))
    add_legend_above(figure, axes)
    return save_figure(figure, out, "fig3a")


def draw_fig3b(summary: Table, out: Path) -> list[Path]:
    """Quality of the decoded image at the deadline against SNR: LPIPS ([K] Fig. 3b), PSNR and SSIM, a panel each.

    With 95 % intervals. Identical images have a PSNR of :data:`refine_env.metrics.MAX_PSNR_DB`. A metric that the
    table does not have is left out.

    Args:
        summary: rows with :data:`refine_env.evaluation.SUMMARY_COLUMNS`.
        out: folder for ``fig3b.png`` and ``fig3b.pdf``, which are returned.

    Raises:
        ConfigurationError: if the table has no image metric at all.
        MissingExtraError: if matplotlib is not installed.
    """
    columns = image_columns(summary)
    if not columns:
        raise ConfigurationError(
            "`summary` must have image metrics for Fig. 3b, got none. "
            "Make them with: python -m agents.evaluate --images"
        )
    figure, panels = new_figure(0.4 + 3.3 * len(columns), 3.7, 1, len(columns), squeeze=False)
    for axes, column in zip(panels[0], columns, strict=True):
        draw_policies(axes, summary, column)
        if column == "psnr_db":
            axes.axhline(MAX_PSNR_DB, color=GRAY, linewidth=0.8)
            axes.set_ylim(top=MAX_PSNR_DB * 1.08)
            add_note(axes, "100 dB and above", (0.0, MAX_PSNR_DB), (4, 3))
        axes.set_ylabel(IMAGE_PANELS[column])
    add_legend_above(figure, panels[0, 0])
    return save_figure(figure, out, "fig3b")
