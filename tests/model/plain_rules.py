"""The rules of the system a second time, in plain Python: an independent twin for the tests of all who share them."""

from __future__ import annotations

from refine_env.model.distortion import RefinementModel


def server_step(slot: int, uplink_slots: int, num_steps: int, midpoint: int | None = None) -> int:
    """One step a slot, the first of them through at the beginning of slot T_ul + 2; T_ul = 0: not begun.

    A midpoint replaces the steps before it at the beginning of slot T_ul + 1.
    """
    step = num_steps
    if uplink_slots > 0:
        if midpoint is not None and slot >= uplink_slots + 1:
            step = midpoint
        for _ in range(uplink_slots + 2, slot + 1):
            step = step - 1 if step > 0 else 0
    return step


def may_transmit(server_step: int, device_step: int, num_steps: int, refreshes: bool, lossy: bool) -> bool:
    if server_step == num_steps or server_step > device_step:
        return False
    return (refreshes and lossy) if server_step == device_step else True


def residual_variance(model: RefinementModel, step: int, device_step: int, device_error: float) -> float:
    return float(model.innovation[step, device_step]) + float(model.error_gain[step, device_step]) * device_error


def distortion(model: RefinementModel, step: int, device_error: float) -> float:
    return float(model.clean[step]) + float(model.error_slope[step]) * device_error
