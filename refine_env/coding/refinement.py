"""The refinement coders: what a delivery predicts from, how it scales, and what error it leaves."""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from refine_env._validation import check_choice
from refine_env.coding import kernels
from refine_env.coding.lloyd_max import LOSSLESS_BITS, LloydMax, base_distortion
from refine_env.distortion import residual_variance
from refine_env.schedule import NoiseSchedule

__all__ = ["CODERS", "Code", "Coder", "ForwardCoder", "Refinement", "make_coder"]

CODERS = ("forward",)


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
        self._quantizers = {bits: LloydMax(bits) for bits in bit_depths if bits != LOSSLESS_BITS}
        self._base_distortion = {bits: base_distortion(bits) for bits in bit_depths}

    def refinement(self, step: int, device_step: int, bits: int, device_error: float) -> Refinement:
        """Gain, scale and D_quant of sending x_t with b bits (the device's own error is neglected, as in [K]).

        Args:
            step: t.
            device_step: t_p > t.
            bits: b.
            device_error: not used by this coder.
        """
        ab = self.schedule.alpha_bar
        first = device_step == self.schedule.num_steps
        gain = 0.0 if first else math.sqrt(ab[step] / ab[device_step])
        variance = float(self._variance[step, device_step])
        return Refinement(gain, math.sqrt(variance), variance * self._base_distortion[bits])

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
