"""How similar the trajectories of two conditions are under the same noise: NMSE, cosine, and the divergence of paths.

Everything here is of arrays but `compare`, which needs the network; what a condition is, only the sampler knows.

The reverse process draws x_{t−1} from N(μ(x_t, c), β̃_t I), where μ is linear in the clean-sample estimate
y = E[x_0 | x_t, c] ([K] Eq. 3). So two conditions' means differ by √ᾱ_{t−1}(1 − α_t)/(1 − ᾱ_t) times the difference of
their estimates, and with the signal-to-noise ratio SNR_t = ᾱ_t/(1 − ᾱ_t)

    ‖μ(x_t, c) − μ(x_t, c′)‖²/β̃_t = (SNR_{t−1} − SNR_t) ‖y(x_t, c) − y(x_t, c′)‖².
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refine_env.errors import ConfigurationError
from refine_env.model.schedule import NoiseSchedule

if TYPE_CHECKING:
    from refine_env.trajectories.pipeline import LatentSampler

__all__ = [
    "PathSimilarity",
    "compare",
    "cosine_similarity",
    "divergence_bound",
    "estimate_distances",
    "normalized_mse",
    "path_divergence",
    "step_information",
]


def normalized_mse(reference: ArrayLike, latents: ArrayLike) -> NDArray[np.float64]:
    """‖x′ − x‖²/‖x‖² of latents x′ and references x, (…, C, H, W) both; float64 (…,).

    Raises:
        ConfigurationError: if the shapes differ.
    """
    a, b = _pair(reference, latents)
    values: NDArray[np.float64] = _square_sum(b - a) / _square_sum(a)
    return values


def cosine_similarity(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """⟨x, x′⟩/(‖x‖ ‖x′‖) of latents (…, C, H, W); float64 (…,), 1 for the same direction.

    Raises:
        ConfigurationError: if the shapes differ.
    """
    a, b = _pair(first, second)
    values: NDArray[np.float64] = (a * b).sum(axis=(-3, -2, -1)) / np.sqrt(_square_sum(a) * _square_sum(b))
    return values


def step_information(schedule: NoiseSchedule) -> NDArray[np.float64]:
    """SNR_{t−1} − SNR_t for t = 1 … T, (T,): what ½ of a squared distance of estimates weighs in the divergence.

    That of t = 1 is infinite, since β̃_1 = 0: the last step has no noise.
    """
    alpha_bar = schedule.alpha_bar
    with np.errstate(divide="ignore"):
        ratios = alpha_bar / (1.0 - alpha_bar)
    information: NDArray[np.float64] = ratios[:-1] - ratios[1:]
    return information


def path_divergence(schedule: NoiseSchedule, distances: ArrayLike) -> NDArray[np.float64]:
    """The Kullback-Leibler divergence between the path measures of two conditions, from x_T down to every x_m.

    By the chain rule it is the mean, over the paths of c, of ½ Σ_{t>m} ‖μ(x_t, c) − μ(x_t, c′)‖²/β̃_t, where both
    start from one x_T. This is the sum along one path. Where the estimates are exact posterior means it is, for
    small steps, KL(p_m(·|c) ‖ p_m(·|c′)) less the same at T.

    Args:
        schedule: ᾱ_0 … ᾱ_T.
        distances: ‖y(x_t, c) − y(x_t, c′)‖² at x_t of c's path for t = 1 … T, (…, T), see `estimate_distances`.

    Returns:
        float64 (…, T+1) [nat], indexed by m: 0 at m = T; infinite at m = 0 unless the two estimates at x_1 agree.

    Raises:
        ConfigurationError: if there are not T distances, or one is negative or no number.
    """
    squares = _check_distances(schedule, distances)
    information = step_information(schedule)
    with np.errstate(invalid="ignore"):
        terms = np.where(squares > 0.0, 0.5 * information * squares, 0.0)
    divergence = np.zeros((*squares.shape[:-1], squares.shape[-1] + 1))
    divergence[..., :-1] = np.cumsum(terms[..., ::-1], axis=-1)[..., ::-1]
    return divergence


def divergence_bound(schedule: NoiseSchedule, squared_distance: ArrayLike) -> NDArray[np.float64]:
    """ᾱ_t/(2(1 − ᾱ_t)) · W₂², a bound of KL(p_t(·|c) ‖ p_t(·|c′)) for t = 0 … T.

    For two fixed x_0 it is the divergence of N(√ᾱ_t x_0, (1 − ᾱ_t) I) itself, and by joint convexity it bounds that of
    any two distributions with the Wasserstein distance W₂. The mean of ‖x_0 − x_0′‖² over any pairs of samples is
    that of a coupling, and so no less than W₂²: with it the bound holds as well, and is looser. The bound is of what
    noise added to x_0 gives; a network, and all the more one with guidance, has other paths and may exceed it.

    Args:
        schedule: ᾱ_0 … ᾱ_T.
        squared_distance: W₂² or more, (…,).

    Returns:
        float64 (…, T+1), infinite at t = 0 unless the distance is 0.

    Raises:
        ConfigurationError: if a distance is negative or no number.
    """
    squares = np.asarray(squared_distance, dtype=np.float64)
    if not (squares >= 0.0).all():
        raise ConfigurationError(
            f"`squared_distance` must be at least 0, got {squares.min()}. Give the mean of ‖x_0 − x_0′‖²."
        )
    alpha_bar = schedule.alpha_bar
    with np.errstate(divide="ignore", invalid="ignore"):
        bound = 0.5 * squares[..., None] * (alpha_bar / (1.0 - alpha_bar))
    return np.where(squares[..., None] > 0.0, bound, 0.0)


def estimate_distances(first: ArrayLike, second: ArrayLike) -> NDArray[np.float64]:
    """‖y − y′‖² of clean-sample estimates (…, C, H, W) at the same x_t; float64 (…,).

    Raises:
        ConfigurationError: if the shapes differ.
    """
    a, b = _pair(first, second)
    return _square_sum(a - b)


@dataclass(frozen=True, kw_only=True, eq=False)
class PathSimilarity:
    """Of N pairs of conditions (c, c′), each under one noise.

    Attributes:
        nmse: ‖x_t(c′) − x_t(c)‖²/‖x_t(c)‖², (N, T+1), indexed by t.
        cosine: of x_t(c) and x_t(c′), (N, T+1).
        distances: ‖y(x_t, c) − y(x_t, c′)‖² along c's path, (N, T), ``[:, t - 1]`` for t.
        divergence: along c's path, (N, T+1), see `path_divergence`.
        bound: with ‖x_0(c) − x_0(c′)‖² for W₂², (N, T+1), see `divergence_bound`. One pair of samples of the
            coupling by the same noise: its mean over seeds is no less than W₂², one alone may be less.
    """

    nmse: NDArray[np.float64]
    cosine: NDArray[np.float64]
    distances: NDArray[np.float64]
    divergence: NDArray[np.float64]
    bound: NDArray[np.float64]


def compare(
    sampler: LatentSampler, conditions: Sequence[Any], others: Sequence[Any], seeds: Sequence[int]
) -> PathSimilarity:
    """Compare the runs of pairs of conditions (c, c′) under the same noise.

    Takes 3T evaluations of the network for each pair: both runs, and c′ along the path of c.

    Args:
        sampler: of the model.
        conditions: c of each pair.
        others: c′ of each pair.
        seeds: of the noise of each pair.

    Raises:
        ConfigurationError: if the numbers differ, or the scheduler keeps something else than x_t.
    """
    if not len(conditions) == len(others) == len(seeds):
        raise ConfigurationError(
            f"`others` and `seeds` must be one for each of the {len(conditions)} conditions, got {len(others)} and "
            f"{len(seeds)}. Give the pairs one by one."
        )
    sampler.check_midpoints()
    latents, estimates = (values.astype(np.float32) for values in sampler.sample(conditions, seeds))
    other_latents = sampler.sample(others, seeds)[0].astype(np.float32)
    distances = np.stack(
        [
            # y_0 is recorded as x_0, which is what the network says at x_1.
            estimate_distances(estimates[:, step - 1], sampler.estimate(others, latents[:, step], step))
            for step in range(1, sampler.schedule.num_steps + 1)
        ],
        axis=-1,
    )
    return PathSimilarity(
        nmse=normalized_mse(latents, other_latents),
        cosine=cosine_similarity(latents, other_latents),
        distances=distances,
        divergence=path_divergence(sampler.schedule, distances),
        bound=divergence_bound(sampler.schedule, estimate_distances(latents[:, 0], other_latents[:, 0])),
    )


def _pair(first: ArrayLike, second: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim < 3:
        raise ConfigurationError(
            f"Latents must be pairs of one shape (…, C, H, W), got {a.shape} and {b.shape}. Give them one to one."
        )
    return a, b


def _square_sum(values: NDArray[np.float64]) -> NDArray[np.float64]:
    total: NDArray[np.float64] = np.square(values).sum(axis=(-3, -2, -1))
    return total


def _check_distances(schedule: NoiseSchedule, distances: ArrayLike) -> NDArray[np.float64]:
    squares = np.asarray(distances, dtype=np.float64)
    if squares.ndim < 1 or squares.shape[-1] != schedule.num_steps or not (squares >= 0.0).all():
        raise ConfigurationError(
            f"`distances` must be {schedule.num_steps} numbers of at least 0, one for each t = 1 … T, got shape "
            f"{squares.shape}{f' with {squares.min()}' if squares.size else ''}. Give those of a whole path."
        )
    return squares
