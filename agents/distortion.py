"""The paper's distortion models against simulation: ``python -m agents.distortion``.

Writes ``fig2a.csv``, ``fig2b.csv`` and ``run.json``, prints how far model and simulation are apart, and draws
``fig2a`` and ``fig2b`` where matplotlib is installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from agents.figures import draw_fig2a, draw_fig2b
from agents.studies.distortion import (
    DEFAULT_BIT_DEPTHS,
    DIFFUSION_COLUMNS,
    QUANTIZATION_COLUMNS,
    offsets_db,
    tabulate_diffusion,
    tabulate_quantization,
)
from agents.studies.images import open_decoder
from refine_env import ConfigurationError, MissingExtraError, TrajectoryCache, __version__
from refine_env._validation import check_integer
from refine_env.commands import command, parse_list, run
from refine_env.evaluation import Table, write_atomically, write_table

__all__ = ["main"]


def _describe(table: Table, name: str, rows: str) -> str:
    offsets = offsets_db(table)
    largest = max((row for row in table if row["offset_db"] is not None), key=lambda row: abs(row["offset_db"]))
    return (
        f"{name}: simulation over model {offsets.mean():+.2f} dB in the mean over {len(offsets)} {rows}, "
        f"from {offsets.min():+.2f} to {offsets.max():+.2f} dB; largest at "
        + ", ".join(f"{key} {largest[key]}" for key in ("device_step", "step", "bits") if key in largest)
    )


@command
def main(
    cache: Annotated[str, typer.Option(help="Name or folder of a trajectory cache.")] = "default",
    split: Annotated[str, typer.Option(help="Trajectories: train, test or all.")] = "test",
    bit_depths: Annotated[str, typer.Option(help="Comma-separated bit depths.")] = ",".join(
        map(str, DEFAULT_BIT_DEPTHS)
    ),
    trajectories: Annotated[
        int | None, typer.Option(help="Take the first so many of the split.", show_default="all")
    ] = None,
    images: Annotated[bool, typer.Option(help="Decode the latents too, where the cache has a model.")] = True,
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder of the cache's model.", show_default="as the cache says")
    ] = None,
    device: Annotated[str, typer.Option(help="Torch device for the images.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder for tables and figures.")] = Path("results/fig2"),
    figures: Annotated[bool, typer.Option(help="Draw the figures (needs matplotlib).")] = True,
) -> None:
    """Compare the paper's distortion models with simulation, and write tables and figures.

    Exit codes: 0 done, 2 an argument is wrong, 3 a cache or model is missing or damaged, or the output cannot be
    written.
    """
    from tqdm import tqdm

    depths = parse_list(
        "--bit-depths",
        bit_depths,
        int,
        what="ascending integers in 1 … 15, separated by commas",
        advice="For example: --bit-depths 3,4,8,10",
        valid=lambda depths: depths == tuple(sorted(set(depths))) and 1 <= depths[0] <= depths[-1] <= 15,
    )
    opened = TrajectoryCache.open(cache)
    if trajectories is not None:
        check_integer("--trajectories", trajectories, 1, advice="Leave it out to take all.")
    indices = [int(index) for index in opened.indices(split)[:trajectories]]
    if not indices:
        raise ConfigurationError(f"`--split` must have trajectories, got the empty {split!r}. Choose another.")
    decoder = None
    if images:
        try:
            decoder = open_decoder(opened, model, device=device)
        except (ConfigurationError, MissingExtraError) as error:
            typer.echo(f"No images: {error}")
    out.mkdir(parents=True, exist_ok=True)
    with tqdm(total=2 * len(indices), unit="trajectory", desc="distortion") as bar:
        diffusion = tabulate_diffusion(opened, indices, decoder, bar.update)
        quantization = tabulate_quantization(opened, indices, depths, progress=bar.update)
    description = {
        "cache": {"name": cache, "sha256": opened.sha256},
        "split": split,
        "trajectories": len(indices),
        "bit_depths": list(depths),
        "model": None if decoder is None else {"id": decoder.model_id, "revision": decoder.revision},
        "version": __version__,
    }
    write_table(out / "fig2a.csv", diffusion, DIFFUSION_COLUMNS)
    write_table(out / "fig2b.csv", quantization, QUANTIZATION_COLUMNS)
    write_atomically(out / "run.json", json.dumps(description, indent=1) + "\n")
    typer.echo(_describe(diffusion, "Fig. 2a", "steps"))
    typer.echo(_describe(quantization, "Fig. 2b", "transmissions and bit depths"))
    written = [out / name for name in ("fig2a.csv", "fig2b.csv", "run.json")]
    if figures:
        try:
            written += draw_fig2a(diffusion, out) + draw_fig2b(quantization, out)
        except MissingExtraError as error:
            typer.echo(f"No figure: {error}")
    typer.echo("wrote " + ", ".join(str(path) for path in written))


if __name__ == "__main__":
    run(main)
