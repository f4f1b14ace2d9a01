"""Compiled loops over the M values of a latent: the only places that touch latents during an episode."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from refine_env._compiled import kernel
from refine_env.coding.lloyd_max import LOSSLESS_BITS, Cells, QuantizerTable
from refine_env.model.distortion import RefinementModel
from refine_env.model.rules import residual_variance

__all__ = [
    "Chains",
    "CoderTables",
    "Transmission",
    "add_residual",
    "begin",
    "begin_batch",
    "decode_float16",
    "deliver",
    "deliver_batch",
    "dequantize",
    "fill_orders",
    "fit_scale",
    "hadamard",
    "index_values",
    "mean_square_error",
    "pack_bits",
    "predict_errors",
    "quantize_value",
    "refine",
    "residual",
    "rotate",
    "round_to_half",
    "score_chains",
    "unpack_bits",
    "unrotate",
]

Floats: TypeAlias = NDArray[np.float32]
Patterns: TypeAlias = NDArray[np.uint16]
Orders: TypeAlias = NDArray[np.int32]
"""Values of a latent, float16 patterns of one, and the rows of :func:`fill_orders`, under short names."""

_FLOAT16_SCALE = np.float32(2.0**112)
_LARGEST_FLOAT16 = 65504.0
_LARGEST_PATTERN = 0x7BFF
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
def decode_float16(patterns: Patterns, out: Floats) -> None:
    """float32 values of finite float16 patterns; both (M,)."""
    for m in range(patterns.size):
        out[m] = _half(patterns[m])


@kernel
def _row(value: Any, cells: Cells) -> Any:
    """The row of the cells that settles ``value``."""
    position = (value - cells.origin) * cells.bins_per_unit
    # Clamp as a float: an outlier's position may not fit an integer.
    return int(min(max(position, np.float32(0.0)), np.float32(cells.rows.shape[0] - 1)))


@kernel
def quantize_value(value: Any, cells: Cells) -> Any:
    """The level of ``value``, both float32: ``levels[numpy.searchsorted(thresholds, value, side="left")]``."""
    row = _row(value, cells)
    return cells.rows[row, 2] if value > cells.rows[row, 0] else cells.rows[row, 1]


@kernel
def _total(sums: NDArray[np.float64]) -> float:
    total = 0.0
    for lane in range(_LANES):
        total += sums[lane]
    return total


@kernel
def mean_square_error(device: Floats, clean: Patterns) -> Any:
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
    return _total(sums) / device.size


@kernel
def _refine(latent: Patterns, held: Floats, device: Floats, gain: Any, scale: Any, cells: Cells) -> None:
    reciprocal = np.float32(1.0) / scale
    for m in range(device.size):
        prediction = gain * held[m]
        z = (_half(latent[m]) - prediction) * reciprocal
        device[m] = prediction + scale * quantize_value(z, cells)


def refine(latent: Patterns, device: Floats, gain: float, scale: float, table: QuantizerTable) -> None:
    """One delivery: predict, standardize, quantize and reconstruct, in place ([K] Eqs. 5–7).

    x̂ ← c x̂ + s Q_b((x − c x̂)·(1/s)), in float32 in this order, in one pass without a temporary.

    Args:
        latent: x_t as float16 patterns (M,).
        device: x̂_{t_p} as float32 (M,), overwritten with x̂_t.
        gain: prediction gain c.
        scale: residual scale s > 0.
        table: the b-bit quantizer's tables.
    """
    _refine(latent, device, device, np.float32(gain), np.float32(scale), table.cells)


@kernel
def pack_bits(indices: NDArray[np.uint16], bits: int, out: NDArray[np.uint8]) -> None:
    """Write b-bit indices one after the other, most significant bit first, the last byte filled up with zeros.

    Args:
        indices: each below 2^b (M,).
        bits: b, 1 … 16.
        out: ⌈Mb/8⌉ bytes.
    """
    pending, count, position = np.uint32(0), 0, 0  # bits not yet written, below 8 of them between two indices
    for m in range(indices.size):
        pending = np.uint32((pending << np.uint32(bits)) | np.uint32(indices[m]))
        count += bits
        while count >= 8:
            count -= 8
            out[position] = np.uint8((pending >> np.uint32(count)) & np.uint32(0xFF))
            position += 1
    if count > 0:
        out[position] = np.uint8((pending << np.uint32(8 - count)) & np.uint32(0xFF))


@kernel
def unpack_bits(data: NDArray[np.uint8], bits: int, indices: NDArray[np.uint16]) -> None:
    """Read what :func:`pack_bits` wrote.

    Args:
        data: ⌈Mb/8⌉ bytes.
        bits: b, 1 … 16.
        indices: overwritten with M indices below 2^b.
    """
    pending, count, position = np.uint32(0), 0, 0
    mask = np.uint32((1 << bits) - 1)
    for m in range(indices.size):
        while count < bits:
            pending = np.uint32((pending << np.uint32(8)) | np.uint32(data[position]))
            position += 1
            count += 8
        count -= bits
        indices[m] = np.uint16((pending >> np.uint32(count)) & mask)


@kernel
def round_to_half(value: float) -> Any:
    """A float >= 0 rounded to the nearest float16, ties to even, as float32; the largest finite one at most."""
    if value >= _LARGEST_FLOAT16:
        return np.float32(_LARGEST_FLOAT16)
    # A float16 has 11 significant bits, fewer below 2^-14: its neighbors are this far apart.
    spacing = 2.0 ** (max(np.floor(np.log2(value)), -14.0) - 10.0) if value > 0.0 else 1.0
    if value >= 2.0 * 1024.0 * spacing:  # the logarithm of a value just below a power of two rounds up, or down
        spacing *= 2.0
    elif value < 1024.0 * spacing and spacing > 2.0**-24:
        spacing *= 0.5
    return np.float32(np.rint(value / spacing) * spacing)


@kernel
def _raise_half(value: Any, steps: int) -> Any:
    """The float16 so many above a float16 value >= 0, both as float32; 0 if there is none."""
    pattern = (np.float32(value / _FLOAT16_SCALE).view(np.uint32) >> np.uint32(13)) + np.uint32(steps)
    return _half(pattern) if pattern <= np.uint32(_LARGEST_PATTERN) else np.float32(0.0)


@kernel
def _codelength(values: Floats, scale: Any, cells: Cells, costs: NDArray[np.int32]) -> Any:
    reciprocal = np.float32(1.0) / scale
    total = np.int64(0)
    for m in range(values.size):
        z = values[m] * reciprocal
        row = _row(z, cells)
        total += costs[row, 1] if z > cells.rows[row, 0] else costs[row, 0]
    return total


@kernel
def fit_scale(values: Floats, scale: Any, cells: Cells, costs: NDArray[np.int32], longest: int) -> Any:
    """The scale with which the indices of a residual fit their payload.

    That is nearly always the one given. A larger one makes outer cells, which cost more, rarer: it is raised by 1,
    then 2, 4, 8, … float16 steps of at most 0.1 % until the codelength fits. The quantizer's error grows by less
    than s² does.

    Args:
        values: the rotated residual (M,).
        scale: s > 0, a float16 value as float32.
        cells: the quantizer's.
        costs: codelengths of the two levels of each row of the cells, int32 (rows, 2).
        longest: codelength that fits, in the unit of ``costs``.

    Returns:
        s, a float16 value as float32; 0, nothing but the prediction, where even the largest does not do.
    """
    steps = 1
    while scale > 0.0 and _codelength(values, scale, cells, costs) > longest:
        scale = _raise_half(scale, steps)
        steps *= 2
    return scale


@kernel
def hadamard(values: Any) -> None:
    """Walsh–Hadamard transform in place, in natural order, without a factor: H (H x) = size · x.

    Args:
        values: float32, their number a power of two.
    """
    size = values.size
    half = 1
    if size >= 8:  # the three smallest strides at once, in registers
        half = 8
        for start in range(0, size, 8):
            a, b, c, d = values[start], values[start + 1], values[start + 2], values[start + 3]
            e, f, g, h = values[start + 4], values[start + 5], values[start + 6], values[start + 7]
            a, b, c, d, e, f, g, h = a + b, a - b, c + d, c - d, e + f, e - f, g + h, g - h
            a, b, c, d, e, f, g, h = a + c, b + d, a - c, b - d, e + g, f + h, e - g, f - h
            values[start], values[start + 1], values[start + 2], values[start + 3] = a + e, b + f, c + g, d + h
            values[start + 4], values[start + 5], values[start + 6], values[start + 7] = a - e, b - f, c - g, d - h
    while 4 * half <= size:  # two strides in one pass
        for start in range(0, size, 4 * half):
            first = values[start : start + half]
            second = values[start + half : start + 2 * half]
            third = values[start + 2 * half : start + 3 * half]
            fourth = values[start + 3 * half : start + 4 * half]
            for j in range(half):
                a, b, c, d = first[j], second[j], third[j], fourth[j]
                a, b, c, d = a + b, a - b, c + d, c - d
                first[j] = a + c
                second[j] = b + d
                third[j] = a - c
                fourth[j] = b - d
        half *= 4
    while half < size:
        for start in range(0, size, 2 * half):
            first = values[start : start + half]
            second = values[start + half : start + 2 * half]
            for j in range(half):
                a, b = first[j], second[j]
                first[j] = a + b
                second[j] = a - b
        half *= 2


@kernel
def _block(size: Any) -> Any:
    """The largest power of two that is at most ``size``."""
    block = 1
    while 2 * block <= size:
        block *= 2
    return block


@kernel
def _transform(values: Any, block: int) -> None:
    """H/√block of a block, in place."""
    hadamard(values)
    factor = np.float32(1.0 / np.sqrt(np.float64(block)))
    for m in range(values.size):
        values[m] *= factor


@kernel
def rotate(values: Floats, order: Orders, out: Floats) -> None:
    """A random rotation: permutation, random signs, orthonormal Walsh–Hadamard transform.

    Where M is no power of two the transform is taken of the first and then of the last P values, P the largest power
    of two below M: two overlapping blocks, which cover all.

    Args:
        values: (M,).
        order: a row of :func:`fill_orders` (M,).
        out: overwritten with the rotated values (M,).
    """
    for m in range(values.size):
        source = order[m]
        out[m] = values[source] if source >= 0 else -values[~source]
    block = _block(values.size)
    _transform(out[:block], block)
    if block < values.size:
        _transform(out[values.size - block :], block)


@kernel
def unrotate(values: Floats, order: Orders, out: Floats) -> None:
    """The inverse of :func:`rotate`; ``values`` is overwritten, too.

    Args:
        values: (M,), scratch afterwards.
        order: as the rotation had it (M,).
        out: overwritten with what was rotated (M,).
    """
    block = _block(values.size)
    if block < values.size:
        _transform(values[values.size - block :], block)
    _transform(values[:block], block)
    for m in range(values.size):
        source = order[m]
        if source >= 0:
            out[source] = values[m]
        else:
            out[~source] = -values[m]


@kernel
def _mix(state: Any) -> Any:
    """SplitMix64's output function."""
    z = np.uint64(state)
    z = np.uint64((z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9))
    z = np.uint64((z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB))
    return np.uint64(z ^ (z >> np.uint64(31)))


