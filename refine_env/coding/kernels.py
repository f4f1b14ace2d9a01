"""Compiled loops over the M values of a latent: the only places that touch latents during an episode."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refine_env._compiled import kernel
from refine_env.coding.lloyd_max import QuantizerTable

__all__ = ["decode_float16", "mean_square_error", "quantize_value", "refine"]

_FLOAT16_SCALE = np.float32(2.0**112)
_LANES = 8


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
def quantize_value(value: Any, cells: NDArray[np.float32], origin: Any, bins_per_unit: Any) -> Any:
    """The level of ``value``, both float32: ``levels[numpy.searchsorted(thresholds, value, side="left")]``."""
    position = (value - origin) * bins_per_unit
    # Clamp as a float: an outlier's position may not fit an integer.
    row = int(min(max(position, np.float32(0.0)), np.float32(cells.shape[0] - 1)))
    return cells[row, 2] if value > cells[row, 0] else cells[row, 1]


@kernel
def mean_square_error(device: NDArray[np.float32], clean: NDArray[np.uint16]) -> Any:
    """(1/M)‖ŷ − x_0‖² of [K] Eq. (1); ``clean`` as float16 patterns, both (M,).

    Accumulated in float64 in eight interleaved sums, which the processor can add side by side.
    """
    sums = np.zeros(_LANES)
    whole = device.size // _LANES
    for block in range(whole):
        for lane in range(_LANES):
            m = block * _LANES + lane
            error = np.float64(device[m]) - np.float64(_half(clean[m]))
            sums[lane] += error * error
    for m in range(whole * _LANES, device.size):
        error = np.float64(device[m]) - np.float64(_half(clean[m]))
        sums[0] += error * error
    return sums.sum() / device.size


@kernel
def _refine(
    latent: NDArray[np.uint16],
    device: NDArray[np.float32],
    gain: Any,
    scale: Any,
    cells: NDArray[np.float32],
    origin: Any,
    bins_per_unit: Any,
) -> None:
    reciprocal = np.float32(1.0) / scale
    for m in range(device.size):
        prediction = gain * device[m]
        z = (_half(latent[m]) - prediction) * reciprocal
        device[m] = prediction + scale * quantize_value(z, cells, origin, bins_per_unit)


def refine(
    latent: NDArray[np.uint16], device: NDArray[np.float32], gain: float, scale: float, table: QuantizerTable
) -> None:
    """One delivery: predict, standardize, quantize and reconstruct, in place ([K] Eqs. 5–7).

    x̂ ← g x̂ + s Q_b((x − g x̂)·(1/s)), in float32 in this order, in one pass without a temporary.

    Args:
        latent: x_t as float16 patterns (M,).
        device: x̂_{t_p} as float32 (M,), overwritten with x̂_t.
        gain: prediction gain g.
        scale: residual scale s > 0.
        table: the b-bit quantizer's tables.
    """
    _refine(latent, device, np.float32(gain), np.float32(scale), table.cells, table.origin, table.bins_per_unit)
