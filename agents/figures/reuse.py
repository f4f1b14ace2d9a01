"""What reuse of midpoints buys: the MSE over the SNR, and the least deadline over the reuse ratio."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agents.figures.canvas import (
    SNR_LABEL,
    add_grid,
    add_legend_above,
    add_note,
    legend_entries,
    new_figure,
    save_figure,
)
from agents.figures.series import zero_floor
from agents.figures.style import BLUE, GRAY, GREEN, VERMILION
from refine_env.errors import import_extra
from refine_env.evaluation import Table

__all__ = ["TITLES", "draw_deadlines", "draw_reuse"]

TITLES = {"lookahead": "look-ahead, the paper's coder", "dp": "optimum (DP), closed-loop coder"}
_DASHES = {"no": "-", "yes": "--"}
_SNR_COLORS = (VERMILION, GREEN, BLUE)


def _ratio_colors(cells: Table) -> dict[float, Any]:
    """A color for each ratio, in order: darker is less reuse."""
    ratios = sorted({row["ratio"] for row in cells})
    colors = import_extra("matplotlib", "plot").colormaps["viridis"]
    return {ratio: colors(0.92 * k / max(len(ratios) - 1, 1)) for k, ratio in enumerate(ratios)}


def _draw_errors(axes: Any, cells: Table, colors: dict[float, Any], floor: float) -> None:
    """The mean latent MSE over the SNR: a color a ratio, dashed where the device has the midpoint."""
    for ratio, color in colors.items():
        for shared, dashes in _DASHES.items():
            rows = [row for row in cells if (row["ratio"], row["shared"]) == (ratio, shared)]
            if not rows:
                continue
            label = f"R = {ratio:g}, m = {rows[0]['step']}" if shared == "no" else None
            snrs_db = [row["snr_db"] for row in rows]
            means = [max(row["latent_mse"], floor) for row in rows]
            axes.plot(snrs_db, means, dashes, color=color, marker="o", markersize=3, linewidth=1.2, label=label)
            ends = [[max(row[f"latent_mse_{end}"], floor) for row in rows] for end in ("low", "high")]
            axes.fill_between(snrs_db, *ends, color=color, alpha=0.15, linewidth=0)
    axes.set_yscale("log")
    axes.set_xlabel(SNR_LABEL)
    axes.set_xticks(sorted({row["snr_db"] for row in cells}))
    add_grid(axes)


def draw_deadlines(axes: Any, deadlines: Table) -> None:
    """The least deadline over the reuse ratio: a color an SNR, dashed where the device has the midpoint."""
    for k, snr_db in enumerate(sorted({row["snr_db"] for row in deadlines})):
        color = _SNR_COLORS[k % len(_SNR_COLORS)]
        for shared, dashes in _DASHES.items():
            # Without reuse nothing is shared, and both curves begin there.
            rows = [
                row
                for row in deadlines
                if row["snr_db"] == snr_db
                and row["deadline"] is not None
                and (row["shared"] == shared or row["ratio"] == 0.0)
            ]
            values = [row["deadline"] for row in rows]
            bars = [
                [value - row["deadline_low"] for value, row in zip(values, rows, strict=True)],
                [row["deadline_high"] - value for value, row in zip(values, rows, strict=True)],
            ]
            label = f"{snr_db:g} dB" if shared == "no" else None
            style = {"color": color, "marker": "o", "markersize": 3, "capsize": 2.0, "linewidth": 1.2}
            axes.errorbar([row["ratio"] for row in rows], values, yerr=bars, linestyle=dashes, label=label, **style)
    axes.set_xlabel("reuse ratio R")
    axes.set_ylim(bottom=0.0)
    add_grid(axes)


def draw_reuse(tables: tuple[Table, Table], folder: Path) -> list[Path]:
    """``reuse.png`` and ``.pdf``: four panels, a column a policy.

    Above, the mean latent MSE at the deadline over the SNR, with 95 % bands; means of exactly 0 stand on a marked floor
    a decade below the smallest positive one. Below, the least deadline that reaches the target over the reuse ratio.

    Args:
        tables: as :func:`agents.studies.reuse.read_reuse` reads them.
        folder: folder for the files, which are returned.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    cells, deadlines = tables
    policies = list(dict.fromkeys(row["agent"] for row in cells))
    figure, panels = new_figure(5.0 * len(policies), 7.6, 2, len(policies), squeeze=False, sharey="row")
    floor = zero_floor(row["latent_mse"] for row in cells)
    colors = _ratio_colors(cells)
    for policy, errors, times in zip(policies, *panels, strict=True):
        _draw_errors(errors, [row for row in cells if row["agent"] == policy], colors, floor)
        errors.set_title(TITLES.get(policy, policy), fontsize=10)
        if any(row["latent_mse"] == 0.0 for row in cells):
            errors.axhline(floor, color=GRAY, linewidth=0.8)
            add_note(errors, "exactly 0", (0.0, floor), (4, 4))
            errors.set_ylim(bottom=floor / 2.0)
        draw_deadlines(times, [row for row in deadlines if row["agent"] == policy])
    panels[0, 0].set_ylabel(f"latent MSE at the deadline, $T_d$ = {cells[0]['deadline']}")
    panels[1, 0].set_ylabel(f"least $T_d$ with a mean MSE of {deadlines[0]['target_mse']:g} [slots]")
    for axes in panels[:, 0]:
        axes.errorbar([], [], linestyle="--", color=GRAY, label="the device has $x_m$, too")
    add_legend_above(figure, panels[0, 0])
    panels[1, 0].legend(*legend_entries(panels[1, 0]), fontsize=8, loc="upper right")
    return save_figure(figure, folder, "reuse")
