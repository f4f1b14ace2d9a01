"""How much may be reused: the predictor on cases whose errors are known, and what is chosen by it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refine_env import ConfigurationError, NoiseSchedule
from refine_env.trajectories.adaptive import ErrorPredictor, StoredRuns, adaptive_ratio, candidate_divergence
from refine_env.trajectories.midpoints import MidpointStore
from refine_env.trajectories.pipeline import LatentSampler
from refine_env.trajectories.similarity import path_divergence

SCHEDULE = NoiseSchedule.stable_diffusion(50)
CANDIDATES = (35, 25, 15, 5, 1)


class TestDivergence:
    def test_with_every_step_a_candidate_it_is_that_of_the_path_but_for_where_it_is_asked(self) -> None:
        """A constant distance telescopes to the same sum."""
        every = list(range(49, 0, -1))
        found = candidate_divergence(SCHEDULE, every, np.full((2, 49), 3.0), np.full((2, 49), 2.0))
        wanted = path_divergence(SCHEDULE, np.full(50, 3.0))[every] / 2.0
        np.testing.assert_allclose(found, [wanted, wanted])
        few = candidate_divergence(SCHEDULE, CANDIDATES, np.full(5, 3.0), np.full(5, 2.0))
        np.testing.assert_allclose(few, path_divergence(SCHEDULE, np.full(50, 3.0))[list(CANDIDATES)] / 2.0)

    def test_it_grows_along_the_candidates_and_with_every_distance(self) -> None:
        rng = np.random.default_rng(0)
        distances, powers = rng.random((20, 5)), np.ones((20, 5))
        found = candidate_divergence(SCHEDULE, CANDIDATES, distances, powers)
        assert (np.diff(found, axis=-1) > 0.0).all()
        for k in range(5):
            more = distances + 0.1 * (np.arange(5) == k)
            changed = candidate_divergence(SCHEDULE, CANDIDATES, more, powers) - found
            assert (changed[:, k:] > 0.0).all()
            np.testing.assert_array_equal(changed[:, :k], 0.0)

    def test_bad_input(self) -> None:
        ones = np.ones(5)
        for steps in ((35, 25, 15, 5, 0), (50, 25, 15, 5, 1), (35, 25, 25, 5, 1), (1, 5, 15, 25, 35), ()):
            with pytest.raises(ConfigurationError, match=r"`steps` must be candidates m that fall within 1 … 49, got"):
                candidate_divergence(SCHEDULE, steps, ones, ones)
        with pytest.raises(ConfigurationError, match=r"one for each of the 5 candidates, got shapes \(4,\) and \(5,\)"):
            candidate_divergence(SCHEDULE, CANDIDATES, ones[:4], ones)
        for distances, powers in ((-ones, ones), (ones, 0 * ones), (np.nan * ones, ones)):
            with pytest.raises(ConfigurationError, match=r"`distances` must be at least 0 and `powers` positive"):
                candidate_divergence(SCHEDULE, CANDIDATES, distances, powers)


def synthetic(rng: np.random.Generator, count: int) -> tuple[Any, Any]:
    """Pairs with errors 0.3 · D^0.6, up to a factor of each pair's own in 0.5 … 1."""
    divergence = np.cumsum(rng.exponential(size=(count, 5)), axis=1) * rng.uniform(0.01, 1.0, (count, 1))
    return divergence, 0.3 * divergence**0.6 * rng.uniform(0.5, 1.0, (count, 1))


