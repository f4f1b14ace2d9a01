"""The latency model: a quantile of the slots that a payload takes, the paper's ([K] Eq. 11) or the exact one."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from scipy import special

from refine_env._validation import check_positive, check_quantile
from refine_env.link.chain import RateChain
from refine_env.link.law import FOREVER, RateLaw
from refine_env.link.statistics import RateStatistics

__all__ = ["LATENCY_MODELS", "latency_quantile", "latency_quantiles"]

LATENCY_MODELS = ("paper", "exact")


def latency_quantile(bits: float, statistics: RateStatistics, quantile: float = 0.9) -> int:
    """T̂_q(B) = ⌈x²⌉, x the positive root of R̄x² + Φ^{-1}(1−q) σ_R x − B = 0 ([K] Eq. 11).

    Args:
        bits: payload B, any positive number of bits.
        statistics: R̄ and σ_R of the link.
        quantile: q, the probability with which the payload is through by then.

    Returns:
        Slots, >= 1.

    Raises:
        ConfigurationError: if ``bits`` is not positive and finite or ``quantile`` not in (0, 1).
    """
    payload = check_positive("bits", bits, advice="Give the payload in bits, M·b.")
    linear = -float(special.ndtri(check_quantile(quantile))) * statistics.std
    # The form of the root that does not cancel, whichever sign the linear term has.
    discriminant = math.sqrt(linear * linear + 4.0 * statistics.mean * payload)
    if linear <= 0.0:
        root = (discriminant - linear) / (2.0 * statistics.mean)
    else:
        root = 2.0 * payload / (discriminant + linear)
    # x² from the equation itself, less the rounding that would push a whole number of slots over.
    slots = (payload - linear * root) / statistics.mean
    return max(1, math.ceil(slots * (1.0 - 4.0 * np.finfo(float).eps)))


def latency_quantiles(
    latent_dim: int,
    bit_depths: Iterable[int],
    statistics: RateStatistics | RateLaw | RateChain,
    quantile: float = 0.9,
    max_slots: int = FOREVER,
) -> NDArray[np.int64]:
    """q-quantile of the slots that M·b bits take, for each bit depth b, but at most ``max_slots``.

    Args:
        latent_dim: M.
        bit_depths: b.
        statistics: of the link: the paper's, for Eq. 11, or the exact law or chain.
        quantile: q.
        max_slots: beyond which nobody asks, such as T_d + 1: what takes longer is late anyway.

    Returns:
        Slots, shape (len(bit_depths),).
    """
    sizes = [latent_dim * depth for depth in bit_depths]
    if isinstance(statistics, RateStatistics):
        slots = [latency_quantile(size, statistics, quantile) for size in sizes]
    elif isinstance(statistics, RateChain):
        slots = statistics.latency_quantiles(sizes, quantile, max_slots).tolist()
    else:
        slots = [statistics.latency_quantile(size, quantile) for size in sizes]
    return np.array([min(value, max_slots) for value in slots], dtype=np.int64)
