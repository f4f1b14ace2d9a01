"""Tests of the quantizers, the coders and the bitstream."""

from __future__ import annotations

from typing import Any

from refine_env import NoiseSchedule
from refine_env.coding import ClosedLoopCoder, CoderConfig


def closed_loop_coder(schedule: NoiseSchedule, bit_depths: tuple[int, ...], **options: Any) -> ClosedLoopCoder:
    """A closed-loop coder with some options of its own."""
    return ClosedLoopCoder(schedule, bit_depths, options=CoderConfig(coder="closed_loop", **options))
