"""Entropy-coded indices: their probabilities, the size of a payload that is coded with them, and its bytes.

A rotated residual, standardized by its own root mean square, is Gaussian with Σ z² = M, so the codelength of its
indices, Σ −log2 p(index), hardly varies. A payload therefore has a fixed size, a little above the mean, and the
rare residual that does not fit is sent with a larger scale (:func:`refine_env.coding.kernels.fit_scale`).

The probabilities are integers over 2^24, and the codelength is counted with these, so it is the entropy coder's up to
the few bits of its state. The coder itself, asymmetric numeral systems, is needed for bytes only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refine_env.coding.lloyd_max import MAX_QUANTIZER_BITS, LloydMax
from refine_env.errors import BitstreamError, import_extra

__all__ = [
    "COST_UNIT",
    "STATE_BITS",
    "IndexModel",
    "coded_bytes",
    "compress_indices",
    "decompress_indices",
    "index_model",
    "longest_code",
]

_PRECISION = 24  # of the probabilities [bit]; the entropy coder's
COST_UNIT = 2.0**-16
"""Unit of :attr:`IndexModel.costs` [bit]: integers add up to the same number in any order."""
STATE_BITS = 40
"""What a payload has beyond its codelength [bit].

The first symbol costs 24 bits instead of its codelength, the last byte is filled up, and each symbol's rounding inside
the coder's 64-bit state adds at most 1.44/256 bits, of either sign and far less on average.
"""
_DEVIATIONS = 3.0


@dataclass(frozen=True, kw_only=True, eq=False)
class IndexModel:
    """Probabilities of the b-bit Lloyd–Max quantizer's indices of Z ~ N(0, 1), and what indices cost with them.

    Attributes:
        bits: b.
        frequencies: of the indices, integers >= 1 that sum to 2^24, int64 (2^b,).
        costs: codelengths 24 − log2 frequency, rounded up to multiples of :data:`COST_UNIT`, int32 (2^b,).
        entropy: H_b, entropy of the index [bit].
        rate: mean cost of an index [bit].
        spread: standard deviation of the cost after its regression on z² [bit]: what remains of it where Σ z² is known.
    """

    bits: int
    frequencies: NDArray[np.int64]
    costs: NDArray[np.int32]
    entropy: float
    rate: float
    spread: float

    @cached_property
    def categorical(self) -> Any:
        """The same probabilities as a model of the entropy coder's library.

        Raises:
            MissingExtraError: if that is not installed.
        """
        models = import_extra("constriction", "entropy").stream.model
        # It adds 1 to every weight, and scales them to 2^24 in all: by a factor of exactly 1 here.
        return models.Categorical((self.frequencies - 1).astype(np.float32), perfect=False)


@cache
def index_model(bits: int) -> IndexModel:
    """The probability model of b-bit indices.

    Args:
        bits: b, 1 … 15.
    """
    quantizer = LloydMax(bits)
    probability = quantizer.probabilities
    frequencies = np.maximum(1, np.rint(probability * 2.0**_PRECISION)).astype(np.int64)
    middle = frequencies.size // 2  # where the likeliest are, which take up what rounding left over
    excess = int(frequencies.sum()) - 2**_PRECISION
    frequencies[middle - 1] -= excess // 2
    frequencies[middle] -= excess - excess // 2
    costs = np.ceil((_PRECISION - np.log2(frequencies)) / COST_UNIT).astype(np.int32)
    cost = costs * COST_UNIT
    rate = float(probability @ cost)
    # E[Z²; a < Z < b] = P + a φ(a) − b φ(b)
    ends = quantizer.thresholds * np.exp(-0.5 * quantizer.thresholds**2) / math.sqrt(2.0 * math.pi)
    square = probability + np.concatenate([[0.0], ends]) - np.append(ends, 0.0)
    covariance = float((square - probability) @ cost)
    variance = float(probability @ (cost - rate) ** 2) - covariance**2 / 2.0  # Var[Z²] = 2
    for array in (frequencies, costs):
        array.setflags(write=False)
    return IndexModel(
        bits=bits,
        frequencies=frequencies,
        costs=costs,
        entropy=float(-probability @ np.log2(probability)),
        rate=rate,
        spread=math.sqrt(max(0.0, variance)),
    )


def coded_bytes(latent_dim: int, bits: int) -> int | None:
    """Bytes of an entropy-coded payload: mean codelength and three standard deviations, and the coder's state.

    Args:
        latent_dim: M.
        bits: b, 1 … 16.

    Returns:
        None where M indices of b bits are not more, or without loss.
    """
    if bits > MAX_QUANTIZER_BITS:
        return None
    model = index_model(bits)
    codelength = latent_dim * model.rate + _DEVIATIONS * math.sqrt(latent_dim) * model.spread
    size = math.ceil((codelength + STATE_BITS) / 8.0)
    return size if 8 * size < latent_dim * bits else None


def longest_code(size: int) -> int:
    """Codelength up to which indices fit a payload of so many bytes, in the unit of the costs."""
    return int((8 * size - STATE_BITS) / COST_UNIT)


def compress_indices(indices: NDArray[np.uint16], bits: int, size: int) -> bytes:
    """Entropy-code indices into a payload of fixed size.

    Args:
        indices: each below 2^b, uint16 (M,).
        bits: b, 1 … 15.
        size: of the payload [byte]; what the code does not need is zero.

    Raises:
        BitstreamError: if they do not fit.
        MissingExtraError: if the entropy coder is not installed.
    """
    coder = import_extra("constriction", "entropy").stream.stack.AnsCoder()
    coder.encode_reverse(indices.astype(np.int32), index_model(bits).categorical)
    code: bytes = coder.get_compressed().astype("<u4").tobytes().rstrip(b"\0")
    if len(code) > size:
        raise BitstreamError(
            f"`indices` must fit a payload of {size} bytes, got a code of {len(code)}. Take them from `Coder.encode`."
        )
    return code.ljust(size, b"\0")


def decompress_indices(payload: bytes, bits: int, latent_dim: int) -> NDArray[np.uint16]:
    """The indices that :func:`compress_indices` coded, uint16 (M,).

    Args:
        payload: its bytes.
        bits: b, 1 … 15.
        latent_dim: M.

    Raises:
        BitstreamError: if they are not the code of M indices.
        MissingExtraError: if the entropy coder is not installed.
    """
    code = payload.rstrip(b"\0")  # the coder's last word is never 0
    words = np.frombuffer(code.ljust(-(-len(code) // 4) * 4, b"\0"), dtype="<u4").astype(np.uint32)
    coder = import_extra("constriction", "entropy").stream.stack.AnsCoder(words)
    indices: NDArray[np.uint16] = coder.decode(index_model(bits).categorical, latent_dim).astype(np.uint16)
    if not coder.is_empty():
        raise BitstreamError(
            f"`payload` must hold the code of {latent_dim} indices of {bits} bits, got a longer one. "
            "Send the message again."
        )
    return indices