@kernel
def fill_orders(orders: Orders, first: int) -> None:
    """Permutations and signs of rotations, from a generator of our own: every version draws the same.

    SplitMix64 seeded by the rotation's number and M; Fisher–Yates with its upper 32 bits, then one bit a sign.

    Args:
        orders: overwritten (rotations, M): index j for +x_j, ~j for −x_j.
        first: the number of the first of these rotations.
    """
    size = orders.shape[1]
    for k in range(orders.shape[0]):
        order = orders[k]
        state = _mix(np.uint64(size) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(first + k))
        for m in range(size):
            order[m] = m
        for m in range(size - 1, 0, -1):
            state = np.uint64(state + np.uint64(0x9E3779B97F4A7C15))
            other = np.int64(((_mix(state) >> np.uint64(32)) * np.uint64(m + 1)) >> np.uint64(32))
            order[m], order[other] = order[other], order[m]
        for m in range(size):
            state = np.uint64(state + np.uint64(0x9E3779B97F4A7C15))
            if _mix(state) >> np.uint64(63):
                order[m] = ~order[m]


@kernel
def residual(latent: Patterns, held: Floats, gain: Any, out: Floats) -> Any:
    """x − c x̂, and its mean square.

    Args:
        latent: x_t as float16 patterns (M,).
        held: x̂_{t_p} (M,).
        gain: prediction gain c, float32.
        out: overwritten with the residual (M,).
    """
    sums = np.zeros(_LANES)
    whole = held.size // _LANES
    for block in range(whole):
        for lane in range(_LANES):
            m = block * _LANES + lane
            value = _half(latent[m]) - gain * held[m]
            out[m] = value
            sums[lane] += np.float64(value) * np.float64(value)
    for m in range(whole * _LANES, held.size):
        value = _half(latent[m]) - gain * held[m]
        out[m] = value
        sums[0] += np.float64(value) * np.float64(value)
    return _total(sums) / held.size


