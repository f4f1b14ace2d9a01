"""What the policies' errors do when one parameter moves, a figure for each parameter."""

from __future__ import annotations

from pathlib import Path

from agents.figures.canvas import add_grid, add_legend_above, new_figure, save_figure
from agents.figures.style import GRAY, styles_by_policy
from agents.studies.sensitivity import KNOBS, PERSISTENT
from refine_env.evaluation import Table

__all__ = ["draw_sensitivity"]

_FLOOR = 1e-8


def draw_sensitivity(cells: Table, folder: Path) -> list[Path]:
    """``sensitivity-KNOB.png`` and ``.pdf`` for every parameter: MSE over its values, a panel an SNR.

    Means below 1e-8 stand there. The paper's value is a vertical line.

    Args:
        cells: rows of :data:`agents.studies.sensitivity.SENSITIVITY_COLUMNS`.
        folder: folder for the files, which are returned.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    written = []
    snrs_db = sorted({row["snr_db"] for row in cells})
    for name, knob in KNOBS.items():
        rows = [row for row in cells if row["knob"] == name]
        figure, panels = new_figure(2.0 + 2.6 * len(snrs_db), 3.9, 1, len(snrs_db), squeeze=False, sharey=True)
        by_policy: dict[str, Table] = {}
        for row in rows:
            by_policy.setdefault(row["agent"], []).append({**row, "payload": "latent"})
        styles = styles_by_policy(by_policy)
        for axes, snr_db in zip(panels[0], snrs_db, strict=True):
            for agent, style in styles.items():
                part = [row for row in by_policy[agent] if row["snr_db"] == snr_db]
                faint = {"alpha": 0.45, "linewidth": 0.9} if agent in PERSISTENT else {}
                means = [max(row["latent_mse"], _FLOOR) for row in part]
                axes.plot([row["value"] for row in part], means, **{**style, "markersize": 4.0, **faint})
            axes.axvline(knob.paper, color=GRAY, linewidth=0.8, linestyle=":")
            axes.set_yscale("log")
            if knob.log:
                axes.set_xscale("log")
            axes.set_title(f"{snr_db:g} dB", fontsize=9)
            axes.set_xlabel(knob.label, fontsize=9)
            add_grid(axes)
        panels[0][0].set_ylabel("latent MSE at the deadline")
        add_legend_above(figure, panels[0][0])
        written += save_figure(figure, folder, f"sensitivity-{name.replace('_', '-')}")
    return written
