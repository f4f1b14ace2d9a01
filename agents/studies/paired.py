"""Means of paired episodes with intervals: every row of a study is played on the same draws."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from refine_env.evaluation import Table, resampled_means

__all__ = ["MSE_FLOOR", "Resampled", "interval", "mean_and_interval", "resample"]

MSE_FLOOR = 1e-12
"""Added to every mean before ratios are taken: an MSE of exactly 0 is real at high SNR."""

Resampled = NDArray[np.float64]
"""A mean, then the means of the bootstrap's resamples, which are the same for all rows, since their draws are common;
so a ratio of two is a ratio with its paired resamples."""


def resample(table: Table, keys: Sequence[str], column: str) -> dict[tuple[Hashable, ...], Resampled]:
    """The mean of a column and its resamples, :data:`MSE_FLOOR` added, for each group of rows.

    Args:
        table: rows of episodes, those of each group in the same order of episodes.
        keys: columns that name the groups.
        column: the values; groups in which one is None are left out.

    Returns:
        Resampled means by the values of ``keys``, in order of appearance.
    """
    groups: dict[tuple[Hashable, ...], list[float | None]] = {}
    for row in table:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row[column])
    found = {}
    for group, values in groups.items():
        if None not in values:
            numbers = np.array(values, dtype=np.float64)
            found[group] = np.concatenate([[numbers.mean()], resampled_means(numbers)]) + MSE_FLOOR
    return found


def interval(name: str, values: Resampled | None) -> dict[str, float | None]:
    """The columns ``name``, ``name_low`` and ``name_high``: the value and its 95 % interval; empty without values."""
    if values is None:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return {name: float(values[0]), f"{name}_low": float(low), f"{name}_high": float(high)}


def mean_and_interval(name: str, values: Resampled | None) -> Mapping[str, float | None]:
    """:func:`interval` of means themselves, :data:`MSE_FLOOR` taken off again."""
    return interval(name, None if values is None else values - MSE_FLOOR)