@kernel
def add_residual(held: Floats, gain: Any, decoded: Floats, device: Any) -> None:
    """c x̂ and the decoded residual, added up in ``device``; all (M,)."""
    for m in range(device.size):
        device[m] = gain * held[m] + decoded[m]


@kernel
def dequantize(indices: NDArray[np.uint16], levels: Floats, scale: Any, out: Any) -> None:
    """s times the levels of these indices; all (M,) but for the levels."""
    for m in range(indices.size):
        out[m] = scale * levels[indices[m]]


@kernel
def _quantize_in_place(values: Floats, scale: Any, cells: Cells) -> None:
    """s Q_b(z/s) of every value."""
    reciprocal = np.float32(1.0) / scale
    for m in range(values.size):
        values[m] = scale * quantize_value(values[m] * reciprocal, cells)


@kernel
def index_values(
    values: Floats, scale: Any, cells: Cells, lower: NDArray[np.uint16], indices: NDArray[np.uint16]
) -> None:
    """The indices of the levels that quantized values have.

    Args:
        values: the residual (M,).
        scale: s > 0, float32.
        cells: the quantizer's.
        lower: index of the lower level of every row of the cells (bins,).
        indices: overwritten (M,).
    """
    reciprocal = np.float32(1.0) / scale
    for m in range(values.size):
        z = values[m] * reciprocal
        row = _row(z, cells)
        indices[m] = lower[row] + 1 if z > cells.rows[row, 0] else lower[row]


