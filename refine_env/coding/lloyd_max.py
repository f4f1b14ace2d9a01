"""Lloyd–Max quantizers for a standard Gaussian, solved by Newton's method."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import linalg, special

from refine_env._validation import check_integer
from refine_env.errors import ConfigurationError
from refine_env.model.rules import LOSSLESS_BITS

__all__ = [
    "LOSSLESS_BITS",
    "MAX_QUANTIZER_BITS",
    "Cells",
    "LloydMax",
    "QuantizerTable",
    "base_distortion",
]

MAX_QUANTIZER_BITS = 15

_MAX_RESIDUAL = 1e-10
_MAX_ITERATIONS = 12
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(24)
_FloatArray = TypeVar("_FloatArray", bound=NDArray[Any])


class Cells(NamedTuple):
    """What the kernels need to quantize a value without a search, all in float32.

    A uniform grid of bins covers the thresholds, so fine that the values of a bin, and of the bins beside it, meet
    at most one of them. One row then settles a value of the bin: its one threshold, and the levels below and above.

    Attributes:
        rows: (bins, 4): threshold, level at or below it, level above it, unused (a row fills 16 bytes).
        origin: left end of the grid.
        bins_per_unit: reciprocal bin width.
    """

    rows: NDArray[np.float32]
    origin: np.float32
    bins_per_unit: np.float32


@dataclass(frozen=True)
class QuantizerTable:
    """A quantizer in float32.

    Attributes:
        levels: (2^b,).
        thresholds: (2^b − 1,).
        cells: what settles a value without a search.
    """

    levels: NDArray[np.float32]
    thresholds: NDArray[np.float32]
    cells: Cells


def _density(z: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)


def _tail(z: float) -> tuple[float, float]:
    """P(Z > z) and E[Z | Z > z], by the scaled complementary error function."""
    mills = math.sqrt(math.pi / 2.0) * float(special.erfcx(z / math.sqrt(2.0)))
    return mills * float(_density(np.array(z))), 1.0 / mills


def _cells(thresholds: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Probabilities and centroids of the cells above 0.

    Inner cells by Gauss–Legendre quadrature about their middle, the outer one in closed form, so that
    nothing cancels in narrow cells.

    Args:
        thresholds: lower ends of the cells, ascending from 0, shape (2^{b−1},).

    Returns:
        Two arrays of shape (2^{b−1},).
    """
    low, high = thresholds[:-1], thresholds[1:]
    middle, half = (low + high) / 2.0, (high - low) / 2.0
    offsets = half[:, None] * _NODES
    weight = _WEIGHTS * _density(middle[:, None] + offsets)
    mass = weight.sum(axis=1)
    tail_mass, tail_centroid = _tail(float(thresholds[-1]))
    probability = np.append(half * mass, tail_mass)
    centroid = np.append(middle + (weight * offsets).sum(axis=1) / mass, tail_centroid)
    return probability, centroid


def _lower_ends(positive_levels: NDArray[np.float64]) -> NDArray[np.float64]:
    """Lower ends of the positive levels' cells: 0, then the midpoints."""
    return np.concatenate([[0.0], (positive_levels[:-1] + positive_levels[1:]) / 2.0])


def _solve_positive_levels(bits: int) -> NDArray[np.float64]:
    """Newton's method on the centroid condition of the positive half, from the companded start.

    A centroid depends on its own level and its two neighbors through the thresholds, so the Jacobian
    is tridiagonal: ∂c/∂u = φ(u)(u − c)/P at the cell's upper end u, ∂c/∂l = φ(l)(c − l)/P at its lower
    end l. Solving one half keeps the quantizer exactly symmetric; on the whole line rounding excites an
    antisymmetric mode that grows threefold an iteration.
    """
    count = 2 ** (bits - 1)
    # Panter–Dite: the optimal level density is ∝ φ^{1/3}, a Gaussian of variance 3.
    levels: NDArray[np.float64] = math.sqrt(3.0) * special.ndtri((count + np.arange(count) + 1.0) / (2 * count + 1))
    residual = np.array([np.inf])
    for _ in range(_MAX_ITERATIONS):
        ends = _lower_ends(levels)
        probability, centroid = _cells(ends)
        residual = levels - centroid
        if np.abs(residual).max() < _MAX_RESIDUAL / 1000.0:
            break
        density = _density(ends)
        upper = np.append(density[1:] * (ends[1:] - centroid[:-1]) / probability[:-1], 0.0) / 2.0
        lower = density * (centroid - ends) / probability / 2.0
        lower[0] = 0.0  # the threshold at 0 does not move
        banded = np.zeros((3, count))
        banded[0, 1:] = -upper[:-1]
        banded[1] = 1.0 - upper - lower
        banded[2, :-1] = -lower[1:]
        levels = levels - linalg.solve_banded((1, 1), banded, residual)
    if not np.abs(residual).max() < _MAX_RESIDUAL:
        raise ArithmeticError(
            f"The {bits}-bit Lloyd–Max quantizer did not converge: residual {np.abs(residual).max():.1e}."
        )
    return levels


def _mean_square_error(positive_levels: NDArray[np.float64]) -> float:
    """E[(Z − Q(Z))²], cell by cell, in relative accuracy."""
    ends = _lower_ends(positive_levels)
    half = (ends[1:] - ends[:-1]) / 2.0
    nodes = (ends[:-1] + ends[1:])[:, None] / 2.0 + half[:, None] * _NODES
    inner = (half[:, None] * _WEIGHTS * _density(nodes) * (nodes - positive_levels[:-1, None]) ** 2).sum()
    # Above the last threshold a: E[(Z − l)²; Z > a] = (1 + l²) P − (2l − a) φ(a).
    a, level = float(ends[-1]), float(positive_levels[-1])
    tail = (1.0 + level**2) * _tail(a)[0] - (2.0 * level - a) * float(_density(np.array(a)))
    return 2.0 * float(inner + tail)


