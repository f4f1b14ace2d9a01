"""The refinement coders: what a delivery predicts from, how it scales, and what error it leaves."""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Sequence
from functools import cache, cached_property, lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refine_env.coding import kernels
from refine_env.coding.config import CoderConfig
from refine_env.coding.entropy import coded_bytes, index_model, longest_code
from refine_env.coding.kernels import Transmission
from refine_env.coding.lloyd_max import LOSSLESS_BITS, LloydMax, base_distortion
from refine_env.errors import BitstreamError
from refine_env.model.distortion import RefinementModel, SecondMoments
from refine_env.model.schedule import NoiseSchedule

__all__ = [
    "Chain",
    "ClosedLoopCoder",
    "Code",
    "Coder",
    "ForwardCoder",
    "Refinement",
    "make_coder",
    "rotation_orders",
]

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


@cache
def _lower_indices(bits: int) -> NDArray[np.uint16]:
    """Index of the lower level of every row of the b-bit quantizer's cells, uint16 (bins,)."""
    table = LloydMax(bits).table
    return np.searchsorted(table.levels, table.cells.rows[:, 1]).astype(np.uint16)


@cache
def _row_costs(bits: int) -> NDArray[np.int32]:
    """Codelengths of the lower and the upper level of every row of the b-bit quantizer's ``cells``, (bins, 2)."""
    costs, lower = index_model(bits).costs, _lower_indices(bits)
    return np.stack([costs[lower], costs[np.minimum(lower + 1, costs.size - 1)]], axis=1)


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


def _order(latent_dim: int, number: int) -> NDArray[np.int32]:
    """One rotation (M,); not kept, since a peer may choose how many there are."""
    orders = np.empty((1, latent_dim), dtype=np.int32)
    kernels.fill_orders(orders, number)
    order: NDArray[np.int32] = orders[0]
    return order


