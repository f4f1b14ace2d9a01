"""The refinement coders: what a delivery predicts from, how it scales, and what error it leaves."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from functools import cache, cached_property, lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from refine_env._validation import check_choice
from refine_env.coding import kernels
from refine_env.coding.entropy import coded_bytes, index_model, longest_code
from refine_env.coding.lloyd_max import LOSSLESS_BITS, LloydMax, base_distortion
from refine_env.errors import BitstreamError, ConfigurationError
from refine_env.model.distortion import RefinementModel, SecondMoments
from refine_env.model.schedule import NoiseSchedule

__all__ = [
    "CODERS",
    "Chain",
    "ClosedLoopCoder",
    "Code",
    "Coder",
    "ForwardCoder",
    "Refinement",
    "check_entropy_coding",
    "make_coder",
    "rotation_orders",
]

CODERS = ("forward", "closed_loop")

Chain = tuple[tuple[int, int], ...]
"""The deliveries of an episode, in order: (step t, bit depth b) each."""


class Refinement(NamedTuple):
    """Parameters of one delivery: x̂_t = c x̂_{t_p} + s Q_b((x_t − c x̂_{t_p})/s).

    Attributes:
        gain: c, prediction gain on what the device holds.
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
        side: what the decoder needs besides, ``side_bytes(b)`` of the coder.
    """

    indices: NDArray[np.uint16]
    side: bytes = b""


class Coder(Protocol):
    """What the simulator and the bitstream ask of a coder."""

    name: str
    schedule: NoiseSchedule
    bit_depths: tuple[int, ...]
    refreshes_held_step: bool
    """Whether sending the step that the device holds once more, after a lossy delivery, is a refinement."""
    rotation: bool
    """Whether a delivery also depends on how many there were before: which rotation it takes."""

    @property
    def error_needs_latents(self) -> bool:
        """Whether the coding error that a delivery is said to leave depends on the latents, not on the model alone."""

    def side_bytes(self, bits: int) -> int:
        """Bytes of side information in a message of that bit depth."""

    def payload_bits(self, latent_dim: int, bits: int) -> int:
        """Size of the payload of M dimensions at that bit depth [bit]."""

    def entropy_coded(self, latent_dim: int, bits: int) -> bool:
        """Whether that payload is entropy-coded; else it is M indices of b bits."""

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
        delivery: int = 0,
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
        delivery: int = 0,
    ) -> Code:
        """What :meth:`deliver` would send, with nothing changed."""

    def decode(
        self,
        code: Code,
        device: NDArray[np.float32],
        step: int,
        device_step: int,
        bits: int,
        device_error: float,
        delivery: int = 0,
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


@cache
def _row_costs(bits: int) -> NDArray[np.int32]:
    """Codelengths of the lower and the upper level of every row of the b-bit quantizer's ``cells``, (bins, 2)."""
    costs, lower = index_model(bits).costs, _lower_indices(bits)
    return np.stack([costs[lower], costs[np.minimum(lower + 1, costs.size - 1)]], axis=1)


def check_entropy_coding(coder: str, rotation: bool, sent_scale: bool) -> None:
    """Refuse to entropy-code residuals whose codelength is not known beforehand.

    Raises:
        ConfigurationError: if they are not rotated and standardized by their own root mean square.
    """
    if not (coder == "closed_loop" and rotation and sent_scale):
        raise ConfigurationError(
            "`entropy_coding` must be False unless coder='closed_loop', rotation=True and sent_scale=True, got "
            f"coder={coder!r}, rotation={rotation}, sent_scale={sent_scale}. Set these three, or leave it out."
        )


_SCALE = struct.Struct(">e")  # the sent scale, float16 in network byte order
_NO_ROTATION = np.zeros((1, 0), dtype=np.int32)
_FIRST_ROTATIONS = 8