@kernel
def begin(patterns: Patterns, first_step: int, device: Floats) -> Any:
    """Give the device what it starts with; returns the MSE of that.

    Args:
        patterns: float16 patterns, (T+1, M) with x_T, which device and server share; or (T, M): the device starts
            from the prior mean, 0.
        first_step: of what the device starts with: T, or m where it has the midpoint x_m.
        device: overwritten (M,).
    """
    if patterns.shape[0] > first_step:
        decode_float16(patterns[first_step], device)
    else:
        device[:] = np.float32(0.0)
    return mean_square_error(device, patterns[0])


class Transmission(NamedTuple):
    """What is sent, and to which device.

    Attributes:
        step: t.
        device_step: t_p.
        bits: b.
        device_error: e_p, predicted coding error of what the device holds.
        number: how many deliveries there were before in the episode, which decides on the rotation.
    """

    step: int
    device_step: int
    bits: int
    device_error: float = 0.0
    number: int = 0


class CoderTables(NamedTuple):
    """What deliveries of a coder are carried out with, by step t, device step t_p and b.

    Attributes:
        gain: prediction gain c, float32 (T+1, T+1), indexed [t, t_p].
        model: what s² is by the model.
        base_distortion: D_base(b), float64 (17,), 0 where b is not used.
        rows: those of the quantizers' cells, one quantizer under the other, float32 (rows, 4).
        span: a quantizer's first row in ``rows``, and the one after its last, int64 (17, 2).
        origin: of the quantizers' cells, float32 (17,).
        bins_per_unit: of the quantizers' cells, float32 (17,).
        rotation: whether residuals are rotated.
        sent_scale: whether s is the residual's own root mean square.
        costs: codelengths of the two levels of each of the ``rows``, int32 (rows, 2); (1, 2) without entropy coding.
        longest: codelength that fits a payload, in the unit of ``costs``, int64 (17,); -1 where indices are not
            entropy-coded.
    """

    gain: Floats
    model: RefinementModel
    base_distortion: NDArray[np.float64]
    rows: Floats
    span: NDArray[np.int64]
    origin: Floats
    bins_per_unit: Floats
    rotation: bool
    sent_scale: bool
    costs: NDArray[np.int32]
    longest: NDArray[np.int64]


