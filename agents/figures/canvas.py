"""What matplotlib's figures have in common: how they are made, gridded, annotated and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agents.figures.style import NOTE_COLOR
from refine_env._files import replacing
from refine_env.errors import import_extra
from refine_env.radiomap import COVERAGE_DBM, QUANTITY, PowerScale, color_bar

__all__ = [
    "SNR_LABEL",
    "add_grid",
    "add_legend_above",
    "add_note",
    "add_power_bar",
    "legend_entries",
    "new_figure",
    "save_figure",
]

SNR_LABEL = "mean SNR per subchannel [dB]"


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure with empty panels.

    Args:
        width, height: its size [inches].
        rows, columns: the grid of its panels.
        options: of matplotlib's ``Figure.subplots``.

    Returns:
        The figure, and its panels: one, or an array of several.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    figure = import_extra("matplotlib.figure", "plot").Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def save_figure(figure: Any, out: Path, name: str) -> list[Path]:
    """Write ``name.png`` and ``name.pdf``; the same figure gives the same bytes."""
    # No dates in the files: the same table gives the same bytes.
    written = {out / f"{name}.png": None, out / f"{name}.pdf": {"CreationDate": None}}
    for path, metadata in written.items():
        with replacing(path) as temporary:
            figure.savefig(temporary, format=path.suffix[1:], dpi=200, metadata=metadata)
    return list(written)


def add_note(axes: Any, text: str, place: tuple[float, float], offset: tuple[float, float], **kwargs: Any) -> None:
    """Add a small gray remark, x in fractions of the axes and y in data, moved by ``offset`` points."""
    kwargs = {"fontsize": 8, "color": NOTE_COLOR, **kwargs}
    axes.annotate(text, place, xycoords=("axes fraction", "data"), xytext=offset, textcoords="offset points", **kwargs)


def add_grid(axes: Any) -> None:
    """Add thin lines at the major ticks."""
    axes.grid(visible=True, which="major", linewidth=0.4, alpha=0.5)


def legend_entries(axes: Any) -> tuple[list[Any], list[str]]:
    """Handles and labels of a legend, without error bars."""
    handles, labels = axes.get_legend_handles_labels()
    return [handle[0] if isinstance(handle, tuple) else handle for handle in handles], labels


def add_legend_above(figure: Any, axes: Any) -> None:
    """Add the legend of one of the panels above all of them."""
    figure.legend(*legend_entries(axes), fontsize=8, loc="outside upper center", ncols=4, frameon=False)


def add_power_bar(figure: Any, panels: Any, scale: PowerScale, **options: Any) -> None:
    """Add the color scale of radio maps beside panels, with the threshold of coverage marked.

    Args:
        figure: the figure.
        panels: its panels with maps, an array.
        scale: of the maps.
        options: of matplotlib's ``Figure.colorbar``.
    """
    colors = import_extra("matplotlib.colors", "plot")
    cm = import_extra("matplotlib.cm", "plot")
    table = colors.ListedColormap(color_bar()[:, 0])
    maps = cm.ScalarMappable(colors.Normalize(*scale), table)
    bar = figure.colorbar(maps, ax=panels, **{"fraction": 0.03, "aspect": 40, **options})
    bar.set_label(f"{QUANTITY} [dBm]; buildings gray", fontsize=8)
    bar.ax.tick_params(labelsize=7)
    bar.ax.axhline(COVERAGE_DBM, color="white", linewidth=1.0)
