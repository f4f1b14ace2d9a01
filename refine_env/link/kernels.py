"""Compiled loops over slots and subchannels.

Slots are taken in blocks, transposed: the innermost loop runs over the slots of a block, which the processor handles
several at a time, while each slot's own sums keep their order. So a slot's result does not depend on its block.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from refine_env._compiled import kernel

__all__ = ["accumulate_states", "fill_powers", "fill_rates", "fill_rates_at_powers", "mix_slots"]

Floats: TypeAlias = NDArray[np.float64]
"""A float64 array, under a short name for the kernels' long signatures."""

_BLOCK = 60  # slots at a time: floors of a block stay in the first-level cache
_SMALL_SNR = 1e-2  # below, 1 + p g loses digits
_FACTORS = 30  # of a product of which one logarithm is taken
_LARGE_SNR = 2.0**33  # above, such a product may overflow
_BITS_PER_NAT = 1.0 / np.log(2.0)


@kernel
def _fill_floors(
    gains: Floats, powers: Floats, first: int, count: int, floors: Floats, lowest: Floats, block_powers: Floats
) -> None:
    """Floors 1/g_j of a block of slots, infinite where nothing can be received, the lowest of each slot, its power.

    Args:
        gains: (slots, K).
        powers: (slots,).
        first: the block's first slot.
        count: its number of slots; the rest of the block is filled up with gains and powers of 1.
        floors: (K, block).
        lowest: (block,).
        block_powers: (block,).
    """
    for s in range(_BLOCK):
        block_powers[s] = powers[first + s] if s < count else 1.0
    for s in range(count):
        for j in range(floors.shape[0]):
            floors[j, s] = gains[first + s, j]
    for j in range(floors.shape[0]):
        for s in range(count, _BLOCK):
            floors[j, s] = 1.0
    for s in range(_BLOCK):
        lowest[s] = np.inf
    for j in range(floors.shape[0]):
        floor = floors[j]
        for s in range(_BLOCK):
            value = 1.0 / floor[s]
            floor[s] = value
            lowest[s] = value if value < lowest[s] else lowest[s]


@kernel
def _fill_levels(
    floors: Floats, lowest: Floats, powers: Floats, levels: Floats, active: Floats, scratch: Floats, counts: Floats
) -> None:
    """Water level of every slot of a block, above its lowest floor, by finite active-set elimination.

    Heights d_j = 1/g_j − min 1/g are taken from the lowest floor, so that nothing is lost where the power is small
    beside the floors. All subchannels start active. The level that spends the power on the m active ones is
    (power + Σ d_j)/m; a subchannel with d_j at or above it cannot be part of the optimum, and dropping it only
    lowers the level, so dropping all such and repeating ends at the optimum after at most K rounds, without a
    tolerance. The lowest floor always stays. A slot that has ended repeats its last round until all have.

    Args:
        floors: 1/g_j (K, block); infinite ones get nothing.
        lowest: the lowest of them (block,); where it is infinite, the level is.
        powers: total power of every slot, > 0 (block,).
        levels: (block,), the result.
        active: (block,), scratch, as ``scratch`` and ``counts``.
        scratch: (block,).
        counts: (block,).
    """
    for s in range(_BLOCK):
        levels[s] = np.inf
        active[s] = -1.0
    while True:
        for s in range(_BLOCK):
            scratch[s] = powers[s]
            counts[s] = 0.0
        for j in range(floors.shape[0]):
            floor = floors[j]
            for s in range(_BLOCK):
                height = floor[s] - lowest[s]
                below = height < levels[s]
                scratch[s] += height if below else 0.0
                counts[s] += 1.0 if below else 0.0
        changed = 0
        for s in range(_BLOCK):
            changed += counts[s] != active[s]
            active[s] = counts[s]
            levels[s] = scratch[s] / counts[s]
        if changed == 0:
            return


