"""How well the paper's assumptions hold: coding errors along chains, latencies, and guidance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agents.figures.canvas import SNR_LABEL, add_grid, new_figure, save_figure
from agents.figures.style import BLACK, BLUE, GRAY, GREEN, ORANGE, VERMILION
from refine_env.evaluation import Table

__all__ = ["draw_assumptions"]

_COLORS = (VERMILION, ORANGE, GREEN, BLUE, BLACK, GRAY)
_DASHES = {"forward": "-", "closed_loop": "--"}
_FLOOR = 1e-12


def _draw_chains(axes: Any, chains: Table, column: str, last_step: int) -> None:
    """One of the chains' columns over the number of messages: a color a bit depth, dashes for the closed loop."""
    rows = [row for row in chains if row["last_step"] == last_step]
    for color, bits in zip(_COLORS, sorted({row["bits"] for row in rows}), strict=False):
        for coder, dashes in _DASHES.items():
            part = [row for row in rows if (row["bits"], row["coder"]) == (bits, coder)]
            label = f"{bits} bit, {coder.replace('_', ' ')}"
            lengths = [row["length"] for row in part]
            axes.plot(
                lengths, [row[column] for row in part], dashes, color=color, marker="o", markersize=3, label=label
            )
            ends = [[row[f"{column}_{end}"] for row in part] for end in ("low", "high")]
            axes.fill_between(lengths, *ends, color=color, alpha=0.12, linewidth=0)
    axes.set_xlabel("messages of the chain")


def draw_assumptions(tables: Mapping[str, Table], folder: Path) -> list[Path]:
    """``assumptions.png`` and ``.pdf``: six panels, as their titles say.

    Args:
        tables: as :func:`agents.studies.assumptions.read_assumptions` reads them.
        folder: folder for the files, which are returned.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    figure, panels = new_figure(12.0, 7.2, 2, 3)
    chains, coverage = tables["chains.csv"], tables["coverage.csv"]
    error, correlation, latency, quantizer, policies, power = panels.ravel()
    _draw_chains(error, chains, "ratio", 0)
    error.axhline(1.0, color=GRAY, linewidth=0.8)
    error.set_ylabel("realized / predicted coding error")
    error.set_title("a  chains that end in $x_0$", fontsize=9, loc="left")
    last = max(row["last_step"] for row in chains)
    _draw_chains(correlation, chains, "correlation", last)
    correlation.legend(fontsize=6, ncols=2, loc="lower right")
    correlation.axhline(0.0, color=GRAY, linewidth=0.8)
    correlation.set_ylabel(r"correlation of $\hat x_t - x_t$ with $x_t - x_0$")
    correlation.set_title(f"b  what Eq. (8) neglects, t = {last}", fontsize=9, loc="left")
    for law, color in (("paper", VERMILION), ("exact", BLUE)):
        rows = [row for row in coverage if row["law"] == law]
        quantiles = sorted({row["quantile"] for row in rows})
        values = [[row["coverage"] for row in rows if row["quantile"] == quantile] for quantile in quantiles]
        latency.plot(quantiles, [sum(v) / len(v) for v in values], color=color, marker="o", markersize=3, label=law)
        latency.fill_between(quantiles, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.15)
    latency.plot([0.5, 1.0], [0.5, 1.0], color=GRAY, linewidth=0.8, linestyle=":")
    latency.set_xlabel("q")
    latency.set_ylabel(r"P[$T_{dl} \leq \hat T_q$]")
    latency.set_title("c  latency: mean, range over SNRs and $b$", fontsize=9, loc="left")
    latency.legend(fontsize=7)
    scales = sorted({row["guidance_scale"] for row in tables["guidance.csv"]})
    for color, scale in zip(_COLORS, scales, strict=False):
        rows = [row for row in tables["guidance.csv"] if row["guidance_scale"] == scale]
        first = [row for row in rows if row["device_step"] == max(r["device_step"] for r in rows)]
        bits = [row["bits"] for row in first]
        quantizer.plot(
            bits,
            [row["simulated"] for row in first],
            color=color,
            marker="o",
            markersize=3,
            label=f"guidance {scale:g}",
        )
        power.scatter([scale], [rows[0]["power"]], color=color, marker="o")
        largest = f"$|x_0| \\leq$ {rows[0]['largest']:.1f}"
        power.annotate(
            largest, (scale, rows[0]["power"]), (0, -11), textcoords="offset points", ha="center", fontsize=7
        )
        guided = [row for row in tables["guided.csv"] if row["guidance_scale"] == scale]
        for agent, dashes in (("lookahead", "-"), ("persistent-q8", "--")):
            part = sorted((row for row in guided if row["agent"] == agent), key=lambda row: row["snr_db"])
            means = [max(row["latent_mse"], _FLOOR) for row in part]
            policies.plot([row["snr_db"] for row in part], means, dashes, color=color, marker="o", markersize=3)
    quantizer.plot(bits, [row["model"] for row in first], color=GRAY, linestyle=":", label="model, Eq. (10)")
    for axes in (quantizer, policies):
        axes.set_yscale("log")
    quantizer.set_xlabel("bits per dimension $b$")
    quantizer.set_ylabel(r"$E\,\Vert\hat x_0-x_0\Vert^2/M$")
    quantizer.set_title("d  first transmission of $x_0$ ([K] Fig. 2b)", fontsize=9, loc="left")
    quantizer.legend(fontsize=7)
    policies.set_xlabel(SNR_LABEL)
    policies.set_ylabel("latent MSE at the deadline")
    policies.set_title("e  look-ahead (solid), Persistent-Q(8) (dashed)", fontsize=9, loc="left")
    power.margins(0.15)
    power.set_xlabel("guidance scale")
    power.set_ylabel(r"power $E\,\Vert x_0\Vert^2/M$")
    power.set_title("f  what guidance does to the latents", fontsize=9, loc="left")
    for axes in panels.ravel():
        add_grid(axes)
    return save_figure(figure, folder, "assumptions")
