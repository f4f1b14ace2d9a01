"""Compiled loops over the M values of a latent: the only places that touch latents during an episode."""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from refine_env._compiled import kernel
from refine_env.coding.lloyd_max import LOSSLESS_BITS, QuantizerTable

__all__ = [
    "CoderTables",
    "begin",
    "decode_float16",
    "deliver_batch",
    "mean_square_error",
    "pack_bits",
    "quantize_indices",
    "quantize_value",
    "reconstruct",
    "refine",
    "score_chains",
    "unpack_bits",
]

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
def _row(value: Any, cells: NDArray[np.float32], origin: Any, bins_per_unit: Any) -> Any:
    """The row of ``cells`` that settles ``value``."""
    position = (value - origin) * bins_per_unit
    # Clamp as a float: an outlier's position may not fit an integer.
    return int(min(max(position, np.float32(0.0)), np.float32(cells.shape[0] - 1)))


@kernel
def quantize_value(value: Any, cells: NDArray[np.float32], origin: Any, bins_per_unit: Any) -> Any:
    """The level of ``value``, both float32: ``levels[numpy.searchsorted(thresholds, value, side="left")]``."""
    row = _row(value, cells, origin, bins_per_unit)
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
def _standardize(pattern: Any, prediction: Any, reciprocal: Any) -> Any:
    """(x − g x̂)·(1/s) of one value."""
    return (_half(pattern) - prediction) * reciprocal


@kernel
def _add_level(prediction: Any, scale: Any, level: Any) -> Any:
    """g x̂ + s Q_b(z) of one value."""
    return prediction + scale * level


@kernel
def _refine(
    latent: NDArray[np.uint16],
    held: NDArray[np.float32],
    device: NDArray[np.float32],
    gain: Any,
    scale: Any,
    cells: NDArray[np.float32],
    origin: Any,
    bins_per_unit: Any,
) -> None:
    reciprocal = np.float32(1.0) / scale
    for m in range(device.size):
        prediction = gain * held[m]
        z = _standardize(latent[m], prediction, reciprocal)
        device[m] = _add_level(prediction, scale, quantize_value(z, cells, origin, bins_per_unit))


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
    _refine(latent, device, device, np.float32(gain), np.float32(scale), table.cells, table.origin, table.bins_per_unit)


@kernel
def _quantize_indices(
    latent: NDArray[np.uint16],
    device: NDArray[np.float32],
    gain: Any,
    scale: Any,
    cells: NDArray[np.float32],
    lower: NDArray[np.uint16],
    origin: Any,
    bins_per_unit: Any,
    indices: NDArray[np.uint16],
) -> None:
    reciprocal = np.float32(1.0) / scale
    for m in range(device.size):
        z = _standardize(latent[m], gain * device[m], reciprocal)
        row = _row(z, cells, origin, bins_per_unit)
        indices[m] = lower[row] + 1 if z > cells[row, 0] else lower[row]


def quantize_indices(
    latent: NDArray[np.uint16],
    device: NDArray[np.float32],
    gain: float,
    scale: float,
    table: QuantizerTable,
    lower: NDArray[np.uint16],
) -> NDArray[np.uint16]:
    """What a delivery sends ([K] Eqs. 5–7): the indices of the levels that :func:`refine` takes.

    Args:
        latent: x_t as float16 patterns (M,).
        device: x̂_{t_p} as float32 (M,), left as it is.
        gain: prediction gain g.
        scale: residual scale s > 0.
        table: the b-bit quantizer's tables.
        lower: index of the lower level of every row of the table's cells (bins,).

    Returns:
        Indices into the levels, uint16 (M,).
    """
    indices = np.empty(device.size, dtype=np.uint16)
    _quantize_indices(
        latent,
        device,
        np.float32(gain),
        np.float32(scale),
        table.cells,
        lower,
        table.origin,
        table.bins_per_unit,
        indices,
    )
    return indices