@kernel
def fill_powers(gains: Floats, powers: Floats, out: Floats) -> None:
    """Waterfilled powers of every slot; ``gains`` and ``out`` (slots, K), total ``powers`` (slots,)."""
    floors = np.empty((gains.shape[1], _BLOCK))
    lowest, levels, block_powers = np.empty(_BLOCK), np.empty(_BLOCK), np.empty(_BLOCK)
    active, scratch, counts = np.empty(_BLOCK), np.empty(_BLOCK), np.empty(_BLOCK)
    for first in range(0, gains.shape[0], _BLOCK):
        count = min(_BLOCK, gains.shape[0] - first)
        _fill_floors(gains, powers, first, count, floors, lowest, block_powers)
        _fill_levels(floors, lowest, block_powers, levels, active, scratch, counts)
        for s in range(count):
            for j in range(gains.shape[1]):
                allotted = levels[s] - (floors[j, s] - lowest[s])
                out[first + s, j] = allotted if floors[j, s] < np.inf and allotted > 0.0 else 0.0


@kernel
def _sum_of_logs(floors: Any, lowest: float, level: float) -> float:
    """Σ_j log2(1 + p_j g_j) of one slot, term by term; 0 where nothing can be received."""
    bits = 0.0
    for j in range(floors.size):
        allotted = level - (floors[j] - lowest)
        if floors[j] < np.inf and allotted > 0.0:
            bits += np.log1p(allotted / floors[j]) * _BITS_PER_NAT
    return bits


@kernel
def fill_rates(gains: Floats, powers: Floats, symbols_per_slot: float, out: Floats) -> None:
    """ℓ Σ_j log2(1 + p_j g_j) of every slot; ``gains`` (slots, K), total ``powers`` and ``out`` (slots,)."""
    num_subchannels = gains.shape[1]
    floors = np.empty((num_subchannels, _BLOCK))
    lowest, levels, block_powers = np.empty(_BLOCK), np.empty(_BLOCK), np.empty(_BLOCK)
    bits, product, counts = np.empty(_BLOCK), np.empty(_BLOCK), np.empty(_BLOCK)
    for first in range(0, gains.shape[0], _BLOCK):
        count = min(_BLOCK, gains.shape[0] - first)
        _fill_floors(gains, powers, first, count, floors, lowest, block_powers)
        _fill_levels(floors, lowest, block_powers, levels, bits, product, counts)
        bits[:] = 0.0
        for start in range(0, num_subchannels, _FACTORS):
            product[:] = 1.0
            for j in range(start, min(num_subchannels, start + _FACTORS)):
                floor = floors[j]
                for s in range(_BLOCK):
                    allotted = levels[s] - (floor[s] - lowest[s])
                    product[s] *= 1.0 + (allotted if allotted > 0.0 else 0.0) / floor[s]
            for s in range(count):
                bits[s] += np.log2(product[s])
        for s in range(count):
            # The largest p_j g_j of a slot is that of its lowest floor.
            if not _SMALL_SNR <= levels[s] / lowest[s] <= _LARGE_SNR:
                bits[s] = _sum_of_logs(floors[:, s], lowest[s], levels[s])
            out[first + s] = symbols_per_slot * bits[s]


@kernel
def fill_rates_at_powers(gains: Floats, powers: Floats, symbols_per_slot: float, out: Floats) -> None:
    """ℓ Σ_j log2(1 + p_j g_j) of every slot, at given powers; ``gains`` and ``powers`` (slots, K), ``out`` (slots,)."""
    for s in range(gains.shape[0]):
        nats = 0.0
        for j in range(gains.shape[1]):
            nats += np.log1p(powers[s, j] * gains[s, j])
        out[s] = symbols_per_slot * nats * _BITS_PER_NAT


@kernel
def accumulate_states(states: Floats, coefficient: float) -> None:
    """White noise of variance 1 into h_n = a h_{n−1} + √(1 − a²) z_n, h_1 = z_1, in place; (slots, width)."""
    innovation = np.sqrt(1.0 - coefficient * coefficient)
    for n in range(1, states.shape[0]):
        for j in range(states.shape[1]):
            states[n, j] = coefficient * states[n - 1, j] + innovation * states[n, j]


@kernel
def mix_slots(factor: Floats, states: Floats) -> None:
    """``factor @ states`` in place, for a lower triangular factor (slots, slots) and states (slots, width)."""
    for n in range(states.shape[0] - 1, -1, -1):
        row = states[n]
        row *= factor[n, n]
        for k in range(n):
            weight = factor[n, k]
            for j in range(row.size):
                row[j] += weight * states[k, j]
