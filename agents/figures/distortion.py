"""The distortion models of the paper beside simulation: [K] Fig. 2a and Fig. 2b."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from agents.figures.canvas import add_grid, legend_entries, new_figure, save_figure
from agents.figures.series import error_bars
from agents.figures.style import BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY_BLUE, VERMILION
from refine_env.evaluation import Table

__all__ = ["draw_fig2a", "draw_fig2b"]

_MODEL_COLOR, _SIMULATED_COLOR, _IMAGE_COLOR = BLACK, BLUE, VERMILION
_TRANSMISSION_COLORS = (VERMILION, BLUE, GREEN, PURPLE, ORANGE, SKY_BLUE)
_TRANSMISSION_MARKERS = "osv^D<"


def draw_fig2a(table: Table, out: Path) -> list[Path]:
    """Diffusion distortion against the step t ([K] Fig. 2a): model, simulation, and 1/PSNR of the decoded image.

    The right axis, of 1/PSNR, is the left one times a constant, the geometric mean of the two simulated curves' ratio:
    where they lie on each other, pixel and latent distortion are proportional. It is left out where the table has no
    images. Below, what simulation is over the model. Bands are 95 % intervals over trajectories.

    Args:
        table: rows with :data:`agents.studies.distortion.DIFFUSION_COLUMNS`.
        out: folder for ``fig2a.png`` and ``fig2a.pdf``, which are returned.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    figure, (axes, below) = new_figure(5.6, 5.0, 2, 1, sharex=True, height_ratios=(3.2, 1.0))
    rows = [row for row in table if row["step"] > 0]  # at t = 0 all are zero
    steps = [row["step"] for row in rows]
    style: dict[str, Any] = {"linewidth": 1.5}
    model = [row["model"] for row in rows]
    axes.plot(steps, model, "--", color=_MODEL_COLOR, label="model, Eq. (9)", zorder=4, **style)
    _line_with_band(axes, rows, "simulated", color=_SIMULATED_COLOR, label="simulated", **style)
    axes.set_yscale("log")
    axes.set_ylabel(r"latent distortion $E\,\Vert x_t-x_0\Vert^2/M$")
    handles, labels = axes.get_legend_handles_labels()
    if rows[0]["image_mse"] is not None:
        twin = axes.twinx()
        _line_with_band(
            twin, rows, "image_mse", color=_IMAGE_COLOR, linestyle="-.", label="1/PSNR of the decoded image", **style
        )
        twin.set_yscale("log")
        twin.set_ylabel("1/PSNR (pixel MSE on [0, 1])", color=_IMAGE_COLOR)
        twin.tick_params(axis="y", which="both", colors=_IMAGE_COLOR)
        from scipy.stats import gmean

        ratio = gmean([row["image_mse"] / row["simulated"] for row in rows])
        twin.set_ylim(*(ratio * limit for limit in axes.get_ylim()))
        handles, labels = (a + b for a, b in zip((handles, labels), twin.get_legend_handles_labels(), strict=True))
    axes.legend(handles, labels, fontsize=8, loc="lower right")
    offsets = [{**row, **_offset_band(row)} for row in rows]
    below.axhline(0.0, color=_MODEL_COLOR, linestyle="--", linewidth=1.0, zorder=4)
    _line_with_band(below, offsets, "offset_db", color=_SIMULATED_COLOR, **style)
    below.set_xlabel("step $t$ (0 is the clean latent)")
    below.set_ylabel("simulated /\nmodel [dB]")
    reached = [row["offset_db"] for row in rows]
    below.set_ylim(1.15 * min(-1.0, *reached), 1.15 * max(1.0, *reached))
    for panel in (axes, below):
        add_grid(panel)
    return save_figure(figure, out, "fig2a")


def _offset_band(row: dict[str, Any]) -> dict[str, float]:
    """The interval of ``offset_db`` that the interval of ``simulated`` implies."""
    return {f"offset_db{end}": 10.0 * math.log10(row[f"simulated{end}"] / row["model"]) for end in ("_low", "_high")}


def draw_fig2b(table: Table, out: Path) -> list[Path]:
    """Quantization distortion against the bit depth ([K] Fig. 2b): model and simulation.

    A first transmission and refinements, each with a color; bars are 95 % intervals over trajectories.

    Args:
        table: rows with :data:`agents.studies.distortion.QUANTIZATION_COLUMNS`.
        out: folder for ``fig2b.png`` and ``fig2b.pdf``, which are returned.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    figure, axes = new_figure(5.6, 3.9)
    transmissions: dict[tuple[int, int], Table] = {}
    for row in table:
        transmissions.setdefault((row["device_step"], row["step"]), []).append(row)
    last = max(row["device_step"] for row in table)
    for number, ((device_step, step), rows) in enumerate(transmissions.items()):
        look = {"color": _TRANSMISSION_COLORS[number % 6], "marker": _TRANSMISSION_MARKERS[number % 6]}
        bits = [row["bits"] for row in rows]
        what = f"$x_{{{step}}}$"
        label = (
            f"{what}, first transmission" if device_step == last else f"{what} to a device with $x_{{{device_step}}}$"
        )
        axes.plot(bits, [row["model"] for row in rows], "--", color=_MODEL_COLOR, linewidth=1.0, zorder=4)
        axes.errorbar(
            bits,
            [row["simulated"] for row in rows],
            error_bars(rows, "simulated"),
            markersize=4.5,
            linewidth=1.2,
            capsize=2.0,
            label=label,
            **look,
        )
    handles, labels = legend_entries(axes)
    (model,) = axes.plot([], [], "--", color=_MODEL_COLOR, linewidth=1.0)
    axes.set_yscale("log")
    axes.set_xticks(sorted({row["bits"] for row in table}))
    axes.set_xlabel("bits per dimension $b$")
    axes.set_ylabel(r"quantization distortion $E\,\Vert\hat x_t-x_t\Vert^2/M$")
    add_grid(axes)
    axes.legend([*handles, model], [*labels, "model, Eq. (10)"], fontsize=8, loc="lower left")
    return save_figure(figure, out, "fig2b")


def _line_with_band(axes: Any, rows: Table, column: str, *, color: str, **style: Any) -> None:
    places = [row["step"] for row in rows]
    axes.plot(places, [row[column] for row in rows], color=color, **style)
    low, high = ([row[column + end] for row in rows] for end in ("_low", "_high"))
    axes.fill_between(places, low, high, color=color, alpha=0.2, linewidth=0.0)
