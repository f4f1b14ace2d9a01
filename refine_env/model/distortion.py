"""Distortion models: the paper's ([K] §IV-A), and the recursion that a chain of deliveries follows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refine_env._compiled import plain
from refine_env.errors import ConfigurationError
from refine_env.model import rules
from refine_env.model.schedule import NoiseSchedule

__all__ = [
    "RefinementModel",
    "SecondMoments",
    "diffusion_distortion",
    "prediction_gain",
    "residual_variance",
    "total_distortion",
]


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


@dataclass(frozen=True, eq=False)
class SecondMoments:
    """G[t, t'] = E⟨u_t, u_t'⟩/M of what is sent, u_t; what the device starts with is u_T.

    All that a linear predictor needs, and all that the closed-loop recursion is made of.

    Args:
        values: G, shape (T+1, T+1), symmetric, indexed by the steps.

    Raises:
        ConfigurationError: if ``values`` is not a symmetric matrix of finite numbers with a diagonal >= 0, > 0 at 0.
    """

    values: NDArray[np.float64]

    def __init__(self, values: ArrayLike) -> None:
        advice = "Take them from a trajectory cache, or from SecondMoments.forward_process."
        try:
            moments = np.array(values, dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            moments = np.empty(())
        if moments.ndim != 2 or moments.shape[0] != moments.shape[1] or moments.shape[0] < 2:
            raise ConfigurationError(
                f"`second_moments` must be a matrix (T+1, T+1), got the shape {moments.shape}. {advice}"
            )
        if not (np.isfinite(moments).all() and (np.diag(moments) >= 0.0).all() and moments[0, 0] > 0.0):
            raise ConfigurationError(
                f"`second_moments` must be finite, with a diagonal >= 0 and G[0, 0] > 0, got others. {advice}"
            )
        if not np.allclose(moments, moments.T, rtol=1e-6, atol=1e-12):
            raise ConfigurationError(f"`second_moments` must be symmetric, got a matrix that is not. {advice}")
        moments.setflags(write=False)
        object.__setattr__(self, "values", moments)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SecondMoments) and np.array_equal(self.values, other.values)

    def __hash__(self) -> int:
        return hash(self.values.tobytes())

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.values) - 1

    @classmethod
    def forward_process(cls, schedule: NoiseSchedule) -> SecondMoments:
        """The moments of x_t under the forward process, if x_0 has unit power: √(ᾱ_later/ᾱ_earlier)."""
        ab = schedule.alpha_bar
        return cls(np.sqrt(np.minimum.outer(ab, ab) / np.maximum.outer(ab, ab)))

    @classmethod
    def martingale(cls, mmse: ArrayLike) -> SecondMoments:
        """The moments of y_t = E[x_0 | x_{t+1}] of an ideal denoiser, which has orthogonal increments.

        E⟨y_t, y_t'⟩/M = P − mmse(max(t, t')), with P = mmse(T) = E‖x_0‖²/M and y_T = 0.

        Args:
            mmse: E‖y_t − x_0‖²/M, shape (T+1,).
        """
        errors = np.asarray(mmse, dtype=np.float64)
        known = np.clip(errors[-1] - errors, 0.0, None)
        return cls(np.minimum.outer(known, known))


class RefinementModel(NamedTuple):
    """How the distortion develops over a chain of deliveries, by step t, device step t_p and the device's error e_p.

    A delivery predicts ``gain`` · x̂_{t_p}; its residual has the variance s² = ``innovation`` + ``error_gain`` · e_p,
    and it leaves the error e = s² D_base(b), 0 without loss. The device then scores ``clean`` + ``error_slope`` · e.
    These two formulas are in :mod:`refine_env.model.rules`; kernels take the model as it is.

    Attributes:
        gain: shape (T+1, T+1), indexed [t, t_p].
        innovation: residual variance that what the device lacks causes, shape (T+1, T+1).
        error_gain: what the device's own error adds to it, shape (T+1, T+1).
        clean: (1/M) E‖u_t − x_0‖² of what is sent without loss, shape (T+1,); at T, of what the device starts with.
        error_slope: shape (T+1,). 1 where the error is orthogonal to what is yet missing.
    """

    gain: NDArray[np.float64]
    innovation: NDArray[np.float64]
    error_gain: NDArray[np.float64]
    clean: NDArray[np.float64]
    error_slope: NDArray[np.float64]

    @classmethod
    def paper(cls, schedule: NoiseSchedule) -> RefinementModel:
        """[K] Eqs. (5)–(10): the device's error is neglected, and adds to D_diff as it is.

        Whoever looks for the schedule that this model likes best finds one that lives on what it neglects: coarse
        refinements of coarse latents. It is no basis for an optimum.
        """
        variance = residual_variance(schedule)
        return cls(
            gain=prediction_gain(schedule),
            innovation=variance,
            error_gain=np.zeros_like(variance),
            clean=diffusion_distortion(schedule),
            error_slope=np.ones(schedule.num_steps + 1),
        )

    @classmethod
    def closed_loop(cls, moments: SecondMoments) -> RefinementModel:
        """Linear MMSE prediction from what the device holds, errors and all.

        Predict c x̂_{t_p} with c = G[t,t_p]/G[t_p,t_p]; s² = G[t,t] − c²(G[t_p,t_p] − e_p). The error of a centroid
        quantizer has E[η·u_t] = −e, hence the slope 2G[0,t]/G[t,t] − 1. Under the forward process this is
        c = ρ = √(ᾱ_{t_p}/ᾱ_t), s² = 1 − ρ² + ρ² e_p and D = 2(1 − √ᾱ_t) + e(2√ᾱ_t − 1); of a martingale, c = 1, s² =
        mmse(t_p) − mmse(t) + e_p and D = mmse(t) + e.
        """
        values = moments.values
        power = np.diag(values)
        positive = np.where(power > 0.0, power, 1.0)
        gain = values / positive[None, :]  # 0 where the device starts from the prior mean, 0
        return cls(
            gain=gain,
            innovation=np.maximum(0.0, power[:, None] - gain**2 * power[None, :]),
            error_gain=gain**2,
            clean=np.maximum(0.0, values[0, 0] - 2.0 * values[0] + power),
            error_slope=2.0 * values[0] / positive - 1.0,
        )

    def residual_variance(self, step: Any, device_step: Any, device_error: Any) -> Any:
        """s² of sending u_t to a device that holds u_{t_p} with the error e_p; arrays are broadcast."""
        return plain(rules.residual_variance)(self, step, device_step, device_error)

    def distortion(self, step: Any, device_error: Any) -> Any:
        """(1/M) E‖ŷ − x_0‖² of a device that holds u_t with the error e; arrays are broadcast."""
        return plain(rules.distortion)(self, step, device_error)