@lru_cache(maxsize=8)
def _orders(latent_dim: int, count: int) -> NDArray[np.int32]:
    orders = np.empty((count, latent_dim), dtype=np.int32)
    kernels.fill_orders(orders, 0)
    orders.setflags(write=False)
    return orders


def rotation_orders(latent_dim: int, count: int) -> NDArray[np.int32]:
    """The rotations that both ends know, one for each delivery of an episode, fresh each time.

    Args:
        latent_dim: M.
        count: how many at least.

    Returns:
        Rows for :func:`refine_env.coding.kernels.rotate`, int32 (``count`` or more, M), read-only. Rotation k is the
        same however many there are.
    """
    return _orders(latent_dim, max(_FIRST_ROTATIONS, 1 << (count - 1).bit_length()))


class _LinearCoder:
    """What the coders have in common: predict c x̂_{t_p}, scale the residual, quantize it, add it.

    Args:
        schedule: the noise schedule.
        bit_depths: 𝓑.
        model: gains and residual variances.
        rotation: rotate residuals before they are quantized.
        sent_scale: the scale is the residual's own root mean square, sent as float16; else the model's.
        refreshes_held_step: the held step may be sent again.
        entropy_coding: indices are entropy-coded where that saves bits.
    """

    name: str

    def __init__(
        self,
        schedule: NoiseSchedule,
        bit_depths: tuple[int, ...],
        model: RefinementModel,
        *,
        rotation: bool,
        sent_scale: bool,
        refreshes_held_step: bool,
        entropy_coding: bool = False,
    ) -> None:
        self.schedule = schedule
        self.bit_depths = bit_depths
        self.model = model
        self.rotation = rotation
        self.sent_scale = sent_scale
        self.refreshes_held_step = refreshes_held_step
        self.entropy_coding = entropy_coding
        self._sized_tables: dict[int, kernels.CoderTables] = {}
        self._quantizers = {bits: LloydMax(bits) for bits in bit_depths if bits != LOSSLESS_BITS}
        self._base_distortion = {bits: base_distortion(bits) for bits in bit_depths}

    @property
    def error_needs_latents(self) -> bool:
        """Whether the predicted coding error depends on the latents: where the scale is measured."""
        return self.sent_scale

    def side_bytes(self, bits: int) -> int:
        """Bytes of side information in a message of b bits: the scale, where it is sent; none without loss."""
        return _SCALE.size if self.sent_scale and bits != LOSSLESS_BITS else 0

    def entropy_coded(self, latent_dim: int, bits: int) -> bool:
        """Whether the payload of M dimensions at b bits is entropy-coded: if so asked, and where it saves bits."""
        return self.entropy_coding and coded_bytes(latent_dim, bits) is not None

    def payload_bits(self, latent_dim: int, bits: int) -> int:
        """Size of the payload of M dimensions at b bits [bit]: M·b, or the fixed size of an entropy-coded one."""
        size = coded_bytes(latent_dim, bits) if self.entropy_coding else None
        return latent_dim * bits if size is None else 8 * size

    def _longest(self, latent_dim: int, bits: int) -> int:
        """Codelength that fits the payload, in units of the costs; -1 where it is not entropy-coded."""
        size = coded_bytes(latent_dim, bits) if self.entropy_coding else None
        return -1 if size is None else longest_code(size)

    def _tables(self, latent_dim: int) -> kernels.CoderTables:
        if latent_dim not in self._sized_tables:
            longest = np.full(LOSSLESS_BITS + 1, -1, dtype=np.int64)
            for bits in self.bit_depths:
                longest[bits] = self._longest(latent_dim, bits)
            self._sized_tables[latent_dim] = self._common_tables._replace(longest=longest)
        return self._sized_tables[latent_dim]

    @cached_property
    def _common_tables(self) -> kernels.CoderTables:
        by_depth = np.zeros((3, LOSSLESS_BITS + 1))
        rows = np.zeros((2, LOSSLESS_BITS + 1), dtype=np.int64)
        for bits, distortion in self._base_distortion.items():
            by_depth[0, bits] = distortion
        for bits, quantizer in self._quantizers.items():
            table = quantizer.table
            by_depth[1:, bits] = table.origin, table.bins_per_unit
            rows[:, bits] = rows[1].sum(), len(table.cells)
        cells = [quantizer.table.cells for quantizer in self._quantizers.values()]
        costs = [_row_costs(bits) for bits in self._quantizers] if self.entropy_coding else []
        return kernels.CoderTables(
            gain=self.model.gain.astype(np.float32),
            model=self.model,
            base_distortion=by_depth[0],
            cells=np.concatenate(cells) if cells else np.zeros((1, 4), dtype=np.float32),
            first_row=rows[0],
            num_rows=rows[1],
            origin=by_depth[1].astype(np.float32),
            bins_per_unit=by_depth[2].astype(np.float32),
            rotation=self.rotation,
            sent_scale=self.sent_scale,
            costs=np.concatenate(costs) if costs else np.zeros((1, 2), dtype=np.int32),
            longest=np.empty(0, dtype=np.int64),
        )

    def _rotations(self, latent_dim: int, count: int) -> NDArray[np.int32] | None:
        """The ``orders`` of :func:`refine_env.coding.kernels.deliver`."""
        if self.rotation:
            return rotation_orders(latent_dim, count)
        return _NO_ROTATION if self.sent_scale else None

    def _order(self, latent_dim: int, delivery: int) -> NDArray[np.int32]:
        """One rotation (M,), or (0,) where there is none; not kept, since a peer may choose how many there are."""
        orders = np.empty((1, latent_dim if self.rotation else 0), dtype=np.int32)
        kernels.fill_orders(orders, delivery)
        order: NDArray[np.int32] = orders[0]
        return order

    def refinement(self, step: int, device_step: int, bits: int, device_error: float) -> Refinement:
        """Gain, scale and error of sending u_t with b bits, by the model.

        Args:
            step: t.
            device_step: t_p.
            bits: b.
            device_error: e_p.
        """
        variance = float(self.model.residual_variance(step, device_step, device_error))
        return Refinement(
            float(self.model.gain[step, device_step]), math.sqrt(variance), variance * self._base_distortion[bits]
        )

    def deliver(
        self,
        latents: NDArray[np.uint16],
        device: NDArray[np.float32],
        step: int,
        device_step: int,
        bits: int,
        device_error: float,
        delivery: int = 0,
    ) -> float:
        """Deliver u_t: overwrite what the device holds.

        Args:
            latents: the payload's float16 patterns, uint16 (T, M) or more, indexed by t.
            device: x̂_{t_p}, float32 (M,), overwritten with x̂_t.
            step: t.
            device_step: t_p.
            bits: b.
            device_error: e_p of what the device holds.
            delivery: how many deliveries there were before in the episode.

        Returns:
            The predicted coding error of x̂_t.
        """
        return float(
            kernels.deliver(
                latents[step],
                device,
                device,
                step,
                device_step,
                bits,
                device_error,
                self._tables(device.size),
                self._rotations(device.size, delivery + 1),
                delivery,
                np.empty((2, device.size), dtype=np.float32),
            )
        )

    def deliver_batch(self, state: NDArray[Any], addresses: NDArray[np.uint64], device: NDArray[np.float32]) -> None:
        """Carry out the deliveries that ``state`` marks, as :meth:`deliver` does, in one compiled loop.

        Args:
            state: see :func:`refine_env.coding.kernels.deliver_batch`.
            addresses: of every episode's float16 patterns.
            device: what the devices hold, float32 (N, M), or (N, 0) without latents.
        """
        latent_dim = device.shape[1]
        if latent_dim == 0:
            kernels.predict_errors(state, self._tables(latent_dim))
            return
        count = int(state["num_deliveries"].max()) if self.rotation else 0
        kernels.deliver_batch(state, addresses, device, self._tables(latent_dim), self._rotations(latent_dim, count))

    def score_chains(
        self, latents: NDArray[np.uint16], chains: Sequence[Chain], keep_devices: bool = False
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Carry out whole chains of deliveries of one trajectory; what chains have in common is done once.

        Args:
            latents: float16 patterns, uint16 (T+1, M), or (T, M) where the device starts from 0, indexed by t.
            chains: of (step, bits), no step above the one before it; without repetition, in ascending order.
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
            self.schedule.num_steps,
            np.ascontiguousarray(flat[:, 0]),
            np.ascontiguousarray(flat[:, 1]),
            np.cumsum(lengths),
            np.array(shared, dtype=np.int64),
            self._tables(dimensions),
            self._rotations(dimensions, max(lengths)),
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
        delivery: int = 0,
    ) -> Code:
        """The levels' indices of a delivery, and the scale where it is sent.

        Args:
            latent: u_t as float16 patterns, uint16 (M,).
            device: x̂_{t_p}, float32 (M,), left as it is.
            step: t.
            device_step: t_p.
            bits: b.
            device_error: e_p of what the device holds.
            delivery: how many deliveries there were before in the episode.
        """
        if bits == LOSSLESS_BITS:
            return Code(latent)
        gain, scale, _ = self.refinement(step, device_step, bits, device_error)
        indices, scale = kernels.encode_residual(
            latent,
            device,
            gain,
            None if self.sent_scale else scale,
            self._order(device.size, delivery),
            self._quantizers[bits].table,
            _lower_indices(bits),
            _row_costs(bits) if self.entropy_coded(device.size, bits) else None,
            self._longest(device.size, bits),
        )
        return Code(indices, _SCALE.pack(scale) if self.sent_scale else b"")

    def decode(
        self,
        code: Code,
        device: NDArray[np.float32],
        step: int,
        device_step: int,
        bits: int,
        device_error: float,
        delivery: int = 0,
    ) -> float:
        """Overwrite what the device holds, as :meth:`deliver` does.

        Args:
            code: of :meth:`encode`.
            device: x̂_{t_p}, float32 (M,), overwritten with x̂_t.
            step: t.
            device_step: t_p.
            bits: b.
            device_error: e_p of what the device holds.
            delivery: how many deliveries there were before in the episode.

        Returns:
            The predicted coding error of x̂_t.

        Raises:
            BitstreamError: if the scale that was sent is none: negative, infinite or NaN.
        """
        if bits == LOSSLESS_BITS:
            kernels.decode_float16(code.indices, device)
            return 0.0
        gain, scale, error = self.refinement(step, device_step, bits, device_error)
        if self.sent_scale:
            (scale,) = _SCALE.unpack(code.side)
            if not 0.0 <= scale < math.inf:
                raise BitstreamError(
                    f"The scale of a message must be a finite number >= 0, got {scale}. Send the message again."
                )
            error = scale * scale * self._base_distortion[bits]
        order = self._order(device.size, delivery)
        kernels.decode_residual(code.indices, device, gain, scale, order, self._quantizers[bits].table)
        return error

    @property
    def max_error(self) -> float:
        """A bound of the predicted coding errors over all t <= t_p and 𝓑, by the model; of ``forward`` the largest."""
        largest = max(self._base_distortion.values())
        device_error = largest * max(1.0, float(self.model.innovation[:, -1].max()))  # the most that it can be
        return float(self.model.residual_variance(np.s_[:], np.s_[:], device_error).max()) * largest


