"""Means of paired episodes, with intervals from a bootstrap that resamples all tables alike."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refine_env.errors import ConfigurationError
from refine_env.evaluation.tables import FURTHER_COLUMNS, IMAGE_COLUMNS, Table, interval_columns

__all__ = ["bootstrap_interval", "percentile_interval", "resampled_means", "summarize"]


@lru_cache(maxsize=2)
def _resampling_counts(size: int, resamples: int, seed: int) -> NDArray[np.float64]:
    """How often each of ``size`` values is in each resample, (resamples, size)."""
    counts = np.random.default_rng(seed).multinomial(size, np.full(size, 1.0 / size), size=resamples)
    return counts.astype(np.float64)


def resampled_means(values: NDArray[np.float64], *, resamples: int = 2_000, seed: int = 0) -> NDArray[np.float64]:
    """The mean of every bootstrap resample, (resamples,).

    Tables of the same length are resampled alike, so that differences and ratios of paired episodes are paired too.

    Args:
        values: (n,).
        resamples: bootstrap replicates.
        seed: seed of the resampling.

    Raises:
        ConfigurationError: if there are no values.
    """
    if values.size == 0:
        raise ConfigurationError("`values` must hold at least one number, got none. Evaluate some episodes first.")
    return _resampling_counts(values.size, resamples, seed) @ values / values.size


def percentile_interval(resampled: NDArray[np.float64], *, level: float = 0.95) -> tuple[float, float]:
    """The central interval that holds the share ``level`` of a statistic's values on all resamples."""
    low, high = np.quantile(resampled, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(low), float(high)


def bootstrap_interval(
    values: NDArray[np.float64], *, level: float = 0.95, resamples: int = 2_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean; see :func:`resampled_means`.

    Args:
        values: (n,).
        level: coverage.
        resamples: bootstrap replicates.
        seed: seed of the resampling.

    Raises:
        ConfigurationError: if there are no values.
    """
    return percentile_interval(resampled_means(values, resamples=resamples, seed=seed), level=level)


def summarize(episodes: Table) -> Table:
    """Mean, interval and averages per agent and SNR, in the order in which they first appear.

    Args:
        episodes: rows with :data:`EPISODE_COLUMNS`, and with those of :data:`FURTHER_COLUMNS` that were asked for.

    Returns:
        Rows with :func:`refine_env.evaluation.summary_columns`.
    """
    groups: dict[tuple[Any, ...], Table] = {}
    for row in episodes:
        groups.setdefault((row["agent"], row["snr_db"], row["coder"], row["payload"]), []).append(row)
    summary: Table = []
    for (agent, snr_db, coder, payload), rows in groups.items():

        def mean(column: str, rows: Table = rows) -> float:
            return float(np.mean([row[column] for row in rows]))

        values = np.array([row["latent_mse"] for row in rows])
        low, high = bootstrap_interval(values)
        summary.append(
            {
                "agent": agent,
                "snr_db": snr_db,
                "episodes": len(rows),
                "latent_mse": float(values.mean()),
                "ci_low": low,
                "ci_high": high,
                "no_delivery_mse": mean("no_delivery_mse"),
                "delivered_share": float(np.mean([row["num_deliveries"] > 0 for row in rows])),
                "mean_device_step": mean("device_step"),
                "mean_num_deliveries": mean("num_deliveries"),
                "mean_bits_sent": mean("bits_sent"),
                "coder": coder,
                "payload": payload,
                **_summarize_scores(rows),
            }
        )
    return summary


_OF_IMAGES = (*IMAGE_COLUMNS, *(name for name in FURTHER_COLUMNS if name.startswith("task_")))


def _summarize_scores(rows: Table) -> dict[str, Any]:
    """Means and intervals of the image metrics and of what else was asked for; None of what no row has."""
    columns: dict[str, Any] = {
        "scored_episodes": sum(any(row.get(name) is not None for name in _OF_IMAGES) for row in rows)
    }
    for name in (*IMAGE_COLUMNS, *(name for name in FURTHER_COLUMNS if name in rows[0])):
        columns |= _interval_of(name, rows)
    return columns


def _interval_of(name: str, rows: Table) -> dict[str, float | None]:
    """Mean and interval of a column, over the rows that have it; None where none has."""
    values = np.array([row[name] for row in rows if row.get(name) is not None])
    low, high = bootstrap_interval(values) if values.size else (None, None)
    return dict(zip(interval_columns(name), (float(values.mean()) if values.size else None, low, high), strict=True))
