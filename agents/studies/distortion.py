"""The paper's distortion models against simulation: ``python -m agents.distortion``.

Writes ``fig2a.csv``, ``fig2b.csv`` and ``run.json``, prints how far model and simulation are apart, and draws
``fig2a`` and ``fig2b`` where matplotlib is installed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from agents.studies.images import Decoder, decode, open_decoder
from refine_env import ConfigurationError, MissingExtraError, TrajectoryCache, __version__
from refine_env._validation import check_integer
from refine_env.coding import ForwardCoder
from refine_env.commands import command, run
from refine_env.evaluation import Table, bootstrap_interval, read_table, write_atomically, write_table
from refine_env.metrics import mean_square_error
from refine_env.model.distortion import diffusion_distortion

__all__ = [
    "DEFAULT_BIT_DEPTHS",
    "DIFFUSION_COLUMNS",
    "QUANTIZATION_COLUMNS",
    "default_transmissions",
    "main",
    "offsets_db",
    "read_distortion_table",
    "tabulate_diffusion",
    "tabulate_quantization",
]

DIFFUSION_COLUMNS: dict[str, type] = {
    "step": int,
    "alpha_bar": float,
    "model": float,
    "simulated": float,
    "simulated_low": float,
    "simulated_high": float,
    "offset_db": float,
    "image_mse": float,
    "image_mse_low": float,
    "image_mse_high": float,
    "trajectories": int,
}
"""Columns of Fig. 2a's table, a row for each t: D_diff of [K] Eq. (9), E‖x_t − x_0‖²/M over the trajectories with a
95 % bootstrap interval, 10 log10 of their ratio (none at t = 0, where both are 0), and the mean square error of the
decoded images of x_t and x_0 on [0, 1], which is 1/PSNR (none without a model to decode)."""

QUANTIZATION_COLUMNS: dict[str, type] = {
    "device_step": int,
    "step": int,
    "bits": int,
    "model": float,
    "simulated": float,
    "simulated_low": float,
    "simulated_high": float,
    "offset_db": float,
    "trajectories": int,
}
"""Columns of Fig. 2b's table, a row for each transmission and bit depth: D_quant of [K] Eq. (10), and E‖x̂_t − x_t‖²/M
where the device holds x_{t_p} exactly."""

DEFAULT_BIT_DEPTHS = tuple(range(1, 13))

_OPTIONAL_COLUMNS = ("offset_db", "image_mse", "image_mse_low", "image_mse_high")


def tabulate_diffusion(
    cache: TrajectoryCache,
    indices: Iterable[int],
    decoder: Decoder | None = None,
    progress: Callable[[int], None] | None = None,
) -> Table:
    """Model and simulation of what is lost by showing x_t instead of x_0.

    Args:
        cache: the trajectories.
        indices: which of them.
        decoder: of their model; without it the image columns stay empty.
        progress: called after each trajectory with 1.

    Returns:
        Rows with :data:`DIFFUSION_COLUMNS`, t = 0 … T.
    """
    errors, image_errors = [], []
    for index in indices:
        latents = cache.latents(index).astype(np.float64)
        errors.append(np.square(latents - latents[0]).mean(axis=(1, 2, 3)))
        if decoder is not None:
            images = decode(decoder, cache.latents(index))
            image_errors.append(mean_square_error(np.broadcast_to(images[0], images.shape), images))
        if progress is not None:
            progress(1)
    model = diffusion_distortion(cache.schedule)
    table: Table = []
    for step in range(cache.num_steps + 1):
        images_at = [error[step] for error in image_errors]
        image_mse, image_low, image_high = _mean_and_interval(images_at) if images_at else (None, None, None)
        table.append(
            {
                "step": step,
                "alpha_bar": float(cache.schedule.alpha_bar[step]),
                **_compare(float(model[step]), [error[step] for error in errors]),
                "image_mse": image_mse,
                "image_mse_low": image_low,
                "image_mse_high": image_high,
                "trajectories": len(errors),
            }
        )
    return table


def default_transmissions(num_steps: int) -> list[tuple[int, int]]:
    """Pairs (t_p, t) for Fig. 2b: a first transmission of x_0, a refinement early, one late, and the last step's."""
    pairs = [(num_steps, 0), (round(0.8 * num_steps), round(0.6 * num_steps)), (round(0.2 * num_steps), 0), (1, 0)]
    return [(held, sent) for held, sent in dict.fromkeys(pairs) if held > sent]


