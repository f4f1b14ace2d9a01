"""How similar trajectories are: against Gaussians, whose divergences are known in closed form, and on a tiny model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from refine_env import ConfigurationError, NoiseSchedule
from refine_env.trajectories.pipeline import LatentSampler
from refine_env.trajectories.similarity import (
    compare,
    cosine_similarity,
    divergence_bound,
    estimate_distances,
    normalized_mse,
    path_divergence,
    step_information,
)

SCHEDULE = NoiseSchedule.stable_diffusion(12)


class GaussianCondition:
    """A condition with x_0 ~ N(mean, variance), of one dimension, and the reverse process of its posterior mean."""

    def __init__(self, schedule: NoiseSchedule, mean: float, variance: float) -> None:
        self.schedule, self.mean, self.variance = schedule, mean, variance

    def estimate(self, latent: NDArray[np.float64], step: int) -> NDArray[np.float64]:
        """E[x_0 | x_t]."""
        ab = self.schedule.alpha_bar[step]
        gain = np.sqrt(ab) * self.variance / (ab * self.variance + 1.0 - ab)
        return np.asarray(self.mean + gain * (latent - np.sqrt(ab) * self.mean))

    def step(self, latent: NDArray[np.float64], step: int) -> NDArray[np.float64]:
        """μ(x_t, c) of [K] Eq. 3."""
        ab, alpha = self.schedule.alpha_bar, self.schedule.alpha[step - 1]
        of_clean = np.sqrt(ab[step - 1]) * (1.0 - alpha) / (1.0 - ab[step])
        of_latent = np.sqrt(alpha) * (1.0 - ab[step - 1]) / (1.0 - ab[step])
        return np.asarray(of_clean * self.estimate(latent, step) + of_latent * latent)

    def path(self, last: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Mean and covariance of (x_T, …, x_last), x_T ~ N(0, 1), whose every step is affine."""
        total = self.schedule.num_steps
        variances = self.schedule.posterior_variance
        mean, cov = np.zeros(1), np.ones((1, 1))
        for step in range(total, last, -1):
            offset = float(self.step(np.zeros(1), step)[0])
            slope = float(self.step(np.ones(1), step)[0]) - offset
            column = slope * cov[:, -1]
            cov = np.block([[cov, column[:, None]], [column[None], slope**2 * cov[-1:, -1:] + variances[step - 1]]])
            mean = np.append(mean, slope * mean[-1] + offset)
        return mean, cov

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.float64]:
        """Paths x_0 … x_T, (count, T+1)."""
        total = self.schedule.num_steps
        x = np.empty((count, total + 1))
        x[:, total] = rng.standard_normal(count)
        for step in range(total, 0, -1):
            noise = rng.standard_normal(count) * np.sqrt(self.schedule.posterior_variance[step - 1])
            x[:, step - 1] = self.step(x[:, step], step) + noise
        return x

    def distances(self, other: GaussianCondition, path: NDArray[np.float64]) -> NDArray[np.float64]:
        steps = range(1, self.schedule.num_steps + 1)
        return np.stack([(self.estimate(path[:, t], t) - other.estimate(path[:, t], t)) ** 2 for t in steps], axis=-1)


def gaussian_divergence(a: tuple[NDArray[np.float64], ...], b: tuple[NDArray[np.float64], ...]) -> float:
    """KL(N(a) ‖ N(b))."""
    inverse, difference = np.linalg.inv(b[1]), b[0] - a[0]
    logs = np.linalg.slogdet(b[1])[1] - np.linalg.slogdet(a[1])[1]
    return float(0.5 * (np.trace(inverse @ a[1]) + difference @ inverse @ difference - len(difference) + logs))


