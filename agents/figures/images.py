"""What policies show at the deadline, image by image."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agents.figures.canvas import add_power_bar, new_figure, save_figure
from agents.figures.style import rows_by_policy, styles_by_policy
from refine_env.evaluation import Table
from refine_env.radiomap import PowerScale

__all__ = ["draw_strip"]


def draw_strip(
    tiles: Table, clean: NDArray[np.uint8], prompt: str, out: Path, scale: PowerScale | None = None
) -> list[Path]:
    """What each policy shows at the deadline, by SNR, in one episode.

    Args:
        tiles: rows with ``agent``, ``snr_db``, ``coder``, ``payload``, ``episode`` and ``image``, as
            :func:`agents.studies.images.read_tiles` gives them.
        clean: image of x_0, uint8 (height, width, 3).
        prompt: prompt of the trajectory; may be empty.
        out: folder for ``strip.png`` and ``strip.pdf``, which are returned.
        scale: what the colors of the images stand for, where they are radio maps.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    policies = rows_by_policy(tiles)
    styles = styles_by_policy(policies)
    snrs = sorted({row["snr_db"] for row in tiles})
    figure, grid = new_figure(
        1.6 + 0.75 * (len(snrs) + 1) + (0.9 if scale is not None else 0.0),
        0.7 + 0.78 * len(policies),
        len(policies),
        len(snrs) + 2,
        squeeze=False,
        width_ratios=[*[1.0] * len(snrs), 0.12, 1.0],
    )
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.025, wspace=0.0, hspace=0.0)
    for line, (policy, rows) in zip(grid, policies.items(), strict=True):
        images = {row["snr_db"]: row["image"] for row in rows}
        for axes, image in zip(line, [*(images.get(snr) for snr in snrs), None, clean], strict=True):
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_linewidth(0.4)
            axes.spines[:].set_visible(image is not None)
            if image is not None:
                axes.imshow(image, interpolation="nearest")
        line[0].set_ylabel(styles[policy]["label"], rotation=0, ha="right", va="center", fontsize=8)
    for axes, title in zip(grid[0], [*(f"{snr:g} dB" for snr in snrs), "", "$x_0$"], strict=True):
        axes.set_title(title, fontsize=8)
    if prompt:
        figure.suptitle(f"“{prompt}”", fontsize=9)
    if scale is not None:
        add_power_bar(figure, grid, scale)
    return save_figure(figure, out, "strip")
