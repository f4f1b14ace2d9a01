"""The rules of the system, each stated once: what simulator, coders, policies and encoders must agree on.

All are kernels of scalars, which kernels of any file may call. Outside of kernels call them through
:func:`refine_env._compiled.plain`, which also takes arrays.
"""

from __future__ import annotations

from typing import Any

from refine_env._compiled import kernel

__all__ = [
    "LOSSLESS_BITS",
    "distortion",
    "is_lossy",
    "longest_uplink",
    "may_transmit",
    "residual_variance",
    "server_step",
]

LOSSLESS_BITS = 16
"""Bit depth at which a latent is sent as its float16 values: nothing is lost."""


@kernel
def server_step(slot: int, uplink_slots: int, num_steps: int, first_step: int) -> int:
    """t(n) = m − min(m, n − T_ul − 1) once the uplink has ended, T before ([K] §II-A, where m = T).

    Args:
        slot: n.
        uplink_slots: T_ul; 0 while the uplink runs.
        num_steps: T.
        first_step: m, where generation starts: T from noise; less with a warm start, and x_m is there at once.
    """
    if uplink_slots == 0 or slot <= uplink_slots:
        return num_steps
    return first_step - min(first_step, slot - uplink_slots - 1)


def longest_uplink(slot: Any, server_step: Any, first_step: int) -> Any:
    """The T_ul that leads to t(n) in slot n > T_ul, the inverse of :func:`server_step`; with t(n) = 0 the largest one.

    Args:
        slot: n.
        server_step: t(n).
        first_step: m, where generation starts.
    """
    return slot - 1 - first_step + server_step


@kernel
def is_lossy(bits: int) -> Any:
    """Whether a delivery of b bits leaves a coding error; b = 0 stands for no delivery."""
    return (bits > 0) & (bits < LOSSLESS_BITS)


@kernel
def may_transmit(server_step: int, device_step: int, num_steps: int, refreshes: bool, lossy: bool) -> Any:
    """Whether TRANSMIT is legal while the channel is idle.

    Generation must have begun, t(n) < T, and there must be something to gain: t(n) < t_p, or a coder that refreshes
    what the device holds, and t(n) = t_p.

    Args:
        server_step: t(n).
        device_step: t_p.
        num_steps: T.
        refreshes: whether the coder may send the step that the device holds once more.
        lossy: whether what the device holds has a coding error.
    """
    fresher = (server_step < device_step) | (refreshes & lossy & (server_step == device_step))
    return (server_step < num_steps) & fresher


@kernel
def residual_variance(model: Any, step: int, device_step: int, device_error: float) -> Any:
    """s² = innovation[t, t_p] + error_gain[t, t_p] · e_p, the variance of what a delivery quantizes.

    Args:
        model: a :class:`refine_env.model.distortion.RefinementModel`.
        step: t.
        device_step: t_p.
        device_error: e_p.
    """
    return model.innovation[step, device_step] + model.error_gain[step, device_step] * device_error


@kernel
def distortion(model: Any, step: int, device_error: float) -> Any:
    """clean[t] + error_slope[t] · e, the distortion (1/M) E‖ŷ − x_0‖² of a device that holds u_t with the error e.

    Args:
        model: a :class:`refine_env.model.distortion.RefinementModel`.
        step: t.
        device_error: e.
    """
    return model.clean[step] + model.error_slope[step] * device_error