class TestDivergence:
    def test_what_a_step_weighs(self) -> None:
        """The difference of the means over β̃_t, from the posterior's own formula."""
        a, b = GaussianCondition(SCHEDULE, 0.3, 0.5), GaussianCondition(SCHEDULE, -1.0, 0.2)
        latent = np.array([0.7])
        for step in range(2, SCHEDULE.num_steps + 1):
            means = a.step(latent, step) - b.step(latent, step)
            estimates = a.estimate(latent, step) - b.estimate(latent, step)
            wanted = means**2 / SCHEDULE.posterior_variance[step - 1]
            np.testing.assert_allclose(step_information(SCHEDULE)[step - 1] * estimates**2, wanted, rtol=1e-9)
        assert np.isinf(step_information(SCHEDULE)[0])

    def test_of_equal_variances_it_is_that_of_the_paths(self) -> None:
        """The estimates differ alike on every path, so one path has the whole divergence."""
        a, b = GaussianCondition(SCHEDULE, 0.3, 0.5), GaussianCondition(SCHEDULE, -1.0, 0.5)
        path = a.draw(np.random.default_rng(0), 2)
        found = path_divergence(SCHEDULE, a.distances(b, path))
        for last in range(1, SCHEDULE.num_steps):
            np.testing.assert_allclose(found[:, last], gaussian_divergence(a.path(last), b.path(last)), rtol=1e-7)

    def test_of_other_variances_it_is_so_in_the_mean(self) -> None:
        """10,000 paths: the standard error is below 1 % of the mean."""
        a, b = GaussianCondition(SCHEDULE, 0.3, 0.5), GaussianCondition(SCHEDULE, -1.0, 0.2)
        found = path_divergence(SCHEDULE, a.distances(b, a.draw(np.random.default_rng(0), 10_000)))
        for last in (1, 4, 8):
            values = found[:, last]
            error = values.std() / np.sqrt(len(values))
            assert error < 0.01 * values.mean()
            assert abs(values.mean() - gaussian_divergence(a.path(last), b.path(last))) < 4 * error

    def test_with_small_steps_it_is_that_of_the_marginals(self) -> None:
        """KL(p_m ‖ p_m′) less the same at T, of what noise added to x_0 gives; and it is below the bound."""
        schedule = NoiseSchedule.stable_diffusion(999)
        a, b = GaussianCondition(schedule, 0.0, 0.5), GaussianCondition(schedule, 1.0, 0.5)
        found = path_divergence(schedule, a.distances(b, np.zeros((1, 1000))))[0]
        ab = schedule.alpha_bar[1:]
        marginals = ab / (2.0 * (ab * 0.5 + 1.0 - ab))
        np.testing.assert_allclose(found[50:], (marginals - marginals[-1])[49:], rtol=0.05, atol=1e-6)
        assert (found[20:] <= divergence_bound(schedule, 1.0)[20:]).all()

    def test_of_two_latents_it_is_the_bound(self) -> None:
        """Two fixed x_0: the sum telescopes, and what is left out is what x_T knows of x_0."""
        a, b = GaussianCondition(SCHEDULE, 0.3, 0.0), GaussianCondition(SCHEDULE, -1.0, 0.0)
        found = path_divergence(SCHEDULE, a.distances(b, np.zeros((1, 13))))[0]
        bound = divergence_bound(SCHEDULE, 1.3**2)
        np.testing.assert_allclose(found[1:], bound[1:] - bound[-1], rtol=1e-9)
        assert np.isinf(found[0])
        assert np.isinf(bound[0])
        # The coefficients of Stable Diffusion's schedule at T = 50.
        coefficients = divergence_bound(NoiseSchedule.stable_diffusion(50), 1.0)
        np.testing.assert_allclose(coefficients[[35, 25, 15, 5, 1]], [0.052, 0.217, 0.824, 5.53, 293], rtol=0.01)

    def test_it_grows_as_steps_are_taken(self) -> None:
        found = path_divergence(SCHEDULE, np.random.default_rng(0).random((3, 12)))
        assert (np.diff(found, axis=-1) < 0.0).all()
        np.testing.assert_array_equal(found[:, -1], 0.0)
        np.testing.assert_array_equal(path_divergence(SCHEDULE, np.zeros(12)), 0.0)
        np.testing.assert_array_equal(divergence_bound(SCHEDULE, 0.0), 0.0)

    def test_bad_input(self) -> None:
        with pytest.raises(ConfigurationError, match=r"`distances` must be 12 numbers .* got shape \(11,\) with 0"):
            path_divergence(SCHEDULE, np.zeros(11))
        for value in (-1.0, np.nan):
            with pytest.raises(ConfigurationError, match=rf"`distances` must be 12 numbers .* with {value}"):
                path_divergence(SCHEDULE, np.full(12, value))
            with pytest.raises(ConfigurationError, match=rf"`squared_distance` must be at least 0, got {value}"):
                divergence_bound(SCHEDULE, value)
        with pytest.raises(ConfigurationError, match=r"Latents must be pairs of one shape .* \(1, 2, 2\) and \(1, 2\)"):
            normalized_mse(np.zeros((1, 2, 2)), np.zeros((1, 2)))


