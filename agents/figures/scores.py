"""The scores: how far each agrees with the latent MSE at the deadline, and two of them by policy."""

from __future__ import annotations

from pathlib import Path

from agents.figures.canvas import SNR_LABEL, add_grid, legend_entries, new_figure, save_figure
from agents.figures.curves import draw_policies
from agents.figures.series import error_bars
from agents.figures.style import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY_BLUE, VERMILION
from agents.studies.scores import SCORES
from refine_env.evaluation import Table

__all__ = ["draw_scores"]

_STYLES = {
    "anytime_mse": (VERMILION, "o"),
    "psnr_db": (BLUE, "s"),
    "ssim": (SKY_BLUE, "^"),
    "lpips": (PURPLE, "v"),
    "task_glyph": (GREEN, "D"),
    "task_group": (ORANGE, "P"),
    "task_coverage": (GREEN, "D"),
    "task_transmitter": (ORANGE, "P"),
    "task_truth": (BLACK, "X"),
}
_PANELS = {
    "anytime_mse": "anytime MSE: mean over the slots",
    "task_glyph": "share of devices whose glyph is recognized",
    "task_coverage": "coverage: intersection over union",
}


def draw_scores(means: Table, agreement: Table, out: Path) -> list[Path]:
    """``scores.png`` and ``.pdf``: Kendall's τ of every score against SNR, and anytime MSE and task by policy.

    With 95 % intervals. The task is left out where the table does not have it.

    Args:
        means: rows of :data:`agents.studies.scores.MEAN_COLUMNS`.
        agreement: rows of :data:`agents.studies.scores.AGREEMENT_COLUMNS`.
        out: folder for the files, which are returned.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    columns = [name for name in _PANELS if any(row[name] is not None for row in means)]
    figure, grid = new_figure(4.0 * (1 + len(columns)), 4.6, 1, 1 + len(columns), squeeze=False)
    left, *panels = grid[0]
    names = list(dict.fromkeys(row["score"] for row in agreement))
    for place, name in enumerate(names):
        color, marker = _STYLES[name]
        rows = [row for row in agreement if row["score"] == name and None not in (row["snr_db"], row["kendall_tau"])]
        # Side by side, since many of them are 1.
        moved = [row["snr_db"] + 0.18 * (place - (len(names) - 1) / 2) for row in rows]
        left.errorbar(
            moved,
            [row["kendall_tau"] for row in rows],
            yerr=error_bars(rows, "kendall_tau"),
            color=color,
            marker=marker,
            markersize=4,
            linewidth=1.2,
            capsize=2.0,
            label=SCORES[name].label,
        )
    left.axhline(1.0, color=BLACK, linewidth=0.6)
    left.set_ylim(top=1.05)
    left.set_ylabel("Kendall's τ with the order by latent MSE")
    left.set_xlabel(SNR_LABEL)
    left.legend(
        *legend_entries(left), fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False
    )
    add_grid(left)
    for axes, column in zip(panels, columns, strict=True):
        draw_policies(axes, means, column)
        axes.set_ylabel(_PANELS[column])
    for axes in (left, *panels):
        axes.set_xticks(sorted({row["snr_db"] for row in means}))
    figure.legend(*legend_entries(panels[0]), fontsize=8, loc="outside upper center", ncols=4, frameon=False)
    return save_figure(figure, out, "scores")
