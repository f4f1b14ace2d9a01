"""The distortion model against ideal trajectories: 24 of M = 16384, 393,216 values.

A mean square of Gaussian values then has a standard error of √(2/393216) = 0.23 %; 1 % is over four of them.
"""

from __future__ import annotations

import numpy as np
import pytest

from refine_env import NoiseSchedule, TrajectoryCache
from refine_env.coding import ForwardCoder, Transmission, base_distortion
from refine_env.model.distortion import diffusion_distortion, total_distortion
from refine_env.trajectories import generate_gaussian

SCHEDULE = NoiseSchedule.stable_diffusion()


@pytest.fixture(scope="module")
def ideal(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryCache:
    return generate_gaussian(tmp_path_factory.mktemp("ideal") / "cache", 24, (4, 64, 64), seed=11)


def test_diffusion_distortion_at_every_step(ideal: TrajectoryCache) -> None:
    squares = np.zeros(51)
    for i in range(len(ideal)):
        x = ideal.latents(i).astype(np.float32).reshape(51, -1)
        squares += ((x - x[0]) ** 2).mean(axis=1)
    assert squares[0] == 0.0
    assert squares[1:] / len(ideal) == pytest.approx(diffusion_distortion(SCHEDULE)[1:], rel=0.01)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_quantization_distortion_of_the_first_transmission(ideal: TrajectoryCache, bits: int) -> None:
    coder = ForwardCoder(SCHEDULE, (bits,))
    for step in (40, 10):
        errors = []
        for i in range(len(ideal)):
            x = ideal.latents(i).reshape(51, -1)
            device = x[50].astype(np.float32)
            coder.deliver(x.view(np.uint16), device, Transmission(step, 50, bits))
            errors.append(np.mean((device - x[step].astype(np.float32)) ** 2))
        assert np.mean(errors) == pytest.approx(base_distortion(bits), rel=0.01)


def test_equation_8_is_the_sum() -> None:
    schedule = NoiseSchedule([1.0, 0.8, 0.4, 0.1])
    base = np.array([0.5, 0.01])
    total = total_distortion(schedule, base)
    assert total[1, 2] == pytest.approx(2 * (1 - np.sqrt(0.8)) + 1.0 * base)
    assert total[1, 3] == pytest.approx(2 * (1 - np.sqrt(0.8)) + base)
    assert total[0, 1] == pytest.approx(0.25 * base)
