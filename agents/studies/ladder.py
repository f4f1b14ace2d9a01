"""The ladder: from the paper's look-ahead to the optimum, one ingredient after the other, and what each is worth.

``python -m agents.evaluate --study ladder`` plays every rung on the same draws, and beside it the clairvoyant bound of
the same coder, payload and bit depths.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import agents
from agents.studies.base import Request, Study, write_tables
from agents.studies.paired import MSE_FLOOR, interval, resample
from refine_env.commands import print_table
from refine_env.config import PAPER_BIT_DEPTHS
from refine_env.evaluation import (
    EPISODE_COLUMNS,
    Entry,
    Table,
    read_table,
    roll_out_many,
)

__all__ = [
    "BOUND_COLUMNS",
    "GROUP_TITLES",
    "LADDER",
    "LADDER_COLUMNS",
    "ORDERING",
    "ORDERING_STUDY",
    "RUNGS",
    "RUNG_COLUMNS",
    "Rung",
    "climb",
    "number_of_entries",
    "print_ladder",
    "print_ordering",
    "read_ladder",
    "summarize_ladder",
    "write_ladder",
]

EVERY_BIT_DEPTH = list(range(1, 17))


class Rung(NamedTuple):
    """One step of the ladder.

    Attributes:
        label: its name in table and figure.
        group: ``"paper"``, ``"alone"`` (one ingredient in place of the paper's), ``"ladder"``
            (each with all above it), ``"without"`` (everything but one).
        agent: of :func:`agents.make`.
        env_kwargs: environment arguments over the agent's own.
    """

    label: str
    group: str
    agent: str
    env_kwargs: Mapping[str, Any]


def _rungs() -> tuple[Rung, ...]:
    bare = {"coder": "closed_loop", "rotation": False, "sent_scale": False, "same_step_refinement": False}
    rungs = [
        Rung("look-ahead", "paper", "lookahead", {}),
        Rung("look-ahead, literal", "paper", "lookahead-literal", {}),
        Rung("look-ahead, tight", "paper", "lookahead-tight", {}),
        Rung("exact law of the latency", "alone", "lookahead", {"latency_model": "exact"}),
        Rung("all bit depths", "alone", "lookahead", {"bit_depths": EVERY_BIT_DEPTH}),
        Rung("closed-loop coder", "alone", "lookahead-closed-loop", {}),
        Rung("DP, with the paper's model", "alone", "dp", {"coder": "forward"}),
    ]
    steps: list[tuple[str, str, dict[str, Any]]] = [
        ("closed-loop coder and DP", "dp", dict(bare)),
        ("rotation", "dp", {"rotation": True}),
        ("sent scale", "dp", {"sent_scale": True}),
        ("measured moments", "dp", {"moments": "measured"}),
        ("same-step refinement", "dp", {"same_step_refinement": True}),
        ("current rate known", "dp-current-rate", {}),
        ("all bit depths", "dp-current-rate", {"bit_depths": EVERY_BIT_DEPTH}),
        ("entropy coding", "dp-current-rate", {"entropy_coding": True}),
        ("posterior mean", "dp-current-rate", {"payload": "posterior_mean"}),
    ]
    kwargs: dict[str, Any] = {}
    for label, agent, change in steps:
        kwargs = {**kwargs, **change}
        rungs.append(Rung(f"+ {label}", "ladder", agent, kwargs))
    full = kwargs
    without: list[tuple[str, str, dict[str, Any]]] = [
        ("rotation", "dp-current-rate", {"rotation": False, "entropy_coding": False}),
        ("sent scale", "dp-current-rate", {"sent_scale": False, "entropy_coding": False}),
        ("measured moments", "dp-current-rate", {"moments": "model"}),
        ("same-step refinement", "dp-current-rate", {"same_step_refinement": False}),
        ("current rate known", "dp", {}),
        ("all bit depths", "dp-current-rate", {"bit_depths": None}),
        ("entropy coding", "dp-current-rate", {"entropy_coding": False}),
        ("posterior mean", "dp-current-rate", {"payload": "latent"}),
        ("DP (look-ahead instead)", "lookahead-closed-loop", {}),
    ]
    for label, agent, change in without:
        own = {key: value for key, value in {**full, **change}.items() if value is not None}
        rungs.append(Rung(f"− {label}", "without", agent, own))
    return tuple(rungs)


RUNGS = _rungs()
"""All steps; the first is what gains are measured against."""


def _ordering() -> tuple[Rung, ...]:
    system = {"coder": "closed_loop"}
    names = ["lookahead", "lookahead-tight", *(f"persistent-q{bits}" for bits in PAPER_BIT_DEPTHS), "final-only"]
    return (
        Rung("dp", "paper", "dp", system),
        Rung("dp-current-rate", "paper", "dp-current-rate", system),
        Rung("dp-inferred", "paper", "dp-inferred", system),
        *(Rung(name, "paper", name, system) for name in names),
        Rung("random", "paper", "random", system),
    )


ORDERING = _ordering()
"""All policies on one system, the closed-loop coder's, against the optimum, which is the first."""

_GAIN = ("gain", "gain_low", "gain_high")
_BOUND_RATIO = ("bound_ratio", "bound_ratio_low", "bound_ratio_high")
_RUNG_NAMES = dict.fromkeys(("rung", "group", "agent"), str)

LADDER_COLUMNS: dict[str, type] = {
    **_RUNG_NAMES,
    "snr_db": float,
    "episodes": int,
    **dict.fromkeys(("latent_mse", "ci_low", "ci_high", *_GAIN, "bound", *_BOUND_RATIO), float),
}
"""Columns of ``ladder.csv``: per rung and SNR the mean latent MSE, what the first rung's mean is times it (``gain``),
the clairvoyant's mean on the same system (``bound``) and the ratio of the two, each with a 95 % interval of the paired
bootstrap."""

RUNG_COLUMNS: dict[str, type] = {
    **_RUNG_NAMES,
    "env_kwargs": str,
    **dict.fromkeys((*_GAIN, "bound_gain", *_BOUND_RATIO), float),
}
"""Columns of ``rungs.csv``: geometric means of these over the SNRs; ``bound_gain`` is the bound's gain."""

BOUND_COLUMNS = ("bound", "bound_gain", *_BOUND_RATIO)
"""Columns that are empty for the paper's coder, which has no bound."""

_EPISODE_COLUMNS = {"rung": str, **EPISODE_COLUMNS}


def climb(
    snrs_db: Sequence[float],
    *,
    episodes: int,
    seed: int,
    env_kwargs: Mapping[str, Any],
    rungs: Sequence[Rung] = RUNGS,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Table:
    """Episodes of every rung, and of the bound under it, at every SNR on common draws.

    Args:
        snrs_db: mean SNRs [dB].
        episodes: how many to play for each rung and SNR.
        seed: seed of the evaluation.
        env_kwargs: environment arguments; those of a rung come on top.
        rungs: the rungs to play.
        workers: see :func:`refine_env.evaluation.roll_out_many`.
        progress: called with the number of episodes that have just ended.

    Returns:
        Rows of :data:`refine_env.evaluation.EPISODE_COLUMNS` with the column ``rung``; that of a bound is
        ``"clairvoyant: …"`` with the first rung that runs on the bound's system.
    """
    played = [(rung.label, rung.agent, {**env_kwargs, **_kwargs(rung)}) for rung in rungs]
    played += [(label, "clairvoyant", kwargs) for label, kwargs in bounds(rungs, env_kwargs).items()]
    found: dict[tuple[str, float], Table] = {}
    # One SNR after the other: the tables of all optimal policies at one SNR fit in memory, those at all SNRs do not.
    for snr_db in snrs_db:
        entries = [
            Entry(partial(agents.make, agent, neglect_errors=True), {**kwargs, "snr_db": float(snr_db)})
            for _, agent, kwargs in played
        ]
        tables = roll_out_many(entries, episodes=episodes, seed=seed, workers=workers, progress=progress)
        found |= {(label, snr_db): table for (label, _, _), table in zip(played, tables, strict=True)}
    return [{"rung": label, **row} for label, _, _ in played for snr_db in snrs_db for row in found[label, snr_db]]


def number_of_entries(snrs_db: Sequence[float], env_kwargs: Mapping[str, Any], rungs: Sequence[Rung] = RUNGS) -> int:
    """How many policy–SNR pairs :func:`climb` plays."""
    return (len(rungs) + len(bounds(rungs, env_kwargs))) * len(snrs_db)


def bounds(rungs: Sequence[Rung], env_kwargs: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Environment arguments of the clairvoyant bounds, by label: one for each distinct system among the rungs.

    Not of the paper's coder: its model neglects the device's error, so a plan that trusts it is no bound.
    """
    found: dict[str, dict[str, Any]] = {}
    for rung in rungs:
        label = bound_label(rung, rungs)
        if label is not None and label not in found:
            found[label] = {**env_kwargs, **_kwargs(rung)}
    return found


def bound_label(rung: Rung, rungs: Sequence[Rung]) -> str | None:
    """The label of the bound on a rung's system, named after the first rung on that system; None without a bound."""
    if _kwargs(rung)["coder"] == "forward":
        return None
    first = next(other for other in rungs if _system(other) == _system(rung))
    return f"clairvoyant: {first.group}: {first.label}"


def _kwargs(rung: Rung) -> dict[str, Any]:
    return {**agents.env_kwargs(rung.agent), **rung.env_kwargs}


def _system(rung: Rung) -> str:
    kwargs = _kwargs(rung)
    kwargs.pop("latency_model", None)  # only the look-ahead uses it, so it does not change the bound
    return json.dumps(kwargs, sort_keys=True)


def summarize_ladder(table: Table, rungs: Sequence[Rung] = RUNGS) -> tuple[Table, Table]:
    """Means, gains and distances from the bound, each with a 95 % interval of the bootstrap over paired episodes.

    Args:
        table: rows that :func:`climb` made.
        rungs: the rungs that it has.

    Returns:
        Rows of :data:`LADDER_COLUMNS` per rung and SNR, and rows of :data:`RUNG_COLUMNS` per rung.
    """
    means = resample(table, ("rung", "snr_db"), "latent_mse")
    counts = Counter((row["rung"], row["snr_db"]) for row in table)
    snrs_db = list(dict.fromkeys(row["snr_db"] for row in table))
    cells, totals = [], []
    for rung in rungs:
        names = {"rung": rung.label, "group": rung.group, "agent": rung.agent}
        bound = bound_label(rung, rungs)
        logs: dict[str, NDArray[np.float64]] = {}
        for snr_db in snrs_db:
            own, first = means[rung.label, snr_db], means[rungs[0].label, snr_db]
            ratios = {"gain": first / own}
            best = None if bound is None else means[bound, snr_db]
            if best is not None:
                ratios |= {"bound_gain": first / best, "bound_ratio": own / best}
            low, high = np.quantile(own[1:], [0.025, 0.975])
            logs = {name: logs.get(name, 0.0) + np.log(ratio) / len(snrs_db) for name, ratio in ratios.items()}
            cells.append(
                {
                    **names,
                    "snr_db": snr_db,
                    "episodes": counts[rung.label, snr_db],
                    "latent_mse": float(own[0] - MSE_FLOOR),
                    "ci_low": float(low - MSE_FLOOR),
                    "ci_high": float(high - MSE_FLOOR),
                    **interval("gain", ratios["gain"]),
                    "bound": None if best is None else float(best[0] - MSE_FLOOR),
                    **interval("bound_ratio", ratios.get("bound_ratio")),
                }
            )
        totals.append(
            {
                **names,
                "env_kwargs": json.dumps(dict(rung.env_kwargs)),
                **interval("gain", np.exp(logs["gain"])),
                "bound_gain": float(np.exp(logs["bound_gain"][0])) if "bound_gain" in logs else None,
                **interval("bound_ratio", np.exp(logs["bound_ratio"]) if "bound_ratio" in logs else None),
            }
        )
    return cells, totals


def write_ladder(table: Table, folder: Path, rungs: Sequence[Rung] = RUNGS) -> tuple[list[Path], Table, Table]:
    """Write ``episodes.csv``, ``ladder.csv`` and ``rungs.csv``.

    Returns:
        Their paths, and the two summaries.
    """
    cells, totals = summarize_ladder(table, rungs)
    tables = {
        "episodes.csv": (table, _EPISODE_COLUMNS),
        "ladder.csv": (cells, LADDER_COLUMNS),
        "rungs.csv": (totals, RUNG_COLUMNS),
    }
    return write_tables(folder, tables), cells, totals


def read_ladder(folder: Path) -> tuple[Table, Table]:
    """Read ``ladder.csv`` and ``rungs.csv``, as :func:`write_ladder` wrote them.

    Returns:
        Rows of :data:`LADDER_COLUMNS`, and rows of :data:`RUNG_COLUMNS`.

    Raises:
        ConfigurationError: if a file is missing, or not such a table.
    """
    command = "python -m agents.evaluate --study ladder"
    cells = read_table(folder / "ladder.csv", LADDER_COLUMNS, optional=BOUND_COLUMNS, command=command)
    return cells, read_table(folder / "rungs.csv", RUNG_COLUMNS, optional=BOUND_COLUMNS, command=command)


GROUP_TITLES = {
    "paper": "the paper",
    "alone": "one ingredient alone",
    "ladder": "one after the other",
    "without": "all of them but one",
}
"""What the groups of rungs are called in table and figure."""


def print_ladder(totals: Table) -> None:
    """The rungs on the terminal, within 80 columns."""
    lines = []
    for title, rows in itertools.groupby(totals, key=lambda row: GROUP_TITLES[row["group"]]):
        lines.append([f"[dim]{title}[/dim]"])
        lines += [
            [
                row["rung"],
                f"{row['gain']:.2f} [dim]{row['gain_low']:.2f} … {row['gain_high']:.2f}[/dim]",
                *("–" if row[name] is None else f"{row[name]:.2f}" for name in ("bound_gain", "bound_ratio")),
            ]
            for row in rows
        ]
    print_table(
        {"rung": "left", "gain": "right", "bound": "right", "above bound": "right"},
        lines,
        title="gain over the paper's look-ahead, geometric mean over the SNRs",
        notes=["bound: the gain of the clairvoyant on the same coder, payload and bit depths. Dim: 95 % intervals."],
    )


def print_ordering(cells: Table) -> None:
    """What every policy's latent MSE is times the first rung's, and the first's times the bound's, at every SNR."""
    first = cells[0]["rung"]
    snrs_db = list(dict.fromkeys(row["snr_db"] for row in cells))
    lines = []

    def show(ratio: float, low: float, high: float) -> str:
        return (
            f"{ratio:.2e}" if ratio >= 1e3 or ratio < 1e-2 else f"{ratio:.3g}" + (" =" if low <= 1.0 <= high else "  ")
        )

    for label in dict.fromkeys(row["rung"] for row in cells):
        rows = [row for row in cells if row["rung"] == label]
        # Shown is the bound over the first rung, and every other rung over the first: inverses of two columns.
        name = "bound_ratio" if label == first else "gain"
        shown = (show(1.0 / row[name], 1.0 / row[f"{name}_high"], 1.0 / row[f"{name}_low"]) for row in rows)
        lines.append(["clairvoyant" if label == first else label, *shown])
    print_table(
        {"SNR [dB]": "left", **{f"{snr_db:g}": "right" for snr_db in snrs_db}},
        lines,
        title=f"latent MSE over that of {first}",
        notes=["=: the 95 % interval, which is in ladder.csv, holds 1."],
        least_width=max(80, 22 + 11 * len(snrs_db)),
    )


def _run(
    request: Request, name: str, rungs: Sequence[Rung], show: Callable[[Table, Table], None]
) -> tuple[list[Path], dict[str, Any]]:
    """Play, write and show one of the studies of rungs."""
    number = number_of_entries(request.snrs_db, request.env_kwargs, rungs) * request.episodes
    with request.progress(number, name) as progress:
        table = climb(
            request.snrs_db,
            episodes=request.episodes,
            seed=request.seed,
            env_kwargs=request.env_kwargs,
            rungs=rungs,
            workers=request.workers,
            progress=progress,
        )
    written, cells, totals = write_ladder(table, request.out, rungs)
    show(cells, totals)
    return written, {"rungs": [rung._asdict() for rung in rungs]}


LADDER = Study(
    "ladder",
    "from the paper's policy on to the optimum",
    tuple(map(float, range(16))),
    300,
    lambda request: _run(request, "ladder", RUNGS, lambda cells, totals: print_ladder(totals)),
)
ORDERING_STUDY = Study(
    "ordering",
    "all policies on one coder",
    tuple(map(float, range(0, 25, 3))),
    300,
    lambda request: _run(request, "ordering", ORDERING, lambda cells, totals: print_ordering(cells)),
    has_figure=False,
)
