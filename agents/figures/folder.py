"""All figures of a folder of tables: ``python -m agents.figures DIR``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from agents.figures.assumptions import draw_assumptions
from agents.figures.coverage import draw_coverage
from agents.figures.curves import draw_fig3a, draw_fig3b
from agents.figures.decoder import draw_decoder
from agents.figures.distortion import draw_fig2a, draw_fig2b
from agents.figures.images import draw_strip
from agents.figures.ladder import draw_ladder
from agents.figures.reuse import draw_reuse
from agents.figures.scores import draw_scores
from agents.figures.sensitivity import draw_sensitivity
from agents.figures.sequential import draw_sequential
from agents.figures.timeline import draw_timeline
from agents.studies.assumptions import read_assumptions
from agents.studies.coverage import read_coverage
from agents.studies.decoder import read_decoder
from agents.studies.distortion import DIFFUSION_COLUMNS, QUANTIZATION_COLUMNS, read_distortion_table
from agents.studies.images import read_tiles
from agents.studies.ladder import read_ladder
from agents.studies.reuse import read_reuse
from agents.studies.scores import read_scores
from agents.studies.sensitivity import read_sensitivity
from agents.studies.sequential import read_sequential
from agents.studies.timeline import read_timelines
from refine_env.commands import command
from refine_env.evaluation import SUMMARY_COLUMNS, read_table

__all__ = ["draw_all", "draw_images", "draw_studies", "main"]


def draw_images(folder: Path, out: Path, episode: int = 0) -> list[Path]:
    """Draw Fig. 3b and the strip, from ``summary.csv`` and ``images.npz``, as far as there is something to draw.

    Raises:
        ConfigurationError: if a table is not one, or the images of ``episode`` were not kept.
        MissingExtraError: if matplotlib is not installed.
    """
    written: list[Path] = []
    summary = read_table(folder / "summary.csv", SUMMARY_COLUMNS)
    if any(row["scored_episodes"] for row in summary):
        written += draw_fig3b(summary, out)
        if all(row["lpips"] is None for row in summary):
            typer.echo(
                "fig3b has no panel for LPIPS: the table has none. Add it with: "
                "python -m agents.evaluate --images --lpips-weights FILE"
            )
    if (folder / "images.npz").is_file():
        tiles, clean, prompt, scale = read_tiles(folder / "images.npz", episode)
        written += draw_strip(tiles, clean, prompt, out, scale)
    return written


_STUDIES: dict[str, Callable[[Path, Path], list[Path]]] = {
    "decoder.csv": lambda folder, out: draw_decoder(read_decoder(folder), out),
    "rungs.csv": lambda folder, out: draw_ladder(*read_ladder(folder), out),
    "chains.csv": lambda folder, out: draw_assumptions(read_assumptions(folder), out),
    "sensitivity.csv": lambda folder, out: draw_sensitivity(read_sensitivity(folder)[0], out),
    "sequential.csv": lambda folder, out: draw_sequential(read_sequential(folder)[0], out),
    "reuse.csv": lambda folder, out: draw_reuse(read_reuse(folder), out),
    "map_coverage.csv": lambda folder, out: draw_coverage(*read_coverage(folder), out),
    "agreement.csv": lambda folder, out: draw_scores(*read_scores(folder), out),
    "messages.csv": lambda folder, out: draw_timeline(read_timelines(folder), out),
}
"""What draws a study's figure from a folder into another, by the table that shows that the study was run."""


def draw_studies(folder: Path, out: Path) -> list[Path]:
    """Draw the figures of the studies whose tables a folder has.

    Raises:
        ConfigurationError: if a table is not one.
        MissingExtraError: if matplotlib is not installed.
    """
    return [path for name, draw in _STUDIES.items() if (folder / name).is_file() for path in draw(folder, out)]


def draw_all(folder: Path, out: Path, episode: int = 0) -> list[Path]:
    """Draw every figure that a folder has the tables of.

    Args:
        folder: folder with the tables.
        out: folder for the figures.
        episode: number of the episode that the strip shows.

    Returns:
        The files written.

    Raises:
        ConfigurationError: if there is no table, or one is not as it should be.
        MissingExtraError: if matplotlib is not installed.
    """
    written: list[Path] = []
    for name, columns, draw in (
        ("fig2a.csv", DIFFUSION_COLUMNS, draw_fig2a),
        ("fig2b.csv", QUANTIZATION_COLUMNS, draw_fig2b),
    ):
        if (folder / name).is_file():
            written += draw(read_distortion_table(folder / name, columns), out)
    written += draw_studies(folder, out)
    if not written or (folder / "summary.csv").is_file():
        written += draw_fig3a(read_table(folder / "summary.csv", SUMMARY_COLUMNS), out)
        written += draw_images(folder, out, episode)
    return written


@command
def main(
    folder: Annotated[
        Path, typer.Argument(help="Folder with the tables of agents.evaluate or agents.distortion.")
    ] = Path("results/fig3a"),
    out: Annotated[Path | None, typer.Option(help="Folder for the figures.", show_default="that of the tables")] = None,
    episode: Annotated[int, typer.Option(help="Episode that the strip of images shows.")] = 0,
) -> None:
    """Redraw the figures of an evaluation, or of the distortion models, from the tables on disk.

    Exit codes: 0 done, 2 a table is missing or not one, 3 the figures cannot be written, 4 matplotlib is not
    installed.
    """
    written = draw_all(folder, out or folder, episode)
    typer.echo("wrote " + ", ".join(str(path) for path in written))