@kernel
def _reconstruct(
    indices: NDArray[np.uint16], device: NDArray[np.float32], gain: Any, scale: Any, levels: NDArray[np.float32]
) -> None:
    for m in range(device.size):
        device[m] = _add_level(gain * device[m], scale, levels[indices[m]])


def reconstruct(
    indices: NDArray[np.uint16], device: NDArray[np.float32], gain: float, scale: float, table: QuantizerTable
) -> None:
    """The device's part of a delivery, in place: x̂ ← g x̂ + s levels[index], as :func:`refine` has it.

    Args:
        indices: of :func:`quantize_indices`, each below 2^b, uint16 (M,).
        device: x̂_{t_p} as float32 (M,), overwritten with x̂_t.
        gain: prediction gain g.
        scale: residual scale s > 0.
        table: the b-bit quantizer's tables.
    """
    _reconstruct(indices, device, np.float32(gain), np.float32(scale), table.levels)


@kernel
def pack_bits(indices: NDArray[np.uint16], bits: int, out: NDArray[np.uint8]) -> None:
    """Write b-bit indices one after the other, most significant bit first, the last byte filled up with zeros.

    Args:
        indices: each below 2^b (M,).
        bits: b, 1 … 16.
        out: ⌈Mb/8⌉ bytes.
    """
    held, count, position = np.uint32(0), 0, 0  # bits not yet written, below 8 of them between two indices
    for m in range(indices.size):
        held = np.uint32((held << np.uint32(bits)) | np.uint32(indices[m]))
        count += bits
        while count >= 8:
            count -= 8
            out[position] = np.uint8((held >> np.uint32(count)) & np.uint32(0xFF))
            position += 1
    if count > 0:
        out[position] = np.uint8((held << np.uint32(8 - count)) & np.uint32(0xFF))


@kernel
def unpack_bits(data: NDArray[np.uint8], bits: int, indices: NDArray[np.uint16]) -> None:
    """Read what :func:`pack_bits` wrote.

    Args:
        data: ⌈Mb/8⌉ bytes.
        bits: b, 1 … 16.
        indices: overwritten with M indices below 2^b.
    """
    held, count, position = np.uint32(0), 0, 0
    mask = np.uint32((1 << bits) - 1)
    for m in range(indices.size):
        while count < bits:
            held = np.uint32((held << np.uint32(8)) | np.uint32(data[position]))
            position += 1
            count += 8
        count -= bits
        indices[m] = np.uint16((held >> np.uint32(count)) & mask)


@kernel
def begin(patterns: NDArray[np.uint16], device: NDArray[np.float32]) -> Any:
    """Give the device x_T, which it shares with the server; returns the MSE of that. ``patterns`` is (T+1, M)."""
    decode_float16(patterns[-1], device)
    return mean_square_error(device, patterns[0])


class CoderTables(NamedTuple):
    """What deliveries of a coder without side information are carried out with, by step t, device step t_p and b.

    Attributes:
        gain: prediction gain g, float32 (T+1, T+1), indexed [t, t_p].
        scale: residual scale s, float32 (T+1, T+1).
        variance: s² in full precision, float64 (T+1, T+1).
        base_distortion: D_base(b), float64 (17,), 0 where b is not used.
        cells: the quantizers' cells, one table under the other, float32 (rows, 3).
        first_row: a quantizer's first row in ``cells``, int64 (17,).
        num_rows: its number of rows, int64 (17,).
        origin: float32 (17,).
        bins_per_unit: float32 (17,).
    """

    gain: NDArray[np.float32]
    scale: NDArray[np.float32]
    variance: NDArray[np.float64]
    base_distortion: NDArray[np.float64]
    cells: NDArray[np.float32]
    first_row: NDArray[np.int64]
    num_rows: NDArray[np.int64]
    origin: NDArray[np.float32]
    bins_per_unit: NDArray[np.float32]


