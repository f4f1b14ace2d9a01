"""Bootstrap intervals: coverage, width, and the resamples that paired tables share."""

from __future__ import annotations

import numpy as np
import pytest

from refine_env import ConfigurationError
from refine_env.evaluation import bootstrap_interval, percentile_interval, resampled_means


def test_bootstrap_covers_the_mean_as_often_as_it_says() -> None:
    """200 samples of 100: coverage 95 % has a standard deviation of 1.5 %."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = bootstrap_interval(rng.normal(1.0, 2.0, 100), resamples=1000)
        hits += low <= 1.0 <= high
    assert 0.89 <= hits / 200 <= 0.985
    assert bootstrap_interval(np.full(10, 3.0)) == (3.0, 3.0)


def test_bootstrap_width_is_that_of_the_normal_theory() -> None:
    values = np.random.default_rng(1).normal(size=400)
    low, high = bootstrap_interval(values)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.05)


def test_paired_tables_are_resampled_alike() -> None:
    """So the interval of a difference is that of the paired differences."""
    a, b = np.random.default_rng(2).normal(size=(2, 50))
    np.testing.assert_allclose(resampled_means(a) - resampled_means(b), resampled_means(a - b), atol=1e-12)
    assert percentile_interval(resampled_means(a), level=0.8) == bootstrap_interval(a, level=0.8)


def test_no_values() -> None:
    with pytest.raises(ConfigurationError, match="`values` must hold at least one number, got none"):
        bootstrap_interval(np.array([]))