def test_measures_by_hand() -> None:
    a, b = np.array([[[3.0, 4.0]]]), np.array([[[0.0, 1.0]]])
    assert normalized_mse(a, b) == 18 / 25
    assert cosine_similarity(a, b) == 0.8
    assert estimate_distances(a, b) == 18
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 5, 2, 3, 3))
    np.testing.assert_allclose(cosine_similarity(x, y), cosine_similarity(y, x))
    np.testing.assert_array_equal(estimate_distances(x, y), estimate_distances(y, x))
    power = np.square(x).sum(axis=(1, 2, 3)) / np.square(y).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(normalized_mse(x, y) * power, normalized_mse(y, x))
    np.testing.assert_allclose(cosine_similarity(x, -2.0 * x), -1.0)


STEPS = 4
CONDITIONS, OTHERS, SEEDS = ["a cat", "dog"], ["the sun", "dog"], [3, 4]


@pytest.fixture(scope="module")
def sampler(tiny_model: Path) -> LatentSampler:
    return LatentSampler(tiny_model, num_steps=STEPS, guidance_scale=2.0)


class TestOfAModel:
    def test_compare(self, sampler: LatentSampler) -> None:
        found = compare(sampler, CONDITIONS, OTHERS, SEEDS)
        latents, estimates = (values.astype(np.float64) for values in sampler.sample(CONDITIONS, SEEDS))
        others = sampler.sample(OTHERS, SEEDS)[0].astype(np.float64)
        np.testing.assert_allclose(found.nmse, normalized_mse(latents, others))
        np.testing.assert_allclose(found.cosine, cosine_similarity(latents, others))
        np.testing.assert_array_equal(found.nmse[:, STEPS], 0.0)  # the same noise
        for values in (found.nmse, found.cosine, found.divergence, found.bound):
            assert values.shape == (2, STEPS + 1)
        # The same prompt: the estimates differ by what float16 left of x_t alone.
        power = np.square(estimates).sum(axis=(2, 3, 4))
        assert (found.distances[1] < 1e-4 * power[1]).all()
        assert found.distances[0].max() > 100 * found.distances[1].max()
        np.testing.assert_array_equal(found.divergence, path_divergence(sampler.schedule, found.distances))
        wanted = divergence_bound(sampler.schedule, np.square(others - latents)[:, 0].sum(axis=(1, 2, 3)))
        np.testing.assert_allclose(found.bound, wanted)
        with pytest.raises(ConfigurationError, match=r"`others` and `seeds` must be one for each of the 2 conditions"):
            compare(sampler, CONDITIONS, OTHERS[:1], SEEDS)

    @pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "dpmsolver++"])
    def test_an_estimate_is_what_the_run_has_there(self, tiny_model: Path, scheduler: str) -> None:
        """To the last bit that float16 has, from the unrounded x_m of a run; and nothing is left behind."""
        sampler = LatentSampler(tiny_model, num_steps=STEPS, guidance_scale=2.0, scheduler=scheduler)
        latents, estimates = sampler.sample(CONDITIONS, SEEDS)
        for step in range(2, STEPS):
            start = [run.tensors["latent"] for run in sampler.sample_midpoints(CONDITIONS, SEEDS, step)]
            found = sampler.estimate(CONDITIONS, start, step)
            np.testing.assert_array_equal(found.astype(np.float16), estimates[:, step - 1])
            assert not np.allclose(sampler.estimate(OTHERS, start, step)[0], found[0])
        found = sampler.estimate(CONDITIONS, sampler.initial_noise(SEEDS), STEPS)
        np.testing.assert_array_equal(found.astype(np.float16), estimates[:, STEPS - 1])
        np.testing.assert_array_equal(sampler.sample(CONDITIONS, SEEDS)[0], latents)

    def test_midpoints_on_the_way(self, sampler: LatentSampler) -> None:
        """One run gives what as many runs as steps give."""
        found = sampler.sample_midpoints(CONDITIONS, SEEDS, 1, passing=[3, 2])
        wanted = [run for step in (1, 3, 2) for run in sampler.sample_midpoints(CONDITIONS, SEEDS, step)]
        assert [run.key for run in found] == [run.key for run in wanted]
        for one, other in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(one.tensors["latent"], other.tensors["latent"])

    def test_bad_input(self, sampler: LatentSampler) -> None:
        latents = np.zeros((2, *sampler.latent_shape))
        for step in (0, 5):
            with pytest.raises(ConfigurationError, match=rf"`step` must be .* got {step}"):
                sampler.estimate(CONDITIONS, latents, step)
        with pytest.raises(ConfigurationError, match=r"`latents` must be of shape \(2, 4, 4, 4\), .* got \(1,"):
            sampler.estimate(CONDITIONS, latents[:1], 2)
        with pytest.raises(ConfigurationError, match=r"`passing` must be .* got 4"):
            sampler.sample_midpoints(CONDITIONS, SEEDS, 2, passing=[4])