def _type_pointer(typing_context: Any, address: Any) -> Any:
    """The address of an array of uint16 as a pointer to it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return _PATTERNS(address), generate


_PATTERNS: Any = types.CPointer(types.uint16)  # type: ignore[no-untyped-call]
_pointer: Any = intrinsic(_type_pointer)
_array_at: Any = numba.carray  # type: ignore[attr-defined]


@kernel
def _predicted_variance(sent: Transmission, tables: CoderTables) -> Any:
    """s² of the residual, by the model."""
    return residual_variance(tables.model, sent.step, sent.device_step, sent.device_error)


@kernel
def deliver(
    latent: Patterns,
    held: Floats,
    device: Floats,
    sent: Transmission,
    tables: CoderTables,
    orders: Orders | None,
    work: Floats,
) -> Any:
    """One delivery; returns the predicted coding error of what the device then holds.

    Args:
        latent: x_t as float16 patterns (M,).
        held: x̂_{t_p} (M,).
        device: overwritten with x̂_t (M,); may be ``held``.
        sent: what is sent.
        tables: the coder's.
        orders: rotations of :func:`fill_orders`, not looked at where the coder has none; None where it does not send
            the scale either.
        work: scratch (2, M); not looked at where the coder neither rotates nor sends the scale.
    """
    bits = sent.bits
    if bits == LOSSLESS_BITS:
        decode_float16(latent, device)
        return 0.0
    first, end = tables.span[bits]
    cells = Cells(tables.rows[first:end], tables.origin[bits], tables.bins_per_unit[bits])
    gain = tables.gain[sent.step, sent.device_step]
    variance = _predicted_variance(sent, tables)
    if orders is None:  # known when this is compiled: nothing below is, then
        if variance > 0.0:
            _refine(latent, held, device, gain, np.float32(np.sqrt(variance)), cells)
        return variance * tables.base_distortion[bits]
    values, rotated = work[0], work[1]
    mean_square = residual(latent, held, gain, values)
    scale = round_to_half(np.sqrt(mean_square)) if tables.sent_scale else np.float32(np.sqrt(variance))
    if tables.rotation and scale > 0.0:
        rotate(values, orders[sent.number], rotated)
        if tables.longest[bits] >= 0:
            scale = fit_scale(rotated, scale, cells, tables.costs[first:end], tables.longest[bits])
    if tables.sent_scale:
        variance = np.float64(scale) * np.float64(scale)
    if scale == 0.0:
        values[:] = np.float32(0.0)
    elif tables.rotation:
        _quantize_in_place(rotated, scale, cells)
        unrotate(rotated, orders[sent.number], values)
    else:
        _quantize_in_place(values, scale, cells)
    add_residual(held, gain, values, device)
    return variance * tables.base_distortion[bits]


@kernel
def begin_batch(
    selected: NDArray[np.int64],
    addresses: NDArray[np.uint64],
    num_rows: NDArray[np.int64],
    first_step: int,
    device: Floats,
    mse: NDArray[np.float64],
) -> None:
    """:func:`begin` of many episodes.

    Args:
        selected: which of the N (n,).
        addresses: of every episode's float16 patterns (N,); the caller keeps these arrays alive during the call.
        num_rows: how many steps these have, T + 1 or T (N,).
        first_step: as :func:`begin` takes it.
        device: (N, M); the rows of the selected are overwritten.
        mse: overwritten (n,).
    """
    for k in range(selected.size):
        i = selected[k]
        patterns = _array_at(_pointer(addresses[i]), (num_rows[i], device.shape[1]))
        mse[k] = begin(patterns, first_step, device[i])


@kernel
def _completed(s: Any) -> Transmission:
    """The transmission that completed in an episode, of which its coding error is not yet written."""
    return Transmission(s.device_step, s.predecessor, s.device_bits, s.device_error, s.num_deliveries - 1)


@kernel
def predict_errors(state: NDArray[Any], tables: CoderTables) -> None:
    """Deliveries of a batch that is played without latents: only the predicted error is written, by the model.

    Args:
        state: as :func:`deliver_batch` has it (N,).
        tables: the coder's.
    """
    for i in range(state.size):
        s = state[i]
        if s.delivered:
            sent = _completed(s)
            s.device_error = _predicted_variance(sent, tables) * tables.base_distortion[sent.bits]


@kernel
def deliver_batch(
    state: NDArray[Any], addresses: NDArray[np.uint64], device: Floats, tables: CoderTables, orders: Orders | None
) -> None:
    """Carry out the deliveries of a batch that have just completed, and measure what the devices then hold.

    Args:
        state: records with the fields ``delivered``, ``device_step``, ``predecessor``, ``device_bits``,
            ``num_deliveries``, ``device_error``, ``latent_mse`` (N,); the last two are written.
        addresses: of every episode's float16 patterns, (T, M) or more; as :func:`begin_batch` takes them.
        device: (N, M).
        tables: the coder's.
        orders: as :func:`deliver` takes them, as many as any episode has deliveries.
    """
    latent_dim = device.shape[1]
    work = np.empty((2, latent_dim), dtype=np.float32)
    for i in range(state.size):
        s = state[i]
        if not s.delivered:
            continue
        sent = _completed(s)
        latent = _array_at(_pointer(np.uint64(addresses[i] + 2 * latent_dim * sent.step)), (latent_dim,))
        s.device_error = deliver(latent, device[i], device[i], sent, tables, orders, work)
        s.latent_mse = mean_square_error(device[i], _array_at(_pointer(addresses[i]), (latent_dim,)))


class Chains(NamedTuple):
    """Chains of deliveries of one trajectory.

    Attributes:
        steps: steps delivered, all chains one after the other, in lexicographic order of the chains.
        bits: their bit depths.
        ends: where each chain ends in ``steps`` (C,).
        shared: how many deliveries each chain has in common with the one before it (C,).
    """

    steps: NDArray[np.int64]
    bits: NDArray[np.int64]
    ends: NDArray[np.int64]
    shared: NDArray[np.int64]


@kernel
def score_chains(
    patterns: Patterns,
    first_step: int,
    chains: Chains,
    tables: CoderTables,
    orders: Orders | None,
    stack: Floats,
    mse: NDArray[np.float64],
    finals: Floats,
) -> None:
    """Carry out chains of deliveries, common beginnings once, and measure what they end in.

    Args:
        patterns: float16 patterns (T+1, M), or (T, M), see :func:`begin`.
        first_step: as :func:`begin` takes it.
        chains: the deliveries.
        tables: the coder's.
        orders: as :func:`deliver` takes them, as many as the longest chain has deliveries.
        stack: scratch, (longest chain + 1, M): row d is the device after d deliveries.
        mse: (1/M)‖ŷ − x_0‖² of every chain (C,), the result.
        finals: what the device holds at the end, (C, M); or (0, M) to leave it out.
    """
    begin(patterns, first_step, stack[0])
    errors = np.zeros(stack.shape[0])
    work = np.empty((2, stack.shape[1]), dtype=np.float32)
    start = 0
    for chain in range(chains.ends.size):
        length = chains.ends[chain] - start
        for d in range(chains.shared[chain], length):
            held_step = first_step if d == 0 else chains.steps[start + d - 1]
            step = chains.steps[start + d]
            sent = Transmission(step, held_step, chains.bits[start + d], errors[d], d)
            errors[d + 1] = deliver(patterns[step], stack[d], stack[d + 1], sent, tables, orders, work)
        mse[chain] = mean_square_error(stack[length], patterns[0])
        if finals.shape[0] > 0:
            for m in range(finals.shape[1]):
                finals[chain, m] = stack[length, m]
        start = chains.ends[chain]