class Coder:
    """A refinement coder: predict c x̂_{t_p}, scale the residual, quantize it, add it.

    Args:
        schedule: the noise schedule.
        bit_depths: 𝓑.
        model: gains and residual variances.
        options: the coder's name, and what it does.

    Attributes:
        name: the coder's.
        schedule, bit_depths, model: as given.
        rotation: residuals are rotated, so that a delivery also depends on how many there were before.
        sent_scale: the scale is the residual's own root mean square, sent as float16; else the model's.
        refreshes_held_step: sending the step that the device holds once more, after a lossy delivery, is a refinement.
        entropy_coding: indices are entropy-coded where that saves bits.
    """

    def __init__(
        self, schedule: NoiseSchedule, bit_depths: tuple[int, ...], model: RefinementModel, options: CoderConfig
    ) -> None:
        self.name = options.coder
        self.schedule = schedule
        self.bit_depths = bit_depths
        self.model = model
        self.rotation = options.rotation
        self.sent_scale = options.sent_scale
        self.refreshes_held_step = options.same_step_refinement
        self.entropy_coding = options.entropy_coding
        self._sized_tables: dict[int, kernels.CoderTables] = {}
        self._quantizers = {bits: LloydMax(bits) for bits in bit_depths if bits != LOSSLESS_BITS}
        self._base_distortion = {bits: base_distortion(bits) for bits in bit_depths}

    @property
    def error_needs_latents(self) -> bool:
        """Whether the predicted coding error depends on the latents, not on the model alone: the scale is measured."""
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
        span = np.zeros((LOSSLESS_BITS + 1, 2), dtype=np.int64)
        rows = [np.zeros((0, 4), dtype=np.float32)]
        for bits, distortion in self._base_distortion.items():
            by_depth[0, bits] = distortion
        for bits, quantizer in self._quantizers.items():
            cells = quantizer.table.cells
            by_depth[1:, bits] = cells.origin, cells.bins_per_unit
            rows.append(cells.rows)
            span[bits] = span.max() + np.array([0, len(cells.rows)])
        costs = [_row_costs(bits) for bits in self._quantizers] if self.entropy_coding else []
        return kernels.CoderTables(
            gain=self.model.gain.astype(np.float32),
            model=self.model,
            base_distortion=by_depth[0],
            rows=np.concatenate(rows),
            span=span,
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

    def refinement(self, sent: Transmission) -> Refinement:
        """Gain, scale and error of a transmission, by the model."""
        variance = float(self.model.residual_variance(sent.step, sent.device_step, sent.device_error))
        gain = float(self.model.gain[sent.step, sent.device_step])
        return Refinement(gain, math.sqrt(variance), variance * self._base_distortion[sent.bits])

    def deliver(self, latents: NDArray[np.uint16], device: NDArray[np.float32], sent: Transmission) -> float:
        """Deliver u_t: overwrite what the device holds.

        Args:
            latents: the payload's float16 patterns, uint16 (T, M) or more, indexed by t.
            device: x̂_{t_p}, float32 (M,), overwritten with x̂_t.
            sent: what is sent.

        Returns:
            The predicted coding error of x̂_t.
        """
        tables, orders = self._tables(device.size), self._rotations(device.size, sent.number + 1)
        work = np.empty((2, device.size), dtype=np.float32)
        return float(kernels.deliver(latents[sent.step], device, device, sent, tables, orders, work))

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
        self,
        latents: NDArray[np.uint16],
        chains: Sequence[Chain],
        keep_devices: bool = False,
        first_step: int | None = None,
    ) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
        """Carry out whole chains of deliveries of one trajectory; what chains have in common is done once.

        Args:
            latents: float16 patterns, uint16 (T+1, M), or (T, M) where the device starts from 0, indexed by t.
            chains: of (step, bits), no step above the one before it; without repetition, in ascending order.
            keep_devices: also return what the device holds.
            first_step: of what the device starts with; None: T.

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
            self.schedule.num_steps if first_step is None else first_step,
            kernels.Chains(flat[:, 0].copy(), flat[:, 1].copy(), np.cumsum(lengths), np.array(shared, dtype=np.int64)),
            self._tables(dimensions),
            self._rotations(dimensions, max(lengths)),
            np.empty((max(lengths) + 1, dimensions), dtype=np.float32),
            mse,
            finals,
        )
        return mse, finals

    def encode(self, latent: NDArray[np.uint16], device: NDArray[np.float32], sent: Transmission) -> Code:
        """What :meth:`deliver` would send, with nothing changed: the levels' indices, and the scale if it is sent.

        Args:
            latent: u_t as float16 patterns, uint16 (M,).
            device: x̂_{t_p}, float32 (M,), left as it is.
            sent: what is sent.
        """
        bits = sent.bits
        if bits == LOSSLESS_BITS:
            return Code(latent)
        gain, scale, _ = self.refinement(sent)
        table, coded = self._quantizers[bits].table, self.entropy_coded(device.size, bits)
        values = np.empty_like(device)
        mean_square = kernels.residual(latent, device, np.float32(gain), values)
        if self.sent_scale:
            scale = float(kernels.round_to_half(np.sqrt(mean_square)))
        if scale > 0.0 and self.rotation:
            rotated = np.empty_like(values)
            kernels.rotate(values, _order(device.size, sent.number), rotated)
            values = rotated
            if coded:
                longest = self._longest(device.size, bits)
                scale = float(kernels.fit_scale(values, np.float32(scale), table.cells, _row_costs(bits), longest))
        # Where nothing but the prediction is sent, the cheapest index is: the decoder does not look at it.
        indices = np.full(device.size, table.levels.size // 2 if coded else 0, dtype=np.uint16)
        if scale > 0.0:
            kernels.index_values(values, np.float32(scale), table.cells, _lower_indices(bits), indices)
        return Code(indices, _SCALE.pack(scale) if self.sent_scale else b"")

    def decode(self, code: Code, device: NDArray[np.float32], sent: Transmission) -> float:
        """Carry out at the device what :meth:`encode` sent: the same array as :meth:`deliver`'s, the same error.

        Args:
            code: of :meth:`encode`.
            device: x̂_{t_p}, float32 (M,), overwritten with x̂_t.
            sent: what is sent.

        Returns:
            The predicted coding error of x̂_t.

        Raises:
            BitstreamError: if the scale that was sent is none: negative, infinite or NaN.
        """
        if sent.bits == LOSSLESS_BITS:
            kernels.decode_float16(code.indices, device)
            return 0.0
        _, scale, error = self.refinement(sent)
        if self.sent_scale:
            (scale,) = _SCALE.unpack(code.side)
            if not 0.0 <= scale < math.inf:
                raise BitstreamError(
                    f"The scale of a message must be a finite number >= 0, got {scale}. Send the message again."
                )
            error = scale * scale * self._base_distortion[sent.bits]
        self._reconstruct(code.indices, device, sent, scale)
        return error

    def _reconstruct(
        self, indices: NDArray[np.uint16], device: NDArray[np.float32], sent: Transmission, scale: float
    ) -> None:
        """Overwrite what the device holds with prediction and residual; a scale of 0 leaves the prediction."""
        decoded = np.zeros_like(device)
        if scale > 0.0:
            kernels.dequantize(indices, self._quantizers[sent.bits].table.levels, np.float32(scale), decoded)
            if self.rotation:
                rotated, decoded = decoded, np.empty_like(decoded)
                kernels.unrotate(rotated, _order(device.size, sent.number), decoded)
        kernels.add_residual(device, np.float32(self.model.gain[sent.step, sent.device_step]), decoded, device)

    @property
    def max_error(self) -> float:
        """A bound of the predicted coding errors over all t <= t_p and 𝓑, by the model; of ``forward`` the largest."""
        largest = max(self._base_distortion.values())
        device_error = largest * max(1.0, float(self.model.innovation[:, -1].max()))  # the most that it can be
        return float(self.model.residual_variance(np.s_[:], np.s_[:], device_error).max()) * largest


class ForwardCoder(Coder):
    """The paper's coder ([K] Eqs. 4–7).

    For t_p < T it predicts √(ᾱ_t/ᾱ_{t_p}) x̂_{t_p} and scales by σ² = (ᾱ_t − ᾱ_{t_p})/ᾱ_{t_p}; the device's own error
    is neglected. The first transmission (t_p = T) codes x_t itself with σ² = 1: [K] sets σ² = 1 there, which is only
    consistent without a prediction, since Eq. (7)'s would leave a residual of standard deviation up to 13. With
    b = 16 the device holds x_t exactly. The held step is never sent again: σ² = 0 in Eq. (7), a degenerate quantizer.

    Args:
        schedule: the noise schedule.
        bit_depths: 𝓑.
    """

    def __init__(self, schedule: NoiseSchedule, bit_depths: tuple[int, ...]) -> None:
        options = CoderConfig(coder="forward", rotation=False, sent_scale=False, same_step_refinement=False)
        super().__init__(schedule, bit_depths, RefinementModel.paper(schedule), options)


class ClosedLoopCoder(Coder):
    """Linear MMSE prediction from what the device holds, its error tracked ([K]'s Eqs. 6, 7 read the other way round).

    Predicts c x̂_{t_p} with c = G[t,t_p]/G[t_p,t_p], and scales by s² = G[t,t] − c²(G[t_p,t_p] − e_p); under the
    forward process c = ρ = √(ᾱ_{t_p}/ᾱ_t) and s² = 1 − ρ² + ρ² e_p, a factor ρ² below Eq. (7)'s. e = s² D_base(b)
    is what the next delivery reckons with; the held step again is a refinement with c = 1 and s² = e_p.

    Args:
        schedule: the noise schedule.
        bit_depths: 𝓑.
        model: gains and variances; None: those of the forward process.
        options: what the coder does.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        bit_depths: tuple[int, ...],
        model: RefinementModel | None = None,
        options: CoderConfig | None = None,
    ) -> None:
        model = model or RefinementModel.closed_loop(SecondMoments.forward_process(schedule))
        super().__init__(schedule, bit_depths, model, options or CoderConfig(coder="closed_loop"))


def make_coder(
    options: CoderConfig, schedule: NoiseSchedule, bit_depths: tuple[int, ...], model: RefinementModel | None = None
) -> Coder:
    """The coder of these options.

    Args:
        options: which coder, and what it does.
        schedule: the noise schedule.
        bit_depths: 𝓑.
        model: gains and variances of the closed-loop coder; None: those of the forward process.
    """
    if options.coder == "forward":
        return ForwardCoder(schedule, bit_depths)
    return ClosedLoopCoder(schedule, bit_depths, model, options)
