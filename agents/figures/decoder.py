"""What a device gains that has the prior, too."""

from __future__ import annotations

from pathlib import Path

from agents.figures.canvas import SNR_LABEL, add_grid, new_figure, save_figure
from agents.figures.style import BLACK, BLUE, GREEN, ORANGE, SKY_BLUE, VERMILION
from refine_env.evaluation import DECODED_COLUMN, Table

__all__ = ["draw_decoder"]

_COLORS = (BLACK, ORANGE, VERMILION, SKY_BLUE, BLUE, GREEN)


def draw_decoder(summary: Table, folder: Path) -> list[Path]:
    """``decoder.png`` and ``.pdf``: MSE against SNR without and with the decoder, and the gain of every policy.

    Args:
        summary: rows of :data:`agents.studies.decoder.DECODER_COLUMNS`.
        folder: folder for the files, which are returned.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    figure, (left, right) = new_figure(10.0, 4.4, 1, 2)
    labels = list(dict.fromkeys(row["variant"] for row in summary))
    for k, label in enumerate(labels):
        color = _COLORS[k % len(_COLORS)]
        rows = [row for row in summary if row["variant"] == label]
        snrs_db = [row["snr_db"] for row in rows]
        for column, dashes in (("latent_mse", "--"), (DECODED_COLUMN, "-")):
            left.plot(snrs_db, [row[column] for row in rows], color=color, linestyle=dashes, linewidth=1.2)
            low, high = ([row[f"{column}{end}"] for row in rows] for end in ("_low", "_high"))
            left.fill_between(snrs_db, low, high, color=color, alpha=0.15, lw=0)
        right.plot(snrs_db, [row["gain"] for row in rows], color=color, marker="o", markersize=3, label=label)
        low, high = ([row[f"gain{end}"] for row in rows] for end in ("_low", "_high"))
        right.fill_between(snrs_db, low, high, color=color, alpha=0.15, lw=0)
    left.plot([], [], color=BLACK, linestyle="--", label="what the device holds")
    left.plot([], [], color=BLACK, label="decoded with the prior")
    left.set_ylabel("latent MSE at the deadline")
    right.set_ylabel("gain: MSE held over MSE decoded")
    left.set_yscale("log")
    for axes in (left, right):
        axes.set_xlabel(SNR_LABEL)
        axes.legend(fontsize=8)
        add_grid(axes)
    right.axhline(1.0, color=BLACK, linewidth=0.8)
    return save_figure(figure, folder, "decoder")