@cache
def _solution(bits: int) -> tuple[NDArray[np.float64], NDArray[np.float64], float, QuantizerTable]:
    positive = _solve_positive_levels(bits)
    levels = np.concatenate([-positive[::-1], positive])
    thresholds = (levels[:-1] + levels[1:]) / 2.0
    distortion = _mean_square_error(positive)
    for array in (levels, thresholds):
        array.setflags(write=False)
    return levels, thresholds, distortion, _build_table(levels, thresholds)


def _build_table(levels: NDArray[np.float64], thresholds: NDArray[np.float64]) -> QuantizerTable:
    """Bins a quarter as wide as the narrowest cell, so that three neighbors meet at most one threshold."""
    narrow_levels, narrow = levels.astype(np.float32), thresholds.astype(np.float32)
    spacing = float(np.diff(thresholds).min()) if thresholds.size > 1 else 1.0
    bins_per_unit = np.float32(4.0 / spacing)
    # One bin before the first threshold, two after the last.
    origin = np.float32(thresholds[0] - 1.0 / bins_per_unit)
    count = math.ceil(float(thresholds[-1] - origin) * float(bins_per_unit)) + 2
    # A value's position is rounded, so it may land in the bin beside its own: begin one bin earlier.
    starts = np.float64(origin) + (np.arange(count) - 1) / np.float64(bins_per_unit)
    below = np.searchsorted(narrow, starts, side="left")
    below[0] = 0
    rows = np.zeros((count, 4), dtype=np.float32)
    rows[:, 0] = np.append(narrow, np.float32(np.inf))[below]
    rows[:, 1] = narrow_levels[below]
    rows[:, 2] = np.append(narrow_levels, narrow_levels[-1])[below + 1]
    rows.setflags(write=False)
    return QuantizerTable(narrow_levels, narrow, Cells(rows, origin, bins_per_unit))


class LloydMax:
    """The 2^b-level quantizer Q_b of least mean square error for Z ~ N(0, 1) ([K] §III-B).

    Levels are the centroids of their cells and thresholds the midpoints of the levels, to a residual
    below 1e-10. b = 16 stands for "lossless" and is no quantizer of this kind.

    Args:
        bits: b, 1 … 15.

    Attributes:
        bits: b.
        levels: reconstruction values, ascending, float64 (2^b,).
        thresholds: decision thresholds, ascending, float64 (2^b − 1,).
        distortion: D_base(b) = E[(Z − Q_b(Z))²].

    Raises:
        ConfigurationError: if ``bits`` is not in 1 … 15.
    """

    def __init__(self, bits: int) -> None:
        self.bits = check_integer(
            "bits",
            bits,
            1,
            MAX_QUANTIZER_BITS,
            advice="16 bits are the latent's own float16 values: lossless.",
        )
        self.levels, self.thresholds, self.distortion, self._table = _solution(self.bits)

    def __repr__(self) -> str:
        return f"LloydMax(bits={self.bits})"

    @property
    def table(self) -> QuantizerTable:
        """The float32 tables that the refinement kernel uses."""
        return self._table

    @property
    def probabilities(self) -> NDArray[np.float64]:
        """P(Z in the cell) of every level, (2^b,)."""
        positive = self.levels[self.levels.size // 2 :]
        probability = _cells(_lower_ends(positive))[0]
        return np.concatenate([probability[::-1], probability])

    @property
    def centroid_residual(self) -> float:
        """Largest distance of a level from the centroid of its cell."""
        positive = self.levels[self.levels.size // 2 :]
        return float(np.abs(positive - _cells(_lower_ends(positive))[1]).max())

    def index(self, z: NDArray[Any]) -> NDArray[np.int64]:
        """Cell index of every value, int64, the shape of ``z``; a value on a threshold goes to the lower cell.

        float32 values are compared with the thresholds in float32, as the coder's kernel does.
        """
        thresholds = self._table.thresholds if z.dtype == np.float32 else self.thresholds
        return np.searchsorted(thresholds, z, side="left").astype(np.int64)

    def quantize(self, z: _FloatArray) -> _FloatArray:
        """Level values Q_b(z), in ``z``'s shape and floating dtype.

        Raises:
            ConfigurationError: if ``z`` is not a floating array, or holds NaN.
        """
        values = np.asarray(z)
        if not np.issubdtype(values.dtype, np.floating):
            raise ConfigurationError(
                f"`z` must be of a floating dtype, got {values.dtype}. Convert it, for example to float32."
            )
        if np.isnan(values).any():
            raise ConfigurationError("`z` must hold numbers, got NaN. Check where it comes from.")
        quantized: _FloatArray = self.levels.astype(values.dtype)[self.index(values)]  # type: ignore[assignment]
        return quantized


def base_distortion(bits: int) -> float:
    """D_base(b) of the b-bit quantizer for N(0, 1); 0 for the lossless b = 16.

    Raises:
        ConfigurationError: if ``bits`` is not in 1 … 16.
    """
    depth = check_integer("bits", bits, 1, LOSSLESS_BITS, advice="Give a bit depth, for example 3.")
    return 0.0 if depth == LOSSLESS_BITS else LloydMax(depth).distortion
