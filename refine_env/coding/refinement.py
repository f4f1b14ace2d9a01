"""The refinement coders: what a delivery predicts from, how it scales, and what error it leaves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cache, cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from refine_env._validation import check_choice
from refine_env.coding import kernels
from refine_env.coding.lloyd_max import LOSSLESS_BITS, LloydMax, base_distortion
from refine_env.distortion import prediction_gain, residual_variance
from refine_env.schedule import NoiseSchedule

__all__ = ["CODERS", "Chain", "Code", "Coder", "ForwardCoder", "Refinement", "make_coder"]

CODERS = ("forward",)

Chain = tuple[tuple[int, int], ...]
"""The deliveries of an episode, in order: (step t, bit depth b) each."""


class Refinement(NamedTuple):
    """Parameters of one delivery: x̂_t = g x̂_{t_p} + s Q_b((x_t − g x̂_{t_p})/s).

    Attributes:
        gain: g, prediction gain on what the device holds.
        scale: s, scale of the residual.
        error: predicted coding error per dimension that the delivery leaves, E‖x̂_t − x_t‖²/M.
    """

    gain: float
    scale: float
    error: float


class Code(NamedTuple):
    """What one delivery sends.

    Attributes:
        indices: one of b bits per dimension, uint16 (M,): levels of the quantizer; of b = 16 the float16 patterns.
        side: what the decoder needs besides, ``side_bytes`` of the coder.
    """

    indices: NDArray[np.uint16]
    side: bytes = b""


class Coder(Protocol):
    """What the simulator and the bitstream ask of a coder."""

    name: str
    schedule: NoiseSchedule
    bit_depths: tuple[int, ...]
    side_bytes: int
    """Bytes of side information in a message."""
    refreshes_held_step: bool
    """Whether sending the step that the device holds once more, after a lossy delivery, is a refinement."""

    def refinement(self, step: int, device_step: int, bits: int, device_error: float) -> Refinement:
        """Parameters of sending x_t with b bits to a device at step t_p with coding error e_p."""

    def deliver(
        self,
        latents: NDArray[np.uint16],
        device: NDArray[np.float32],
        step: int,
        device_step: int,
        bits: int,
        device_error: float,
    ) -> float:
        """Carry out a delivery in place; returns the predicted coding error of what the device then holds."""

    def deliver_batch(self, state: NDArray[Any], addresses: NDArray[np.uint64], device: NDArray[np.float32]) -> None:
        """Carry out the deliveries that ``state`` marks, see :func:`refine_env.coding.kernels.deliver_batch`."""

    def score_chains(
        self, latents: NDArray[np.uint16], chains: Sequence[Chain], keep_devices: bool = False
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Carry out whole chains of deliveries of one trajectory and measure what they end in."""

    def encode(
        self,
        latent: NDArray[np.uint16],
        device: NDArray[np.float32],
        step: int,
        device_step: int,
        bits: int,
        device_error: float,
    ) -> Code:
        """What :meth:`deliver` would send, with nothing changed."""

    def decode(
        self, code: Code, device: NDArray[np.float32], step: int, device_step: int, bits: int, device_error: float
    ) -> float:
        """Carry out at the device what :meth:`encode` sent: the same array as :meth:`deliver`'s, the same error."""

    @property
    def max_error(self) -> float:
        """Largest predicted coding error that any delivery can leave."""


@cache
def _lower_indices(bits: int) -> NDArray[np.uint16]:
    """Index of the lower level of every row of the b-bit quantizer's ``cells``, uint16 (bins,)."""
    table = LloydMax(bits).table
    return np.searchsorted(table.levels, table.cells[:, 1]).astype(np.uint16)


