"""Figures as functions of tables on disk: ``python -m agents.figures DIR``."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Annotated, Any

import typer

from refine_env import ConfigurationError, MissingExtraError
from refine_env.errors import import_extra
from refine_env.evaluation import SUMMARY_COLUMNS, Table, read_table

__all__ = ["draw_fig3a", "main"]

# Okabe and Ito's palette: distinguishable with any color vision; markers and dashes serve in print.
_STYLES: dict[str, dict[str, Any]] = {
    "lookahead": {"label": "Look-ahead", "color": "#000000", "marker": "o", "linewidth": 2.0, "zorder": 5},
    "lookahead-literal": {
        "label": "Look-ahead, literal",
        "color": "#666666",
        "marker": "P",
        "linestyle": ":",
    },
    "lookahead-tight": {"label": "Look-ahead, tight", "color": "#666666", "marker": "X", "linestyle": "--"},
    "persistent-q3": {"label": "Persistent-Q (3 bit)", "color": "#E69F00", "marker": "s"},
    "persistent-q4": {"label": "Persistent-Q (4 bit)", "color": "#56B4E9", "marker": "^"},
    "persistent-q8": {"label": "Persistent-Q (8 bit)", "color": "#009E73", "marker": "v"},
    "persistent-q10": {"label": "Persistent-Q (10 bit)", "color": "#0072B2", "marker": "D"},
    "persistent-q16": {"label": "Persistent-Q (16 bit)", "color": "#CC79A7", "marker": "<"},
    "final-only": {"label": "Final-Only", "color": "#D55E00", "marker": "*", "linestyle": "--"},
    "random": {"label": "Random", "color": "#999999", "marker": "x", "linestyle": ":"},
}
_SPARE_COLORS = ("#8B4513", "#7B68EE", "#2E8B57", "#B22222")


def _style(agent: str, position: int) -> dict[str, Any]:
    if agent in _STYLES:
        return dict(_STYLES[agent])
    persistent = re.fullmatch(r"persistent-q(\d+)", agent)
    label = f"Persistent-Q ({persistent[1]} bit)" if persistent else agent
    return {"label": label, "color": _SPARE_COLORS[position % len(_SPARE_COLORS)], "marker": "h"}


def _handles(axes: Any) -> tuple[list[Any], list[str]]:
    """Legend entries without their error bars."""
    handles, labels = axes.get_legend_handles_labels()
    return [handle[0] for handle in handles], labels


def draw_fig3a(summary: Table, out: Path) -> list[Path]:
    """Latent MSE at the deadline against SNR ([K] Fig. 3a), log axis, with 95 % intervals.

    Means of exactly 0 are drawn, hollow, at a marked floor a decade below the smallest positive mean.

    Args:
        summary: rows with :data:`refine_env.evaluation.SUMMARY_COLUMNS`.
        out: folder for ``fig3a.png`` and ``fig3a.pdf``.

    Returns:
        The files written.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    figure_module = import_extra("matplotlib.figure", "plot")
    positive = [row["latent_mse"] for row in summary if row["latent_mse"] > 0.0]
    floor = 10.0 ** (math.floor(math.log10(min(positive, default=1.0))) - 1)
    figure = figure_module.Figure(figsize=(6.4, 4.6), layout="constrained")
    axes = figure.subplots()
    zeros = False
    for position, agent in enumerate(dict.fromkeys(row["agent"] for row in summary)):
        rows = sorted((row for row in summary if row["agent"] == agent), key=lambda row: row["snr_db"])
        snrs = [row["snr_db"] for row in rows]
        means = [row["latent_mse"] or floor for row in rows]
        style = {"linewidth": 1.3, "markersize": 5.0, **_style(agent, position)}
        below = [
            mean - max(row["ci_low"], floor) if row["latent_mse"] else 0.0
            for mean, row in zip(means, rows, strict=True)
        ]
        above = [max(0.0, row["ci_high"] - mean) for mean, row in zip(means, rows, strict=True)]
        axes.errorbar(snrs, means, yerr=[[max(0.0, b) for b in below], above], capsize=2.0, **style)
        at_floor = [snr for snr, row in zip(snrs, rows, strict=True) if row["latent_mse"] == 0.0]
        if at_floor:
            zeros = True
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
    axes.set_yscale("log")
    level = sum(row["no_delivery_mse"] for row in summary) / len(summary)
    axes.axhline(level, color="#999999", linewidth=0.8, linestyle=":")
    axes.annotate(
        "nothing delivered",
        (1.0, level),
        xycoords=("axes fraction", "data"),
        xytext=(-3, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color="#666666",
    )
    if zeros:
        axes.axhline(floor, color="#999999", linewidth=0.8)
        axes.annotate(
            "exactly 0 (hollow)",
            (0.0, floor),
            xycoords=("axes fraction", "data"),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=8,
            color="#666666",
        )
        axes.set_ylim(bottom=floor / 2.0)
    axes.set_xlabel("mean SNR per subchannel [dB]")
    axes.set_ylabel("latent MSE at the deadline")
    axes.grid(visible=True, which="major", linewidth=0.4, alpha=0.5)
    axes.set_xticks(sorted({row["snr_db"] for row in summary}))
    figure.legend(*_handles(axes), fontsize=8, loc="outside upper center", ncols=4, frameon=False)
    written = []
    out.mkdir(parents=True, exist_ok=True)
    for suffix in ("png", "pdf"):
        path, temporary = out / f"fig3a.{suffix}", out / f"fig3a.{suffix}.tmp"
        # No dates in the files: the same table gives the same bytes.
        figure.savefig(temporary, format=suffix, dpi=200, metadata={"CreationDate": None} if suffix == "pdf" else None)
        temporary.replace(path)
        written.append(path)
    return written


def main(
    folder: Annotated[Path, typer.Argument(help="Folder with an evaluation's summary.csv.")] = Path("results/fig3a"),
    out: Annotated[Path | None, typer.Option(help="Folder for the figures.", show_default="that of the tables")] = None,
) -> None:
    """Redraw the figures of an evaluation from its tables.

    Exit codes: 0 done, 2 the table is missing or not one, 3 the figures cannot be written, 4 matplotlib is not
    installed.
    """
    try:
        written = draw_fig3a(read_table(folder / "summary.csv", SUMMARY_COLUMNS), out or folder)
    except ConfigurationError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except OSError as error:
        typer.echo(
            f"error: `--out` must be a folder that can be written, got {str(out or folder)!r} ({error.strerror}). "
            "Choose another.",
            err=True,
        )
        raise typer.Exit(3) from None
    except MissingExtraError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(4) from None
    typer.echo("wrote " + ", ".join(str(path) for path in written))


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