def _type_pointer(typing_context: Any, address: Any) -> Any:
    """The address of an array of uint16 as a pointer to it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return _PATTERNS(address), generate


_PATTERNS: Any = types.CPointer(types.uint16)  # type: ignore[no-untyped-call]
_pointer: Any = intrinsic(_type_pointer)
_array_at: Any = numba.carray  # type: ignore[attr-defined]


@kernel
def _deliver(
    address: int,
    held: NDArray[np.float32],
    device: NDArray[np.float32],
    step: int,
    device_step: int,
    bits: int,
    tables: CoderTables,
) -> None:
    """One delivery from ``held`` into ``device``, which may be the same array."""
    latent_dim = device.size
    latent = _array_at(_pointer(np.uint64(address + 2 * latent_dim * step)), (latent_dim,))
    if bits == LOSSLESS_BITS:
        decode_float16(latent, device)
        return
    first = tables.first_row[bits]
    cells = tables.cells[first : first + tables.num_rows[bits]]
    _refine(
        latent,
        held,
        device,
        tables.gain[step, device_step],
        tables.scale[step, device_step],
        cells,
        tables.origin[bits],
        tables.bins_per_unit[bits],
    )


@kernel
def deliver_batch(
    state: NDArray[Any], addresses: NDArray[np.uint64], device: NDArray[np.float32], tables: CoderTables
) -> None:
    """Carry out the deliveries of a batch that have just completed, and measure what the devices then hold.

    Args:
        state: records with the fields ``delivered``, ``device_step``, ``predecessor``, ``device_bits``,
            ``device_error``, ``latent_mse`` (N,); the last two are written.
        addresses: of every episode's float16 patterns (T+1, M).
        device: (N, M), or (N, 0) where there are no latents: then only the predicted error is written.
        tables: the coder's.
    """
    latent_dim = device.shape[1]
    for i in range(state.size):
        s = state[i]
        if not s.delivered:
            continue
        s.device_error = tables.variance[s.device_step, s.predecessor] * tables.base_distortion[s.device_bits]
        if latent_dim > 0:
            _deliver(addresses[i], device[i], device[i], s.device_step, s.predecessor, s.device_bits, tables)
            s.latent_mse = mean_square_error(device[i], _array_at(_pointer(addresses[i]), (latent_dim,)))


@kernel
def score_chains(
    patterns: NDArray[np.uint16],
    steps: NDArray[np.int64],
    bits: NDArray[np.int64],
    ends: NDArray[np.int64],
    shared: NDArray[np.int64],
    tables: CoderTables,
    stack: NDArray[np.float32],
    mse: NDArray[np.float64],
    finals: NDArray[np.float32],
) -> None:
    """Carry out chains of deliveries of one trajectory, common beginnings once, and measure what they end in.

    Args:
        patterns: float16 patterns (T+1, M).
        steps: steps delivered, all chains one after the other, in lexicographic order of the chains.
        bits: their bit depths.
        ends: where each chain ends in ``steps`` (C,).
        shared: how many deliveries each chain has in common with the one before it (C,).
        tables: the coder's.
        stack: scratch, (longest chain + 1, M): row d is the device after d deliveries.
        mse: (1/M)‖ŷ − x_0‖² of every chain (C,), the result.
        finals: what the device holds at the end, (C, M); or (0, M) to leave it out.
    """
    num_steps = patterns.shape[0] - 1
    address = patterns.ctypes.data
    decode_float16(patterns[num_steps], stack[0])
    start = 0
    for chain in range(ends.size):
        length = ends[chain] - start
        for d in range(shared[chain], length):
            held_step = num_steps if d == 0 else steps[start + d - 1]
            _deliver(address, stack[d], stack[d + 1], steps[start + d], held_step, bits[start + d], tables)
        mse[chain] = mean_square_error(stack[length], patterns[0])
        if finals.shape[0] > 0:
            finals[chain] = stack[length]
        start = ends[chain]
