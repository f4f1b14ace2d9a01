"""Numbers as figures and tables show them: zeros on a logarithmic axis, error bars, and means with their intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from agents.figures.style import rows_by_policy, styles_by_policy
from refine_env.evaluation import Table

__all__ = [
    "Cell",
    "Curve",
    "error_bars",
    "interval_columns",
    "no_delivery_level",
    "policy_curves",
    "summary_cells",
    "zero_floor",
]


class Cell(NamedTuple):
    """A mean as a table shows it.

    Attributes:
        mean: for example ``1.83e-3``; an exact zero is ``0``.
        interval: for example ``1.7–2.0``, in the mean's power of ten; empty for an exact zero.
        lowest: whether no other policy has a lower mean at this SNR.
    """

    mean: str
    interval: str
    lowest: bool


def format_mean(mean: float, low: float, high: float) -> tuple[str, str]:
    """The texts of a mean and of its interval, see :class:`Cell`."""
    if mean == 0.0:
        return "0", ""
    exponent = math.floor(math.log10(mean))
    unit = 10.0**exponent
    return f"{mean / unit:.2f}e{exponent}", f"{low / unit:.1f}–{high / unit:.1f}"


def summary_cells(policies: Mapping[str, Table], snrs_db: Iterable[float]) -> Iterator[tuple[str, list[Cell | None]]]:
    """The table of a summary's latent MSE: a line for each SNR, a cell for each policy.

    Args:
        policies: as :func:`agents.figures.rows_by_policy` gives them.
        snrs_db: the SNRs in the order of the lines.

    Yields:
        The SNR as text, and the cells in the order of the policies, None where a policy has no row at that SNR.
    """
    found = {(row["snr_db"], policy): row for policy, rows in policies.items() for row in rows}
    for snr_db in snrs_db:
        rows = [found.get((snr_db, policy)) for policy in policies]
        best = min(row["latent_mse"] for row in rows if row is not None)
        yield (
            f"{snr_db:g}",
            [
                None
                if row is None
                else Cell(*format_mean(row["latent_mse"], row["ci_low"], row["ci_high"]), row["latent_mse"] == best)
                for row in rows
            ],
        )


def zero_floor(values: Iterable[float]) -> float:
    """Where a logarithmic axis shows a value of exactly 0: a decade below that of the smallest positive one."""
    smallest = min((value for value in values if value > 0.0), default=1.0)
    return float(10.0 ** (math.floor(math.log10(smallest)) - 1))


class Curve(NamedTuple):
    """The values of one policy over the SNR, as a figure shows them.

    Attributes:
        policy: the policy.
        style: how its curve is drawn, see :func:`agents.figures.styles_by_policy`.
        rows: its rows that have a value, in the order of the SNR.
        snrs_db: the SNRs of these rows [dB].
        values: their values; one of exactly 0 stands at the floor, if that is above 0.
        bars: the lengths of the error bars below and above the values.
    """

    policy: str
    style: dict[str, Any]
    rows: Table
    snrs_db: list[float]
    values: list[float]
    bars: tuple[list[float], list[float]]


def policy_curves(summary: Table, column: str, floor: float = -math.inf) -> Iterator[Curve]:
    """The curve of each policy in a column of a summary.

    Args:
        summary: rows with :data:`refine_env.evaluation.SUMMARY_COLUMNS`.
        column: the column of the values.
        floor: the least that is drawn, where the axis is logarithmic; see :func:`zero_floor`.

    Yields:
        The curves in the order in which the policies appear.
    """
    policies = rows_by_policy(summary)
    for policy, style in styles_by_policy(policies).items():
        present = (row for row in policies[policy] if row[column] is not None)
        rows = sorted(present, key=lambda row: float(row["snr_db"]))
        values = [row[column] or max(floor, 0.0) for row in rows]
        yield Curve(policy, style, rows, [row["snr_db"] for row in rows], values, error_bars(rows, column, floor))


def interval_columns(column: str) -> tuple[str, str]:
    """The columns that hold the ends of the intervals of a column's values."""
    return ("ci_low", "ci_high") if column == "latent_mse" else (f"{column}_low", f"{column}_high")


def error_bars(rows: Table, column: str, floor: float = -math.inf) -> tuple[list[float], list[float]]:
    """How far the error bars of a column reach below and above its values.

    Args:
        rows: any rows.
        column: the column of the values, see :func:`interval_columns`.
        floor: no bar reaches below it.

    Returns:
        The lengths below and the lengths above. They are never negative: the rounding of a mean and of its interval's
        end may differ in the last bit.
    """
    low, high = interval_columns(column)
    below = [max(0.0, row[column] - max(row[low], floor)) for row in rows]
    return below, [max(0.0, row[high] - row[column]) for row in rows]


def no_delivery_level(summary: Table) -> float:
    """The mean latent MSE of devices to which nothing was delivered."""
    return float(sum(row["no_delivery_mse"] for row in summary) / len(summary))