class TestPredictor:
    def test_calibration_finds_the_law(self) -> None:
        predictor = ErrorPredictor.calibrate(*synthetic(np.random.default_rng(0), 2000), coverage=0.9)
        assert predictor.exponent == pytest.approx(0.6, abs=0.02)
        assert predictor.scale == pytest.approx(0.3 * 0.95, rel=0.02)

    def test_coverage_on_other_pairs(self) -> None:
        """99 pairs to tune on, 1,000 times one more: at least 0.9, standard error 0.01."""
        rng = np.random.default_rng(0)
        covered = []
        for _ in range(1000):
            divergence, errors = synthetic(rng, 40)
            predictor = ErrorPredictor.calibrate(divergence[:39], errors[:39], coverage=0.9)
            covered.append(bool((errors[39] <= predictor(divergence[39])).all()))
        assert 0.9 - 0.03 < np.mean(covered) < 0.9 + 0.04

    def test_for_one_tolerance_the_scale_is_the_least(self) -> None:
        """Of 39 pairs 3 may be wrong, a smaller scale has more of them wrong; and others are covered, 200 times."""
        rng = np.random.default_rng(0)

        def wrong(predictor: ErrorPredictor, divergence: Any, errors: Any) -> Any:
            taken = (predictor(divergence) <= 0.1).sum(axis=1)
            reached = np.take_along_axis(np.concatenate([0 * errors[:, :1], errors], axis=1), taken[:, None], axis=1)
            return (reached[:, 0] > 0.1).sum()

        missed = []
        for _ in range(200):
            divergence, errors = synthetic(rng, 40)
            predictor = ErrorPredictor.calibrate(divergence[:39], errors[:39], coverage=0.9, tolerance=0.1)
            assert wrong(predictor, divergence[:39], errors[:39]) <= 3
            missed.append(wrong(predictor, divergence[39:], errors[39:]))
        assert np.mean(missed) < 0.1 + 0.05  # standard error 0.02
        every = ErrorPredictor.calibrate(divergence[:39], errors[:39], coverage=0.9)
        assert predictor.scale <= every.scale
        assert wrong(replace(predictor, scale=0.5 * predictor.scale), divergence[:39], errors[:39]) > 3

    def test_what_it_predicts_never_falls(self) -> None:
        predictor = ErrorPredictor(scale=0.3, exponent=0.6)
        divergence = np.random.default_rng(0).random((20, 5))  # a power that is found anew may have it fall
        assert (np.diff(predictor(divergence), axis=-1) >= 0.0).all()
        np.testing.assert_allclose(predictor(divergence)[:, 0], 0.3 * divergence[:, 0] ** 0.6)
        assert (predictor(divergence + 0.1) > predictor(divergence)).all()

    def test_bad_input(self) -> None:
        divergence, errors = synthetic(np.random.default_rng(0), 9)
        for name in ("scale", "exponent"):
            with pytest.raises(ConfigurationError, match=rf"`{name}` must be > 0, got 0"):
                ErrorPredictor(**{"scale": 1.0, "exponent": 1.0, name: 0.0})
        with pytest.raises(ConfigurationError, match=r"`errors` must be of the divergence's shape \(N, K\), got"):
            ErrorPredictor.calibrate(divergence, errors[:, :4])
        for coverage in (0.0, 0.91, 1.0):
            with pytest.raises(ConfigurationError, match=rf"`coverage` must be in .* N = 9 pairs, got {coverage}"):
                ErrorPredictor.calibrate(divergence, errors, coverage=coverage)
        with pytest.raises(ConfigurationError, match=r"`tolerance` must be > 0, got 0"):
            ErrorPredictor.calibrate(divergence, errors, coverage=0.5, tolerance=0.0)
        with pytest.raises(ConfigurationError, match=r"`divergence` must have several positive values"):
            ErrorPredictor.calibrate(0.0 * divergence, errors)


STEPS, RUNS = (4, 2, 1), [("a cat", 3), ("dog", 4), ("a cat", 5)]
TARGETS = ["the sun", "dog", "moon"]


@pytest.fixture(scope="module")
def sampler(tiny_model: Path) -> LatentSampler:
    return LatentSampler(tiny_model, num_steps=5, guidance_scale=2.0)


@pytest.fixture(scope="module")
def stored(sampler: LatentSampler, tmp_path_factory: pytest.TempPathFactory) -> StoredRuns:
    return StoredRuns.obtain(sampler, MidpointStore(tmp_path_factory.mktemp("store")), RUNS, STEPS, 2)


