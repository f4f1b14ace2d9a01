"""What progressive refinement is worth against sequential schemes done well."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from agents.figures.canvas import SNR_LABEL, add_grid, add_note, new_figure, save_figure
from agents.figures.style import BLACK, BLUE, GRAY, GREEN, ORANGE, PURPLE, SKY_BLUE, VERMILION
from refine_env.evaluation import Table

__all__ = ["draw_sequential"]

_FLOOR = 1e-8
"""Means below are drawn here: beyond any that matters."""

_OWN: dict[tuple[str, str], tuple[str, str, str]] = {
    ("final-only", "forward"): ("Final-Only (paper)", VERMILION, "--"),
    ("final-adaptive", "forward"): ("final, adaptive rate", ORANGE, "-"),
    ("final-adaptive-closed-loop", "closed_loop"): ("final, adaptive, closed loop", ORANGE, "--"),
    ("dp-final", "closed_loop"): ("final, optimal", VERMILION, "-"),
    ("lookahead", "forward"): ("look-ahead (paper)", BLACK, "-"),
    ("dp", "closed_loop"): ("progressive, optimal", BLUE, "-"),
}
_STEP_COLORS = (PURPLE, SKY_BLUE, GREEN, ORANGE, VERMILION)


def _draw(axes: Any, rows: Iterable[dict[str, Any]], score: str, **style: Any) -> None:
    """A curve with its band; what is below the floor stands on it."""
    chosen = sorted((row for row in rows if row[score] is not None), key=lambda row: row["snr_db"])
    snrs_db = [row["snr_db"] for row in chosen]
    axes.plot(snrs_db, [max(row[score], _FLOOR) for row in chosen], marker="o", markersize=3, **style)
    ends = [[max(row[f"{score}_{end}"], _FLOOR) for row in chosen] for end in ("low", "high")]
    axes.fill_between(snrs_db, *ends, color=style["color"], alpha=0.15, linewidth=0)


def draw_sequential(cells: Table, folder: Path) -> list[Path]:
    """``sequential.png`` and ``.pdf``: sequential and progressive schemes, and generation in few steps, over the SNR.

    Args:
        cells: rows of :data:`agents.studies.sequential.CURVE_COLUMNS`.
        folder: folder for the files, which are returned.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    figure, (left, right) = new_figure(10.0, 4.8, 1, 2)
    own = (cells[0]["sampler"], cells[0]["steps"])
    first = [row for row in cells if (row["sampler"], row["steps"]) == own]
    for agent in dict.fromkeys(row["agent"] for row in first if row["agent"].startswith("final-q")):
        rows = [row for row in first if row["agent"] == agent and row["coder"] == "closed_loop"]
        _draw(left, rows, "latent_mse", color=GRAY, linewidth=0.8)
        left.annotate(agent.removeprefix("final-q"), (rows[-1]["snr_db"], max(rows[-1]["latent_mse"], _FLOOR)))
    for (agent, coder), (label, color, dashes) in _OWN.items():
        rows = [row for row in first if (row["agent"], row["coder"]) == (agent, coder)]
        _draw(left, rows, "latent_mse", color=color, linestyle=dashes, label=label)
    left.axhline(_FLOOR, color=GRAY, linewidth=0.8)
    add_note(left, "1e-8 and below", (0.56, _FLOOR), (0, 4))
    left.set_title(f"against the trajectory's own $x_0$ ({own[0]}, {own[1]} steps)", fontsize=9)
    solver = [row for row in cells if row["sampler"] == "dpmsolver++"]
    for steps, color in zip(sorted({row["steps"] for row in solver}), _STEP_COLORS, strict=False):
        rows = [row for row in solver if row["steps"] == steps]
        for agent, dashes, label in (("dp-final", "--", f"final, {steps} steps"), ("dp", "-", f"progressive, {steps}")):
            part = [row for row in rows if row["agent"] == agent]
            _draw(right, part, "mse_200", color=color, linestyle=dashes, label=label)
    right.set_title("against the $x_0$ of 200 steps, same $x_T$ (DPM-Solver++)", fontsize=9)
    for axes in (left, right):
        axes.set_yscale("log")
        axes.set_xlabel(SNR_LABEL)
        axes.set_ylabel("latent MSE at the deadline")
        add_grid(axes)
        axes.legend(fontsize=7, handlelength=3.5)
    return save_figure(figure, folder, "sequential")