class ForwardCoder(_LinearCoder):
    """The paper's coder ([K] Eqs. 4–7).

    For t_p < T it predicts √(ᾱ_t/ᾱ_{t_p}) x̂_{t_p} and scales by σ² = (ᾱ_t − ᾱ_{t_p})/ᾱ_{t_p}; the device's own error
    is neglected. The first transmission (t_p = T) codes x_t itself with σ² = 1: [K] sets σ² = 1 there, which is only
    consistent without a prediction, since Eq. (7)'s would leave a residual of standard deviation up to 13. With
    b = 16 the device holds x_t exactly. The held step is never sent again: σ² = 0 in Eq. (7), a degenerate quantizer.

    Args:
        schedule: the noise schedule.
        bit_depths: 𝓑.
    """

    name = "forward"

    def __init__(self, schedule: NoiseSchedule, bit_depths: tuple[int, ...]) -> None:
        super().__init__(
            schedule,
            bit_depths,
            RefinementModel.paper(schedule),
            rotation=False,
            sent_scale=False,
            refreshes_held_step=False,
        )


class ClosedLoopCoder(_LinearCoder):
    """Linear MMSE prediction from what the device holds, its error tracked ([K]'s Eqs. 6, 7 read the other way round).

    Predicts c x̂_{t_p} with c = G[t,t_p]/G[t_p,t_p], and scales by s² = G[t,t] − c²(G[t_p,t_p] − e_p); under the
    forward process c = ρ = √(ᾱ_{t_p}/ᾱ_t) and s² = 1 − ρ² + ρ² e_p, a factor ρ² below Eq. (7)'s. e = s² D_base(b)
    is what the next delivery reckons with; the held step again is a refinement with c = 1 and s² = e_p.

    Args:
        schedule: the noise schedule.
        bit_depths: 𝓑.
        model: gains and variances; None: those of the forward process.
        rotation: rotate the residual before it is quantized, and back after: permutation, random signs,
            Walsh–Hadamard, a fresh one for every delivery of an episode, from numbers that both ends know. The
            recursion needs Gaussian residuals; unrotated ones carry the last quantizer's error with its tails.
        sent_scale: send the residual's root mean square as float16, 16 bits a message: exact per message.
        same_step_refinement: the step that the device holds with an error may be sent again.
        entropy_coding: entropy-code the indices, which are Gaussian after rotation and standardization: payloads of a
            fixed, smaller size (:mod:`refine_env.coding.entropy`). A residual that does not fit is sent with a scale s
            above its root mean square, mostly by one step of float16, and e = s² D_base(b) is that little too large.

    Raises:
        ConfigurationError: if ``entropy_coding`` is asked for without rotation or sent scale.
    """

    name = "closed_loop"

    def __init__(
        self,
        schedule: NoiseSchedule,
        bit_depths: tuple[int, ...],
        model: RefinementModel | None = None,
        *,
        rotation: bool = True,
        sent_scale: bool = True,
        same_step_refinement: bool = True,
        entropy_coding: bool = False,
    ) -> None:
        if entropy_coding:
            check_entropy_coding(self.name, rotation, sent_scale)
        super().__init__(
            schedule,
            bit_depths,
            model or RefinementModel.closed_loop(SecondMoments.forward_process(schedule)),
            rotation=rotation,
            sent_scale=sent_scale,
            refreshes_held_step=same_step_refinement,
            entropy_coding=entropy_coding,
        )


def make_coder(
    name: str,
    schedule: NoiseSchedule,
    bit_depths: tuple[int, ...],
    *,
    model: RefinementModel | None = None,
    rotation: bool = True,
    sent_scale: bool = True,
    same_step_refinement: bool = True,
    entropy_coding: bool = False,
) -> Coder:
    """The coder of that name; all but the first three are the closed-loop coder's.

    Raises:
        ConfigurationError: if there is none, or the options do not fit each other.
    """
    if check_choice("coder", name, CODERS) == "forward":
        return ForwardCoder(schedule, bit_depths)
    return ClosedLoopCoder(
        schedule,
        bit_depths,
        model,
        rotation=rotation,
        sent_scale=sent_scale,
        same_step_refinement=same_step_refinement,
        entropy_coding=entropy_coding,
    )
