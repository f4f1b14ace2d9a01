"""Compiled loops over the M values of a latent: the only places that touch latents during an episode."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refine_env._compiled import kernel
from refine_env.coding.lloyd_max import QuantizerTable, level_index

__all__ = ["decode_float16", "mean_square_error", "receive", "refine"]

_FLOAT16_SCALE = np.float32(2.0**112)


@kernel
def _half(pattern: Any) -> Any:
    """float32 value of a finite float16 given as its uint16 pattern (Numba knows no float16).

    The exponent and mantissa, moved into a float32's place, are the value times 2^−112, subnormals included.
    """
    magnitude = np.uint32((pattern & 0x7FFF) << 13)
    sign = np.uint32((pattern & 0x8000) << 16)
    value = np.float32(magnitude.view(np.float32) * _FLOAT16_SCALE)
    return np.uint32(value.view(np.uint32) | sign).view(np.float32)


@kernel
def decode_float16(patterns: NDArray[np.uint16], out: NDArray[np.float32]) -> None:
    """float32 values of finite float16 patterns; both (M,)."""
    for m in range(patterns.size):
        out[m] = _half(patterns[m])


@kernel
def mean_square_error(device: NDArray[np.float32], clean: NDArray[np.uint16]) -> float:
    """(1/M)‖ŷ − x_0‖² of [K] Eq. (1), accumulated in float64; ``clean`` as float16 patterns, both (M,)."""
    total = 0.0
    for m in range(device.size):
        error = np.float64(device[m]) - np.float64(_half(clean[m]))
        total += error * error
    return total / device.size


@kernel
def receive(latent: NDArray[np.uint16], clean: NDArray[np.uint16], device: NDArray[np.float32]) -> float:
    """The device takes over ``latent`` as it is: shared randomness, or a lossless delivery.

    Returns:
        The device's new latent mean square error against ``clean``.
    """
    decode_float16(latent, device)
    return mean_square_error(device, clean)


@kernel
def _refine(
    latent: NDArray[np.uint16],
    clean: NDArray[np.uint16],
    device: NDArray[np.float32],
    gain: Any,
    scale: Any,
    levels: NDArray[np.float32],
    thresholds: NDArray[np.float32],
    first_index: NDArray[np.int32],
    origin: Any,
    bins_per_unit: Any,
) -> float:
    total = 0.0
    for m in range(device.size):
        prediction = gain * device[m]
        z = (_half(latent[m]) - prediction) / scale
        index = level_index(z, thresholds, first_index, origin, bins_per_unit)
        value = prediction + scale * levels[index]
        device[m] = value
        error = np.float64(value) - np.float64(_half(clean[m]))
        total += error * error
    return total / device.size


def refine(
    latent: NDArray[np.uint16],
    clean: NDArray[np.uint16],
    device: NDArray[np.float32],
    gain: float,
    scale: float,
    table: QuantizerTable,
) -> float:
    """One delivery: predict, standardize, quantize and reconstruct, in place ([K] Eqs. 5–7).

    x̂ ← g x̂ + s Q_b((x − g x̂)/s), in float32, in one pass.

    Args:
        latent: x_t as float16 patterns (M,).
        clean: x_0 as float16 patterns (M,).
        device: x̂_{t_p} as float32 (M,), overwritten with x̂_t.
        gain: prediction gain g.
        scale: residual scale s > 0.
        table: the b-bit quantizer's tables.

    Returns:
        (1/M)‖x̂_t − x_0‖².
    """
    return float(
        _refine(
            latent,
            clean,
            device,
            np.float32(gain),
            np.float32(scale),
            table.levels,
            table.thresholds,
            table.first_index,
            table.origin,
            table.bins_per_unit,
        )
    )