def tabulate_quantization(
    cache: TrajectoryCache,
    indices: Iterable[int],
    bit_depths: Sequence[int] = DEFAULT_BIT_DEPTHS,
    transmissions: Sequence[tuple[int, int]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Table:
    """Model and simulation of what the paper's coder loses of x_t.

    Args:
        cache: the trajectories.
        indices: which of them.
        bit_depths: b, ascending, below 16, where nothing is lost.
        transmissions: pairs (t_p, t), t_p > t; default :func:`default_transmissions`.
        progress: called after each trajectory with 1.

    Returns:
        Rows with :data:`QUANTIZATION_COLUMNS`.
    """
    coder = ForwardCoder(cache.schedule, tuple(bit_depths))
    pairs = default_transmissions(cache.num_steps) if transmissions is None else transmissions
    cases = [(held, sent, bits) for held, sent in pairs for bits in bit_depths]
    errors: dict[tuple[int, int, int], list[float]] = {case: [] for case in cases}
    for index in indices:
        latents = np.ascontiguousarray(cache.latents(index)).reshape(cache.num_steps + 1, -1)
        for held, sent, bits in cases:
            device = latents[held].astype(np.float32)
            coder.deliver(latents.view(np.uint16), device, sent, held, bits, 0.0)
            errors[held, sent, bits].append(float(np.square(device.astype(np.float64) - latents[sent]).mean()))
        if progress is not None:
            progress(1)
    return [
        {
            "device_step": held,
            "step": sent,
            "bits": bits,
            **_compare(coder.refinement(sent, held, bits, 0.0).error, errors[held, sent, bits]),
            "trajectories": len(errors[held, sent, bits]),
        }
        for held, sent, bits in cases
    ]


def _mean_and_interval(values: Sequence[float]) -> tuple[float, float, float]:
    array = np.array(values)
    return (float(array.mean()), *bootstrap_interval(array))


def _compare(model: float, values: Sequence[float]) -> dict[str, float | None]:
    mean, low, high = _mean_and_interval(values)
    offset = 10.0 * math.log10(mean / model) if mean > 0.0 and model > 0.0 else None
    return {"model": model, "simulated": mean, "simulated_low": low, "simulated_high": high, "offset_db": offset}


def offsets_db(table: Table) -> NDArray[np.float64]:
    """Simulation over model in dB, of the rows that have one, (n,)."""
    return np.array([row["offset_db"] for row in table if row["offset_db"] is not None])


def read_distortion_table(path: Path, columns: Mapping[str, type]) -> Table:
    """Read ``fig2a.csv`` or ``fig2b.csv``.

    Raises:
        ConfigurationError: if the file is missing, or not such a table.
    """
    return read_table(path, columns, optional=_OPTIONAL_COLUMNS, command="python -m agents.distortion")


def _describe(table: Table, name: str, rows: str) -> str:
    offsets = offsets_db(table)
    largest = max((row for row in table if row["offset_db"] is not None), key=lambda row: abs(row["offset_db"]))
    return (
        f"{name}: simulation over model {offsets.mean():+.2f} dB in the mean over {len(offsets)} {rows}, "
        f"from {offsets.min():+.2f} to {offsets.max():+.2f} dB; largest at "
        + ", ".join(f"{key} {largest[key]}" for key in ("device_step", "step", "bits") if key in largest)
    )


def _parse_bit_depths(text: str) -> tuple[int, ...]:
    try:
        depths = tuple(int(item) for item in text.split(",") if item.strip())
    except ValueError:
        depths = ()
    if not depths or depths != tuple(sorted(set(depths))) or not 1 <= depths[0] <= depths[-1] <= 15:
        raise ConfigurationError(
            f"`--bit-depths` must be ascending integers in 1 … 15, separated by commas, got {text!r}. "
            "For example: --bit-depths 3,4,8,10"
        )
    return depths


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
    _run(cache, split, _parse_bit_depths(bit_depths), trajectories, images, model, device, out, figures)


def _run(
    cache_name: str,
    split: str,
    bit_depths: tuple[int, ...],
    trajectories: int | None,
    images: bool,
    model: str | None,
    device: str,
    out: Path,
    figures: bool,
) -> None:
    from tqdm import tqdm

    cache = TrajectoryCache.open(cache_name)
    if trajectories is not None:
        check_integer("--trajectories", trajectories, 1, advice="Leave it out to take all.")
    indices = [int(index) for index in cache.indices(split)[:trajectories]]
    if not indices:
        raise ConfigurationError(f"`--split` must have trajectories, got the empty {split!r}. Choose another.")
    decoder = None
    if images:
        try:
            decoder = open_decoder(cache, model, device=device)
        except (ConfigurationError, MissingExtraError) as error:
            typer.echo(f"No images: {error}")
    out.mkdir(parents=True, exist_ok=True)
    with tqdm(total=2 * len(indices), unit="trajectory", desc="distortion") as bar:
        diffusion = tabulate_diffusion(cache, indices, decoder, bar.update)
        quantization = tabulate_quantization(cache, indices, bit_depths, progress=bar.update)
    run: dict[str, Any] = {
        "cache": {"name": cache_name, "sha256": cache.sha256},
        "split": split,
        "trajectories": len(indices),
        "bit_depths": list(bit_depths),
        "model": None if decoder is None else {"id": decoder.model_id, "revision": decoder.revision},
        "version": __version__,
    }
    write_table(out / "fig2a.csv", diffusion, DIFFUSION_COLUMNS)
    write_table(out / "fig2b.csv", quantization, QUANTIZATION_COLUMNS)
    write_atomically(out / "run.json", json.dumps(run, indent=1) + "\n")
    typer.echo(_describe(diffusion, "Fig. 2a", "steps"))
    typer.echo(_describe(quantization, "Fig. 2b", "transmissions and bit depths"))
    written = [out / name for name in ("fig2a.csv", "fig2b.csv", "run.json")]
    if figures:
        from agents.figures import draw_fig2a, draw_fig2b

        try:
            written += draw_fig2a(diffusion, out) + draw_fig2b(quantization, out)
        except MissingExtraError as error:
            typer.echo(f"No figure: {error}")
    typer.echo("wrote " + ", ".join(str(path) for path in written))


if __name__ == "__main__":
    run(main)
