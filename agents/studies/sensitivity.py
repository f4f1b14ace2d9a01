"""Which conclusion of [K] depends on which parameter: ``python -m agents.evaluate --study sensitivity``.

One parameter at a time is moved away from [K]'s value; the policies play on common draws at each of its values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import agents
from agents.studies.base import Request, Study, write_tables
from agents.studies.paired import Resampled, interval, mean_and_interval, resample
from refine_env import LinkConfig
from refine_env.commands import print_table
from refine_env.config import PAPER_BIT_DEPTHS, PAPER_DEADLINE, PAPER_LATENCY_QUANTILE
from refine_env.evaluation import EPISODE_COLUMNS, Entry, Table, read_table

__all__ = [
    "CONCLUSION_COLUMNS",
    "KNOBS",
    "POLICIES",
    "SENSITIVITY",
    "SENSITIVITY_COLUMNS",
    "Knob",
    "conclude",
    "read_sensitivity",
    "summarize_sensitivity",
]

_LINK = LinkConfig()
_SYMBOLS = _LINK.num_subchannels * _LINK.symbols_per_slot  # K·ℓ of [K]


class Knob(NamedTuple):
    """A parameter that is moved.

    Attributes:
        label: its name in tables and figures.
        paper: [K]'s value.
        values: all values, [K]'s among them.
        env_kwargs: environment arguments of a value.
        log: whether a figure shows it on a logarithmic axis.
    """

    label: str
    paper: float
    values: tuple[float, ...]
    env_kwargs: Callable[[Any], Mapping[str, Any]]
    log: bool = False


KNOBS = {
    "latency_quantile": Knob(
        "quantile q of the latency model",
        PAPER_LATENCY_QUANTILE,
        (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99),
        lambda value: {"latency_quantile": value},
    ),
    "deadline": Knob(
        "deadline $T_d$ [slots]",
        PAPER_DEADLINE,
        (52, 54, 56, 58, 60, 65, 70, 80),
        lambda value: {"deadline": int(value)},
    ),
    "num_subchannels": Knob(
        r"subchannels K, with K$\ell$ kept",
        _LINK.num_subchannels,
        (4, 8, 15, 30, 60, 120),
        lambda value: {"link": {"num_subchannels": int(value), "symbols_per_slot": _SYMBOLS / value}},
        log=True,
    ),
    "uplink_bits": Knob(
        "size of the prompt $B_s$ [bit]",
        _LINK.uplink_bits,
        (512, 2048, 8192, 16384, 32768, 65536),
        lambda value: {"link": {"uplink_bits": float(value)}},
        log=True,
    ),
}
"""The parameters; K moves the diversity alone, since the symbols of a slot stay as many."""

PERSISTENT = tuple(f"persistent-q{bits}" for bits in PAPER_BIT_DEPTHS)
POLICIES = (
    "lookahead",
    "lookahead-tight",
    *PERSISTENT,
    "final-only",
    "final-adaptive",
    "final-adaptive-closed-loop",
    "dp",
)
"""What plays, each on the coder that it is made for."""

_KEYS = ("knob", "value", "snr_db", "agent")

SENSITIVITY_COLUMNS: dict[str, type] = {
    "knob": str,
    "value": float,
    "snr_db": float,
    "agent": str,
    "coder": str,
    "episodes": int,
    **dict.fromkeys(("latent_mse", "latent_mse_low", "latent_mse_high"), float),
}
"""Columns of ``sensitivity.csv``: the mean latent MSE at the deadline of each policy at each value of each parameter
and SNR, with a 95 % interval of the bootstrap."""

CONCLUSION_COLUMNS: dict[str, type] = {
    "conclusion": str,
    "knob": str,
    "value": float,
    "snr_db": float,
    "against": str,
    **dict.fromkeys(("ratio", "ratio_low", "ratio_high"), float),
    "holds": str,
}
"""Columns of ``conclusions.csv``: the mean latent MSE of the policy ``against`` which the look-ahead is held, divided
by the look-ahead's, with a 95 % interval of the paired bootstrap; ``holds`` is ``yes`` where that lies above 1, ``no``
where it lies below, and ``open`` where it holds 1."""

CONCLUSIONS: dict[str, tuple[str, ...]] = {
    "look-ahead beats Final-Only": ("final-only",),
    "look-ahead beats every Persistent-Q": PERSISTENT,
    "look-ahead beats sequential sending at an adaptive rate": ("final-adaptive",),
    "the slot that look-ahead keeps in reserve costs nothing": ("lookahead-tight",),
}
"""What [K] concludes, or takes for granted, and the policies of which the best must be worse than the look-ahead."""


def summarize_sensitivity(table: Table) -> tuple[Table, Table]:
    """Means of every policy, and which conclusion holds where.

    Args:
        table: rows of episodes with the columns ``knob`` and ``value``.

    Returns:
        Rows of :data:`SENSITIVITY_COLUMNS`, and rows of :data:`CONCLUSION_COLUMNS`.
    """
    means = resample(table, _KEYS, "latent_mse")
    described: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in table:
        cell = described.setdefault(tuple(row[key] for key in _KEYS), {"coder": row["coder"], "episodes": 0})
        cell["episodes"] += 1
    cells = [
        {**dict(zip(_KEYS, key, strict=True)), **described[key], **mean_and_interval("latent_mse", values)}
        for key, values in means.items()
    ]
    places = dict.fromkeys(key[:-1] for key in means)
    conclusions = [
        {
            "conclusion": conclusion,
            **dict(zip(_KEYS, place, strict=False)),
            **conclude({name: means[*place, name] for name in ("lookahead", *others)}),
        }
        for conclusion, others in CONCLUSIONS.items()
        for place in places
    ]
    return cells, conclusions


def conclude(means: Mapping[str, Resampled]) -> dict[str, Any]:
    """Whether the look-ahead has the lowest mean: the best of the others over it, and ``holds``.

    Args:
        means: resampled means by policy, the look-ahead's first.
    """
    first, *others = means
    best = min(others, key=lambda name: float(means[name][0]))
    values = means[best] / means[first]
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return {
        "against": best,
        **interval("ratio", values),
        "holds": "yes" if low > 1.0 else "no" if high < 1.0 else "open",
    }


def read_sensitivity(folder: Path) -> tuple[Table, Table]:
    """Read ``sensitivity.csv`` and ``conclusions.csv``.

    Raises:
        ConfigurationError: if a file is missing, or not such a table.
    """
    command = "python -m agents.evaluate --study sensitivity"
    cells = read_table(folder / "sensitivity.csv", SENSITIVITY_COLUMNS, command=command)
    return cells, read_table(folder / "conclusions.csv", CONCLUSION_COLUMNS, command=command)


def _run(request: Request) -> tuple[list[Path], dict[str, Any]]:
    values = [(name, value) for name, knob in KNOBS.items() for value in knob.values]
    table: Table = []
    total = len(values) * len(POLICIES) * len(request.snrs_db) * request.episodes
    with request.progress(total, "sensitivity") as progress:
        for name, value in values:
            changed = {**request.env_kwargs, **KNOBS[name].env_kwargs(value)}
            entries = [
                Entry(partial(agents.make, policy), {**changed, **agents.env_kwargs(policy), "snr_db": snr_db})
                for snr_db in request.snrs_db
                for policy in POLICIES
            ]
            tables = request.roll_out(entries, progress)
            table += [{"knob": name, "value": float(value), **row} for rows in tables for row in rows]
    cells, conclusions = summarize_sensitivity(table)
    columns = {"knob": str, "value": float, **EPISODE_COLUMNS}
    written = {
        "episodes.csv": (table, columns),
        "sensitivity.csv": (cells, SENSITIVITY_COLUMNS),
        "conclusions.csv": (conclusions, CONCLUSION_COLUMNS),
    }
    paths = write_tables(request.out, written)
    for conclusion in CONCLUSIONS:
        lines: list[list[str] | None] = []
        for name, knob in KNOBS.items():
            lines.append(None)
            for value in knob.values:
                found = [
                    r for r in conclusions if (r["conclusion"], r["knob"], r["value"]) == (conclusion, name, value)
                ]
                lines.append([f"{name} {value:g}", *(f"{row['holds']} {row['ratio']:.3g}" for row in found)])
        print_table({"": "left", **{f"{snr_db:g} dB": "right" for snr_db in request.snrs_db}}, lines, title=conclusion)
    return paths, {"knobs": {name: list(knob.values) for name, knob in KNOBS.items()}, "policies": list(POLICIES)}


SENSITIVITY = Study("sensitivity", "which conclusion depends on which parameter", (3.0, 6.0, 9.0, 12.0), 300, _run)