class TestChoice:
    def test_stored_runs(self, sampler: LatentSampler, stored: StoredRuns) -> None:
        latents, estimates = sampler.sample([text for text, _ in RUNS], [seed for _, seed in RUNS])
        for place, step in enumerate(STEPS):
            np.testing.assert_allclose(stored.latents[:, place], latents[:, step], rtol=2e-3, atol=2e-3)
            if step > 1:  # y_0 is recorded as x_0
                np.testing.assert_allclose(stored.estimates[:, place], estimates[:, step - 1], rtol=2e-3, atol=2e-3)

    def test_never_more_than_the_tolerance_permits(self, sampler: LatentSampler, stored: StoredRuns) -> None:
        """Beside the plain way: all candidates asked, and the last of those before the first that is too large."""
        predictor = ErrorPredictor(scale=0.3, exponent=0.6)
        asked = [
            (np.square(y - stored.estimates[:, k]).sum(axis=(1, 2, 3)), np.square(y).sum(axis=(1, 2, 3)))
            for k, step in enumerate(STEPS)
            for y in [sampler.estimate(TARGETS, stored.latents[:, k], step).astype(np.float64)]
        ]
        distances, powers = np.array(asked).transpose(1, 2, 0)
        predicted = predictor(candidate_divergence(sampler.schedule, STEPS, distances, powers))
        found = set()
        for tolerance in (1e-9, *np.sort(predicted[[0, 2]].ravel()) * 1.001, 1e9):
            wanted = []
            for values in predicted:
                below = [step for step, value in zip(STEPS, values, strict=True) if value <= tolerance]
                wanted.append(1.0 - below[-1] / 5 if below else 0.0)
            ratios = adaptive_ratio(sampler, stored, TARGETS, predictor, tolerance=float(tolerance))
            np.testing.assert_allclose(ratios[[0, 2]], np.array(wanted)[[0, 2]])  # that of one condition is rounding
            found |= set(ratios.round(3).tolist())
        assert found == {0.0, 0.2, 0.6, 0.8}

    def test_the_same_condition_may_be_reused_whole(self, sampler: LatentSampler, stored: StoredRuns) -> None:
        ratios = adaptive_ratio(
            sampler, stored, [text for text, _ in RUNS], ErrorPredictor(scale=1.0, exponent=1.0), tolerance=1e-6
        )
        np.testing.assert_allclose(ratios, 0.8)

    def test_evaluations(self, sampler: LatentSampler, stored: StoredRuns, monkeypatch: pytest.MonkeyPatch) -> None:
        """No candidate is asked after one that is too far."""
        asked: list[tuple[int, int]] = []
        estimate = sampler.estimate

        def counting(conditions: Any, latents: Any, step: int) -> Any:
            asked.append((step, len(conditions)))
            return estimate(conditions, latents, step)

        monkeypatch.setattr(sampler, "estimate", counting)
        adaptive_ratio(sampler, stored, TARGETS, ErrorPredictor(scale=1.0, exponent=1.0), tolerance=1e-9)
        assert asked[0] == (4, 3)
        assert asked[1:] == [(2, 1), (1, 1)]  # of the run with the same condition

    def test_bad_input(self, sampler: LatentSampler, stored: StoredRuns, tmp_path: Path) -> None:
        predictor = ErrorPredictor(scale=1.0, exponent=1.0)
        for tolerance in (0.0, -1.0, float("nan")):
            with pytest.raises(ConfigurationError, match=rf"`tolerance` must be .* got {tolerance}"):
                adaptive_ratio(sampler, stored, TARGETS, predictor, tolerance=tolerance)
        with pytest.raises(ConfigurationError, match=r"`conditions` must be one for each of the 3 stored runs, got 2"):
            adaptive_ratio(sampler, stored, TARGETS[:2], predictor, tolerance=1.0)
        with pytest.raises(ConfigurationError, match=r"`steps` must be candidates m that fall within 1 … 4, got \[5\]"):
            StoredRuns.obtain(sampler, MidpointStore(tmp_path), RUNS, [5], 2)
