"""Ideal trajectories: the forward process run from a clean latent, and read backwards.

Given x_0, the joint law of x_1 … x_T is that of the ideal reverse process (exact score, exact sampler), so
every statement about the forward process holds for these trajectories exactly: D_diff(t) = 2(1 − √ᾱ_t) ([K]
Eq. 9) for x_0 of unit power, G[t, t'] = √(ᾱ_max/ᾱ_min).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from refine_env.model.schedule import NoiseSchedule

__all__ = ["clean_generator", "forward_process", "noise_generator"]


def clean_generator(seed: int) -> np.random.Generator:
    """Return the random stream from which the clean latent of the sample with this seed is drawn."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))


def noise_generator(seed: int) -> np.random.Generator:
    """Return the random stream from which the noise of the sample with this seed is drawn.

    Independent of `clean_generator`: otherwise noising the clean latents of a ``gaussian`` cache again, with
    the same base seed, would take x_0 itself for the first noise.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))


def forward_process(
    clean: NDArray[np.float32], schedule: NoiseSchedule, generator: np.random.Generator
) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    """Draw one ideal trajectory, noised step by step ([K] Eq. 2).

    x_t = √α_t x_{t−1} + √(1 − α_t) ε_t in float32, ε_t ~ N(0, I). The clean-sample estimates are the linear
    MMSE ones for E‖x_0‖²/M = 1: y_t = √ᾱ_{t+1} x_{t+1} for t ≥ 1, and y_0 = x_0 by convention.

    Args:
        clean: x_0, any shape, float32, in the model's own units.
        schedule: ᾱ_0 … ᾱ_T.
        generator: draws ε_1 … ε_T in this order.

    Returns:
        The latents (T+1, *shape) and the clean estimates (T, *shape), float16, indexed by t. A value beyond
        float16's range is ±inf; the caller checks.
    """
    num_steps = schedule.num_steps
    latents = np.empty((num_steps + 1, *clean.shape), dtype=np.float16)
    estimates = np.empty((num_steps, *clean.shape), dtype=np.float16)
    signal = np.sqrt(schedule.alpha).astype(np.float32)
    noise = np.sqrt(1.0 - schedule.alpha).astype(np.float32)
    shrinkage = np.sqrt(schedule.alpha_bar).astype(np.float32)
    x = clean.astype(np.float32)
    step_noise = np.empty_like(x)
    with np.errstate(over="ignore"):
        latents[0] = estimates[0] = x
        for t in range(1, num_steps + 1):
            generator.standard_normal(dtype=np.float32, out=step_noise)
            x *= signal[t - 1]
            step_noise *= noise[t - 1]
            x += step_noise
            latents[t] = x
            if t >= 2:
                estimates[t - 1] = shrinkage[t] * x
    return latents, estimates
