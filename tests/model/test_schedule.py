from __future__ import annotations

import numpy as np
import pytest

from refine_env import ConfigurationError, NoiseSchedule


class FakeScheduler:
    """diffusers' interface, as far as the schedule needs it."""

    def __init__(self, timesteps: list[int]) -> None:
        self.alphas_cumprod = np.linspace(0.99, 0.01, 100)
        self._wanted = timesteps
        self.timesteps: list[int] = []

    def set_timesteps(self, num_steps: int) -> None:
        self.timesteps = self._wanted


def test_from_scheduler_indexes_by_step() -> None:
    scheduler = FakeScheduler([90, 50, 10])
    schedule = NoiseSchedule.from_scheduler(scheduler, 3)
    assert schedule.alpha_bar.tolist() == [1.0, *scheduler.alphas_cumprod[[10, 50, 90]]]


def test_scheduler_without_alphas_cumprod() -> None:
    with pytest.raises(ConfigurationError, match="`scheduler` must have `alphas_cumprod`, got object"):
        NoiseSchedule.from_scheduler(object(), 50)


def test_scheduler_with_an_extra_evaluation() -> None:
    with pytest.raises(ConfigurationError, match="once at each of 3 falling timesteps, got 4"):
        NoiseSchedule.from_scheduler(FakeScheduler([90, 50, 50, 10]), 3)


def test_one_step_factors_and_posterior_variance() -> None:
    schedule = NoiseSchedule([1.0, 0.8, 0.4])
    assert schedule.alpha == pytest.approx([0.8, 0.5])
    # β̃_1 = 0: the last step is deterministic; β̃_2 = (1 − 0.8)/(1 − 0.4)·(1 − 0.5)
    assert schedule.posterior_variance == pytest.approx([0.0, 0.2 / 0.6 * 0.5])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("abc", r"sequence of T\+1 >= 2"),
        ([1.0], r"sequence of T\+1 >= 2"),
        ([0.9, 0.5], "begin with exactly 1"),
        ([1.0, np.nan], "must be finite"),
        ([1.0, 0.5, 0.5], r"strictly decreasing, got alpha_bar\[2\]"),
        ([1.0, 0.5, 0.0], "stay above 0"),
    ],
)
def test_bad_alpha_bar(values: list[float], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        NoiseSchedule(values)


def test_equality_hash_and_immutability() -> None:
    one, same, other = (NoiseSchedule.stable_diffusion(n) for n in (50, 50, 25))
    assert one == same
    assert hash(one) == hash(same)
    assert one != other
    with pytest.raises(ValueError, match="read-only"):
        one.alpha_bar[0] = 0.5


@pytest.mark.parametrize("num_steps", [0, 1000, 50.5, "50", None, True])
def test_stable_diffusion_steps_out_of_range(num_steps: int) -> None:
    with pytest.raises(ConfigurationError, match=f"`num_steps` must be an integer in 1 … 999, got {num_steps!r}"):
        NoiseSchedule.stable_diffusion(num_steps)
