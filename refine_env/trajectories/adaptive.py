"""How much of a stored run may be reused for another condition: the reuse ratio R*, chosen before its sampling begins.

The error of reuse comes from the two conditions' paths having parted by the step m where the midpoint is taken. How far
they have is the divergence of `refine_env.trajectories.similarity.path_divergence`, of which the source's stored run
and one evaluation of the network at each candidate midpoint give an estimate. Talagrand's inequality W₂² ≤ 2C·KL makes
an error of it; C, and a power below one for errors that saturate, are calibrated on pairs whose errors are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refine_env._validation import check_finite, check_positive
from refine_env.errors import ConfigurationError
from refine_env.model.schedule import NoiseSchedule
from refine_env.trajectories.midpoints import MidpointStore
from refine_env.trajectories.reuse import obtain_midpoints
from refine_env.trajectories.similarity import estimate_distances

if TYPE_CHECKING:
    from refine_env.trajectories.pipeline import LatentSampler

__all__ = ["ErrorPredictor", "StoredRuns", "adaptive_ratio", "candidate_divergence"]


def candidate_divergence(
    schedule: NoiseSchedule, steps: Sequence[int], distances: ArrayLike, powers: ArrayLike
) -> NDArray[np.float64]:
    """The divergence from x_T to each candidate, of the distances at the candidates alone, over the power of x_0.

    What a candidate says stands for all steps from the one before to its own, so that the sum telescopes: ½ Σ_k
    (SNR(m_k) − SNR(m_{k−1})) ‖y(x_{m_k}, c) − y(x_{m_k}, c_s)‖², m_0 = T.

    Args:
        schedule: ᾱ_0 … ᾱ_T.
        steps: candidates m, falling.
        distances: ‖y(x_m, c) − y(x_m, c_s)‖² at the source's x_m, (…, K).
        powers: ‖y(x_m, c)‖², (…, K).

    Returns:
        float64 (…, K), which does not fall along the candidates where the power is the same.

    Raises:
        ConfigurationError: if the steps do not fall within 1 … T − 1, or a distance or power is out of range.
    """
    falling = _check_steps(schedule, steps)
    squares, norms = np.asarray(distances, dtype=np.float64), np.asarray(powers, dtype=np.float64)
    if squares.shape != norms.shape or squares.shape[-1:] != falling.shape:
        raise ConfigurationError(
            f"`distances` and `powers` must be one for each of the {falling.size} candidates, got shapes "
            f"{squares.shape} and {norms.shape}. Give those of all candidates."
        )
    if not ((squares >= 0.0).all() and (norms > 0.0).all()):
        raise ConfigurationError(
            "`distances` must be at least 0 and `powers` positive, got others. Give squares of estimates' norms."
        )
    alpha_bar = schedule.alpha_bar[np.concatenate([[schedule.num_steps], falling])]
    information = np.diff(alpha_bar / (1.0 - alpha_bar))
    divergence: NDArray[np.float64] = 0.5 * np.cumsum(information * squares, axis=-1) / norms
    return divergence


@dataclass(frozen=True, kw_only=True)
class ErrorPredictor:
    """The NMSE of reuse as ``scale`` · D^``exponent`` of the divergence D of `candidate_divergence`.

    Args:
        scale: positive.
        exponent: positive.

    Raises:
        ConfigurationError: if one is not.
    """

    scale: float
    exponent: float

    def __post_init__(self) -> None:
        for name in ("scale", "exponent"):
            check_positive(name, getattr(self, name), advice="Calibrate it on pairs whose errors are known.")

    def __call__(self, divergence: ArrayLike) -> NDArray[np.float64]:
        """The predicted NMSE, in the shape of the divergence; the largest so far along its last axis."""
        errors = self.scale * np.asarray(divergence, dtype=np.float64) ** self.exponent
        largest: NDArray[np.float64] = np.maximum.accumulate(errors, axis=-1)
        return largest

    @classmethod
    def calibrate(
        cls, divergence: ArrayLike, errors: ArrayLike, *, coverage: float = 0.9, tolerance: float | None = None
    ) -> ErrorPredictor:
        """Choose the constants on pairs whose errors are known.

        The exponent is the least-squares slope of the logarithms. The scale is the conformal quantile (Vovk et al.) of
        the largest factor by which a pair's error exceeds the power of its divergence: so on a further pair that is
        exchangeable with these the errors at all candidates, and at whichever is chosen, are below the predicted ones
        with at least the probability ``coverage``.

        That is more than is needed where the tolerance is known. With it the scale is the least from which on no more
        than ⌊(1 − coverage)(N + 1)⌋ − 1 of the pairs err by more than the tolerance at the candidate that is chosen
        for them (conformal risk control, Angelopoulos et al.), so that more is reused.

        Args:
            divergence: of each pair at each candidate, (N, K).
            errors: the NMSE found there, (N, K).
            coverage: in (0, 1).
            tolerance: that R* will be chosen for; default any.

        Raises:
            ConfigurationError: if the shapes differ, the coverage is out of range or asks for more pairs, or no error
                and divergence is positive.
        """
        d, e = np.asarray(divergence, dtype=np.float64), np.asarray(errors, dtype=np.float64)
        if d.ndim != 2 or d.shape != e.shape or not d.size:
            raise ConfigurationError(
                f"`errors` must be of the divergence's shape (N, K), got {e.shape} and {d.shape}. Give both for all "
                "pairs and candidates."
            )
        share = check_finite("coverage", coverage, advice="Give for example 0.9.")
        rank = int(np.ceil((len(d) + 1) * share))
        if not 0.0 < share < 1.0 or rank > len(d):
            raise ConfigurationError(
                f"`coverage` must be in (0, N/(N + 1)], N = {len(d)} pairs, got {coverage}. Give more pairs."
            )
        known = (d > 0.0) & (e > 0.0)
        if not known.any() or np.ptp(d[known]) == 0.0:
            raise ConfigurationError(
                "`divergence` must have several positive values where the errors are positive, got none or one. Give "
                "pairs of different conditions."
            )
        slope = float(np.polyfit(np.log(d[known]), np.log(e[known]), 1)[0])
        exponent = max(slope, 1e-3)  # an error that falls with the divergence would have R* without bound
        if tolerance is not None:
            return cls(scale=_least_scale(d**exponent, e, rank, tolerance), exponent=exponent)
        factors = np.max(np.where(known, e, 0.0) / np.where(known, d, 1.0) ** exponent, axis=1)
        return cls(scale=float(np.sort(factors)[rank - 1]), exponent=exponent)


@dataclass(frozen=True, kw_only=True, eq=False)
class StoredRuns:
    """What is kept of N runs: the candidates from which others may go on.

    Attributes:
        steps: candidates m, falling.
        latents: x_m, (N, K, C, H, W).
        estimates: y(x_m, c_s) with the run's own condition, (N, K, C, H, W).
    """

    steps: tuple[int, ...]
    latents: NDArray[np.float32]
    estimates: NDArray[np.float32]

    @classmethod
    def obtain(
        cls,
        sampler: LatentSampler,
        store: MidpointStore,
        runs: Sequence[tuple[Any, int]],
        steps: Sequence[int],
        batch_size: int,
    ) -> StoredRuns:
        """Read runs from a store of midpoints, or make them, with one more evaluation for each candidate's estimate.

        Args:
            sampler: of the model.
            store: the store.
            runs: condition and seed of each.
            steps: candidates m, falling.
            batch_size: that the midpoints were made with.

        Raises:
            ConfigurationError: if the steps do not fall within 1 … T − 1, or the scheduler has no midpoints.
            CacheError: if the store cannot be read or written.
        """
        _check_steps(sampler.schedule, steps)
        found = obtain_midpoints(sampler, store, runs, steps, batch_size)
        latents = [np.stack([found[(*run, step)].tensors["latent"] for run in runs]) for step in steps]
        conditions = [run[0] for run in runs]
        estimates = [sampler.estimate(conditions, x, step) for x, step in zip(latents, steps, strict=True)]
        return cls(
            steps=tuple(steps),
            latents=np.stack(latents, axis=1).astype(np.float32),
            estimates=np.stack(estimates, axis=1),
        )


def adaptive_ratio(
    sampler: LatentSampler,
    stored: StoredRuns,
    conditions: Sequence[Any],
    predictor: ErrorPredictor,
    *,
    tolerance: float,
) -> NDArray[np.float64]:
    """R*, the largest reuse ratio among the candidates' whose predicted error is at most the tolerance.

    Nothing is sampled. The candidates are asked from the noisiest on, one evaluation of the network each, and no
    further than the first whose predicted error is too large.

    Args:
        sampler: of the model.
        stored: the runs whose midpoints may be reused.
        conditions: of the target that each run is for, (N,).
        predictor: calibrated for this model, T and guidance, on runs that share their noise with the targets as
            these do.
        tolerance: NMSE of x_0 against the full run's.

    Returns:
        R* = 1 − m/T of each, (N,), 0 where no candidate will do.

    Raises:
        ConfigurationError: if the tolerance is not positive, or the numbers differ.
    """
    check_positive("tolerance", tolerance, advice="Give an NMSE, for example 0.05.")
    if len(conditions) != len(stored.latents):
        raise ConfigurationError(
            f"`conditions` must be one for each of the {len(stored.latents)} stored runs, got {len(conditions)}. Give "
            "the target of each."
        )
    num_steps = sampler.schedule.num_steps
    ratios = np.zeros(len(conditions))
    asked: list[NDArray[np.float64]] = []
    going = np.arange(len(conditions))
    for place, step in enumerate(stored.steps):
        estimates = sampler.estimate([conditions[k] for k in going.tolist()], stored.latents[going, place], step)
        pair = np.zeros((len(conditions), 2))
        pair[going, 0] = estimate_distances(estimates, stored.estimates[going, place])
        pair[going, 1] = estimate_distances(estimates, np.zeros_like(estimates))
        asked.append(pair)
        distances, powers = np.stack(asked, axis=-1)[going].transpose(1, 0, 2)
        predicted = predictor(candidate_divergence(sampler.schedule, stored.steps[: place + 1], distances, powers))
        going = going[predicted[:, -1] <= tolerance]
        ratios[going] = 1.0 - step / num_steps
        if not going.size:
            break
    return ratios


def _least_scale(powers: NDArray[np.float64], errors: NDArray[np.float64], rank: int, tolerance: float) -> float:
    """The least scale from which on all but N − rank pairs err by at most the tolerance where it has them start."""
    limit = check_positive("tolerance", tolerance, advice="Give an NMSE, for example 0.05.")
    largest = np.maximum.accumulate(powers, axis=1)
    candidates = np.unique(limit / largest[largest > 0.0])[::-1]  # where a choice changes; beyond the first is none
    wrong = np.concatenate([np.zeros((len(errors), 1)), errors], axis=1)
    least = float(candidates[0] * (1.0 + 1e-9))
    for scale in candidates * (1.0 - 1e-9):  # a hair less, so that the candidate counts as within the tolerance
        taken = (scale * largest <= limit).sum(axis=1)
        if (np.take_along_axis(wrong, taken[:, None], axis=1) > limit).sum() > len(errors) - rank:
            break
        least = float(scale)
    return least


def _check_steps(schedule: NoiseSchedule, steps: Sequence[int]) -> NDArray[np.int64]:
    falling = np.asarray(steps, dtype=np.int64)
    if (
        falling.ndim != 1
        or not falling.size
        or not 1 <= falling.min() <= falling.max() < schedule.num_steps
        or (np.diff(falling) >= 0).any()
    ):
        raise ConfigurationError(
            f"`steps` must be candidates m that fall within 1 … {schedule.num_steps - 1}, got {list(steps)!s:.100}. "
            "Give for example those of the ratios 0.3, 0.5, 0.7 and 0.9."
        )
    return falling
