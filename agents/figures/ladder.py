"""The ladder from the paper's policy to the optimum."""

from __future__ import annotations

from pathlib import Path

from agents.figures.canvas import SNR_LABEL, new_figure, save_figure
from agents.figures.style import BLACK, BLUE, GREEN, NOTE_COLOR, ORANGE, SKY_BLUE, VERMILION
from agents.studies.ladder import GROUP_TITLES
from refine_env.evaluation import Table

__all__ = ["draw_ladder"]

_MAIN_RUNGS = {
    "look-ahead": BLACK,
    "DP, with the paper's model": ORANGE,
    "+ current rate known": SKY_BLUE,
    "+ all bit depths": BLUE,
    "+ posterior mean": GREEN,
}
"""Rungs whose MSE is shown against the SNR, with their colors."""


def draw_ladder(cells: Table, totals: Table, folder: Path) -> list[Path]:
    """``ladder.png`` and ``.pdf``: every rung's gain with its interval and bound, and MSE against SNR of the main ones.

    Args:
        cells: rows of :data:`agents.studies.ladder.LADDER_COLUMNS`.
        totals: rows of :data:`agents.studies.ladder.RUNG_COLUMNS`.
        folder: folder for the files, which are returned.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    figure, (left, right) = new_figure(10.0, 6.4, 1, 2, width_ratios=(1.25, 1.0))
    position, ticks, labels = 0.0, [], []
    colors = {"paper": NOTE_COLOR, "alone": ORANGE, "ladder": BLUE, "without": SKY_BLUE}
    group = ""
    highest = max(max(row["gain"], row["bound_gain"] or 0.0) for row in totals)
    for row in totals:
        if row["group"] != group:
            group = row["group"]
            left.text(
                0.012, position, GROUP_TITLES[group], transform=left.get_yaxis_transform(), fontsize=8, va="center"
            )
            position += 1.0
        left.barh(position, row["gain"], height=0.7, color=colors[group])
        left.plot([row["gain_low"], row["gain_high"]], [position, position], color="black", linewidth=1.2)
        if row["bound_gain"] is not None:
            left.plot(row["bound_gain"], position, marker="|", color=VERMILION, markersize=9, markeredgewidth=2.0)
        ticks.append(position)
        labels.append(row["rung"])
        position += 1.0
    left.set_yticks(ticks, labels, fontsize=8)
    left.invert_yaxis()
    left.set_xscale("log")
    left.set_xlim(left=min(0.5, 0.8 * min(row["gain"] for row in totals)), right=1.6 * highest)
    left.axvline(1.0, color="black", linewidth=0.8)
    left.set_xlabel("gain: latent MSE of the look-ahead over that of the rung")
    left.plot([], [], color=VERMILION, marker="|", linestyle="none", markeredgewidth=2.0, label="clairvoyant bound")
    left.plot([], [], color="black", label="95 % interval")
    left.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=2, frameon=False)
    for label, color in _MAIN_RUNGS.items():
        rows = [row for row in cells if row["rung"] == label]
        if not rows:
            continue
        snrs_db = [row["snr_db"] for row in rows]
        right.plot(snrs_db, [row["latent_mse"] for row in rows], color=color, marker="o", markersize=3, label=label)
        right.fill_between(
            snrs_db, [row["ci_low"] for row in rows], [row["ci_high"] for row in rows], color=color, alpha=0.2, lw=0
        )
    last = [row for row in cells if row["rung"] == list(_MAIN_RUNGS)[-1] and row["bound"] is not None]
    right.plot(
        [row["snr_db"] for row in last],
        [row["bound"] for row in last],
        color=VERMILION,
        linestyle="--",
        linewidth=1.0,
        label="clairvoyant, of the last",
    )
    right.set_yscale("log")
    right.set_xlabel(SNR_LABEL)
    right.set_ylabel("latent MSE at the deadline")
    right.grid(True, which="major", alpha=0.3)
    right.legend(fontsize=8)
    return save_figure(figure, folder, "ladder")