class ForwardCoder:
    """The paper's coder ([K] Eqs. 4–7).

    For t_p < T it predicts √(ᾱ_t/ᾱ_{t_p}) x̂_{t_p} and scales by σ² = (ᾱ_t − ᾱ_{t_p})/ᾱ_{t_p}. The first
    transmission (t_p = T) codes x_t itself with σ² = 1: [K] sets σ² = 1 there, which is only consistent
    without a prediction, since Eq. (7)'s would leave a residual of standard deviation up to 13. With
    b = 16 the device holds x_t exactly.

    Args:
        schedule: the noise schedule.
        bit_depths: 𝓑.
    """

    name = "forward"
    side_bytes = 0
    refreshes_held_step = False  # σ² = 0 in Eq. (7): a degenerate quantizer

    def __init__(self, schedule: NoiseSchedule, bit_depths: tuple[int, ...]) -> None:
        self.schedule = schedule
        self.bit_depths = bit_depths
        self._variance = residual_variance(schedule)
        self._gain = prediction_gain(schedule)
        self._quantizers = {bits: LloydMax(bits) for bits in bit_depths if bits != LOSSLESS_BITS}
        self._base_distortion = {bits: base_distortion(bits) for bits in bit_depths}

    @cached_property
    def _tables(self) -> kernels.CoderTables:
        by_depth = np.zeros((3, LOSSLESS_BITS + 1))
        rows = np.zeros((2, LOSSLESS_BITS + 1), dtype=np.int64)
        for bits, distortion in self._base_distortion.items():
            by_depth[0, bits] = distortion
        for bits, quantizer in self._quantizers.items():
            table = quantizer.table
            by_depth[1:, bits] = table.origin, table.bins_per_unit
            rows[:, bits] = rows[1].sum(), len(table.cells)
        cells = [quantizer.table.cells for quantizer in self._quantizers.values()]
        return kernels.CoderTables(
            gain=self._gain.astype(np.float32),
            scale=np.sqrt(self._variance).astype(np.float32),
            variance=self._variance,
            base_distortion=by_depth[0],
            cells=np.concatenate(cells) if cells else np.zeros((1, 4), dtype=np.float32),
            first_row=rows[0],
            num_rows=rows[1],
            origin=by_depth[1].astype(np.float32),
            bins_per_unit=by_depth[2].astype(np.float32),
        )

    def refinement(self, step: int, device_step: int, bits: int, device_error: float) -> Refinement:
        """Gain, scale and D_quant of sending x_t with b bits (the device's own error is neglected, as in [K]).

        Args:
            step: t.
            device_step: t_p > t.
            bits: b.
            device_error: not used by this coder.
        """
        variance = float(self._variance[step, device_step])
        return Refinement(
            float(self._gain[step, device_step]), math.sqrt(variance), variance * self._base_distortion[bits]
        )

    def deliver(
        self,
        latents: NDArray[np.uint16],
        device: NDArray[np.float32],
        step: int,
        device_step: int,
        bits: int,
        device_error: float,
    ) -> float:
        """Deliver x_t: overwrite what the device holds.

        Args:
            latents: the trajectory's float16 patterns, uint16 (T+1, M), indexed by t.
            device: x̂_{t_p}, float32 (M,), overwritten with x̂_t.
            step: t.
            device_step: t_p.
            bits: b.
            device_error: e_p of what the device holds.

        Returns:
            The predicted coding error of x̂_t.
        """
        gain, scale, error = self.refinement(step, device_step, bits, device_error)
        if bits == LOSSLESS_BITS:
            kernels.decode_float16(latents[step], device)
        else:
            kernels.refine(latents[step], device, gain, scale, self._quantizers[bits].table)
        return error

    def deliver_batch(self, state: NDArray[Any], addresses: NDArray[np.uint64], device: NDArray[np.float32]) -> None:
        """Carry out the deliveries that ``state`` marks, as :meth:`deliver` does, in one compiled loop.

        Args:
            state: see :func:`refine_env.coding.kernels.deliver_batch`.
            addresses: of every episode's float16 patterns.
            device: what the devices hold, float32 (N, M), or (N, 0) without latents.
        """
        kernels.deliver_batch(state, addresses, device, self._tables)

    def score_chains(
        self, latents: NDArray[np.uint16], chains: Sequence[Chain], keep_devices: bool = False
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Carry out whole chains of deliveries of one trajectory; what chains have in common is done once.

        Args:
            latents: float16 patterns, uint16 (T+1, M), indexed by t.
            chains: of (step, bits), every step below the one before it; without repetition, in ascending order.
            keep_devices: also return what the device holds.

        Returns:
            (1/M)‖ŷ − x_0‖² of every chain (C,), and ŷ, float32 (C, M), or (0, M) if not kept.
        """
        lengths = [len(chain) for chain in chains]
        flat = np.array([delivery for chain in chains for delivery in chain], dtype=np.int64).reshape(-1, 2)
        shared = [0] + [
            next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
            for one, other in itertools.pairwise(chains)
        ]
        dimensions = latents.shape[1]
        mse = np.empty(len(chains))
        finals = np.empty((len(chains) if keep_devices else 0, dimensions), dtype=np.float32)
        kernels.score_chains(
            latents,
            np.ascontiguousarray(flat[:, 0]),
            np.ascontiguousarray(flat[:, 1]),
            np.cumsum(lengths),
            np.array(shared, dtype=np.int64),
            self._tables,
            np.empty((max(lengths) + 1, dimensions), dtype=np.float32),
            mse,
            finals,
        )
        return mse, finals

    def encode(
        self,
        latent: NDArray[np.uint16],
        device: NDArray[np.float32],
        step: int,
        device_step: int,
        bits: int,
        device_error: float,
    ) -> Code:
        """The levels' indices of a delivery.

        Args:
            latent: x_t as float16 patterns, uint16 (M,).
            device: x̂_{t_p}, float32 (M,), left as it is.
            step: t.
            device_step: t_p.
            bits: b.
            device_error: e_p of what the device holds.
        """
        if bits == LOSSLESS_BITS:
            return Code(latent)
        gain, scale, _ = self.refinement(step, device_step, bits, device_error)
        table = self._quantizers[bits].table
        return Code(kernels.quantize_indices(latent, device, gain, scale, table, _lower_indices(bits)))

    def decode(
        self, code: Code, device: NDArray[np.float32], step: int, device_step: int, bits: int, device_error: float
    ) -> float:
        """Overwrite what the device holds, as :meth:`deliver` does.

        Args:
            code: of :meth:`encode`.
            device: x̂_{t_p}, float32 (M,), overwritten with x̂_t.
            step: t.
            device_step: t_p.
            bits: b.
            device_error: e_p of what the device holds.

        Returns:
            The predicted coding error of x̂_t.
        """
        gain, scale, error = self.refinement(step, device_step, bits, device_error)
        if bits == LOSSLESS_BITS:
            kernels.decode_float16(code.indices, device)
        else:
            kernels.reconstruct(code.indices, device, gain, scale, self._quantizers[bits].table)
        return error

    @property
    def max_error(self) -> float:
        """Largest D_quant over all t < t_p and 𝓑."""
        return float(self._variance.max()) * max(self._base_distortion.values())


def make_coder(name: str, schedule: NoiseSchedule, bit_depths: tuple[int, ...]) -> Coder:
    """The coder of that name.

    Raises:
        ConfigurationError: if there is none.
    """
    check_choice("coder", name, CODERS)
    return ForwardCoder(schedule, bit_depths)
