"""The paper's distortion models against simulation: the tables of [K] Fig. 2, see :mod:`agents.distortion`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agents.studies.images import Decoder, decode
from refine_env import TrajectoryCache
from refine_env.coding import ForwardCoder, Transmission
from refine_env.evaluation import Table, bootstrap_interval, read_table
from refine_env.metrics import mean_square_error
from refine_env.model.distortion import diffusion_distortion

__all__ = [
    "DEFAULT_BIT_DEPTHS",
    "DIFFUSION_COLUMNS",
    "QUANTIZATION_COLUMNS",
    "default_transmissions",
    "offsets_db",
    "read_distortion_table",
    "tabulate_diffusion",
    "tabulate_quantization",
]

_COMPARISON = dict.fromkeys(("model", "simulated", "simulated_low", "simulated_high", "offset_db"), float)
_IMAGE_ERRORS = ("image_mse", "image_mse_low", "image_mse_high")

DIFFUSION_COLUMNS: dict[str, type] = {
    "step": int,
    "alpha_bar": float,
    **_COMPARISON,
    **dict.fromkeys(_IMAGE_ERRORS, float),
    "trajectories": int,
}
"""Columns of Fig. 2a's table, a row for each t: D_diff of [K] Eq. (9), E‖x_t − x_0‖²/M over the trajectories with a
95 % bootstrap interval, 10 log10 of their ratio (none at t = 0, where both are 0), and the mean square error of the
decoded images of x_t and x_0 on [0, 1], which is 1/PSNR (none without a model to decode)."""

QUANTIZATION_COLUMNS: dict[str, type] = {
    **dict.fromkeys(("device_step", "step", "bits"), int),
    **_COMPARISON,
    "trajectories": int,
}
"""Columns of Fig. 2b's table, a row for each transmission and bit depth: D_quant of [K] Eq. (10), and E‖x̂_t − x_t‖²/M
where the device holds x_{t_p} exactly."""

DEFAULT_BIT_DEPTHS = tuple(range(1, 13))

_OPTIONAL_COLUMNS = ("offset_db", *_IMAGE_ERRORS)


def tabulate_diffusion(
    cache: TrajectoryCache,
    indices: Iterable[int],
    decoder: Decoder | None = None,
    progress: Callable[[int], None] | None = None,
) -> Table:
    """Model and simulation of what is lost by showing x_t instead of x_0.

    Args:
        cache: the trajectories.
        indices: indices of those to use.
        decoder: the decoder of their model; without it the image columns stay empty.
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
        table.append(
            {
                "step": step,
                "alpha_bar": float(cache.schedule.alpha_bar[step]),
                **_compare(float(model[step]), [error[step] for error in errors]),
                **dict(zip(_IMAGE_ERRORS, _mean_and_interval(images_at) if images_at else [None] * 3, strict=True)),
                "trajectories": len(errors),
            }
        )
    return table


def default_transmissions(num_steps: int) -> list[tuple[int, int]]:
    """Pairs (t_p, t) for Fig. 2b: a first transmission of x_0, a refinement early, one late, and the last step's."""
    pairs = [(num_steps, 0), (round(0.8 * num_steps), round(0.6 * num_steps)), (round(0.2 * num_steps), 0), (1, 0)]
    return [(device_step, step) for device_step, step in dict.fromkeys(pairs) if device_step > step]


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
        indices: indices of those to use.
        bit_depths: b, ascending, below 16, where nothing is lost.
        transmissions: pairs (t_p, t), t_p > t; default :func:`default_transmissions`.
        progress: called after each trajectory with 1.

    Returns:
        Rows with :data:`QUANTIZATION_COLUMNS`.
    """
    coder = ForwardCoder(cache.schedule, tuple(bit_depths))
    pairs = default_transmissions(cache.num_steps) if transmissions is None else transmissions
    cases = [(device_step, step, bits) for device_step, step in pairs for bits in bit_depths]
    errors: dict[tuple[int, int, int], list[float]] = {case: [] for case in cases}
    for index in indices:
        latents = np.ascontiguousarray(cache.latents(index)).reshape(cache.num_steps + 1, -1)
        for device_step, step, bits in cases:
            device = latents[device_step].astype(np.float32)
            coder.deliver(latents.view(np.uint16), device, Transmission(step, device_step, bits))
            errors[device_step, step, bits].append(float(np.square(device.astype(np.float64) - latents[step]).mean()))
        if progress is not None:
            progress(1)
    return [
        {
            "device_step": device_step,
            "step": step,
            "bits": bits,
            **_compare(coder.refinement(Transmission(step, device_step, bits)).error, errors[device_step, step, bits]),
            "trajectories": len(errors[device_step, step, bits]),
        }
        for device_step, step, bits in cases
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
