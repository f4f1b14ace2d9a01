"""The paper's analytical distortion model ([K] §IV-A)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from refine_env.schedule import NoiseSchedule

__all__ = ["diffusion_distortion", "prediction_gain", "residual_variance", "total_distortion"]


def diffusion_distortion(schedule: NoiseSchedule) -> NDArray[np.float64]:
    """D_diff(t) = 2(1 − √ᾱ_t) ([K] Eq. 9), shape (T+1,)."""
    return 2.0 * (1.0 - np.sqrt(schedule.alpha_bar))


def prediction_gain(schedule: NoiseSchedule) -> NDArray[np.float64]:
    """√(ᾱ_t/ᾱ_{t_p}), the factor of x̂_{t_p} in what [K] predicts ([K] Eqs. 5, 7); 0 for the first transmission.

    Returns:
        Shape (T+1, T+1), indexed [t, t_p]. Only t < t_p is meant by the paper's model.
    """
    ab = schedule.alpha_bar
    gain = np.sqrt(ab[:, None] / ab[None, :])
    gain[:, -1] = 0.0
    return gain


def residual_variance(schedule: NoiseSchedule) -> NDArray[np.float64]:
    """σ²_{t,t_p} = (ᾱ_t − ᾱ_{t_p})/ᾱ_{t_p} ([K] Eq. 7); 1 for the first transmission, t_p = T.

    Returns:
        Shape (T+1, T+1), indexed [t, t_p]; 0 where t >= t_p, where nothing fresher is sent.
    """
    ab = schedule.alpha_bar
    variance = np.maximum(0.0, (ab[:, None] - ab[None, :]) / ab[None, :])
    variance[:-1, -1] = 1.0
    return variance


def total_distortion(schedule: NoiseSchedule, base_distortion: NDArray[np.float64]) -> NDArray[np.float64]:
    """D_total(t, t_p, b) = D_diff(t) + σ²_{t,t_p} D_base(b) ([K] Eqs. 8–10).

    Args:
        schedule: the noise schedule.
        base_distortion: D_base of every bit depth, shape (B,).

    Returns:
        Shape (T+1, T+1, B), indexed [t, t_p, bit depth]. Only t < t_p is meant by the paper's model.
    """
    quantization = residual_variance(schedule)[:, :, None] * base_distortion[None, None, :]
    return diffusion_distortion(schedule)[:, None, None] + quantization
