"""The scores: which policy each of them calls better, and how far they agree with the latent MSE at the deadline.

``python -m agents.evaluate --study scores`` plays the paper's policies and the optimum on the same draws and scores
each episode by what the device holds at the deadline (latent MSE, PSNR, SSIM, LPIPS), by what it showed on the way
(anytime MSE), and by whether a machine recognizes in it what it does in the clean image (task; of a radio map, whether
the same places are covered). At every SNR a score
puts the policies in an order; Kendall's τ and Spearman's ρ say how far that is the order by latent MSE.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import typer
from numpy.typing import NDArray

import agents
from agents.studies.base import Request, Study
from agents.studies.images import ImageScorer, open_decoder, open_metrics
from refine_env import CacheError, ConfigurationError, MissingExtraError, TrajectoryCache
from refine_env.config import PAPER_BIT_DEPTHS
from refine_env.evaluation import (
    Entry,
    Score,
    Table,
    bootstrap_interval,
    episode_columns,
    percentile_interval,
    read_table,
    resampled_means,
    roll_out_many,
    write_table,
)
from refine_env.metrics import METRICS, gallery_path
from refine_env.render.decoder import scale_of

__all__ = [
    "AGREEMENT_COLUMNS",
    "MEAN_COLUMNS",
    "POLICIES",
    "REFERENCE",
    "SCORES",
    "SCORES_STUDY",
    "Criterion",
    "measure_agreement",
    "read_scores",
    "summarize_scores",
]


class Criterion(NamedTuple):
    """A score by which policies can be put in an order.

    Attributes:
        label: its name in table and figure.
        sign: 1 where less is better, −1 where more is.
    """

    label: str
    sign: int


REFERENCE = "latent_mse"
SCORES: dict[str, Criterion] = {
    REFERENCE: Criterion("latent MSE", 1),
    "anytime_mse": Criterion("anytime MSE", 1),
    "psnr_db": Criterion("PSNR", -1),
    "ssim": Criterion("SSIM", -1),
    "lpips": Criterion("LPIPS", 1),
    "task_glyph": Criterion("task: glyph", -1),
    "task_group": Criterion("task: group", -1),
    "task_coverage": Criterion("task: coverage", -1),
    "task_transmitter": Criterion("task: transmitter", -1),
    "task_truth": Criterion("task: coverage of the truth", -1),
}
"""The scores by their columns; the first is the one that the others are compared with."""

_PLAYED = (
    "lookahead",
    *(f"persistent-q{bits}" for bits in PAPER_BIT_DEPTHS),
    "final-only",
    "dp",
    "dp-final",
    "dp-anytime",
)
POLICIES = tuple(name for name in _PLAYED if name in agents.names())
"""The policies of the paper's comparison and the optima, as far as there are such."""

RESAMPLES = 500
_ENDS = ("", "_low", "_high")

MEAN_COLUMNS: dict[str, type] = {
    **dict.fromkeys(("agent", "coder", "payload"), str),
    "snr_db": float,
    "episodes": int,
    **{name + end: float for name in SCORES for end in _ENDS},
}
"""Columns of ``scores.csv``: every score's mean by policy and SNR, with a 95 % bootstrap interval; empty where the
score was not to be had."""

_COEFFICIENTS = ("kendall_tau", "spearman_rho")
AGREEMENT_COLUMNS: dict[str, type] = {
    "score": str,
    "snr_db": float,
    "policies": int,
    **{name + end: float for name in _COEFFICIENTS for end in _ENDS},
}
"""Columns of ``agreement.csv``: how far the order of the policies by a score is that by latent MSE, with 95 % intervals
of the bootstrap over paired episodes; an empty ``snr_db`` is the mean over the SNRs. A coefficient is empty where one
of the two scores puts all policies on a level."""

_OPTIONAL_MEANS = tuple(name + end for name in SCORES for end in _ENDS)
_OPTIONAL_AGREEMENT = ("snr_db", *(name + end for name in _COEFFICIENTS for end in _ENDS))


def open_image_scores(cache_name: str, say: Callable[[str], None]) -> ImageScorer | None:
    """What scores decoded images, as far as it can be had on this machine; one sentence says what cannot, and why.

    Args:
        cache_name: name or folder of a trajectory cache.
        say: is given the sentences.
    """
    cache = TrajectoryCache.open(cache_name)
    try:
        decoder = open_decoder(cache)
    except (MissingExtraError, ConfigurationError, CacheError) as error:
        say(f"No scores of images: {error}")
        return None
    names, gallery = list(METRICS), gallery_path(decoder.folder)
    if scale_of(decoder) is None and not gallery.is_file():
        names.remove("task")
        say(f"No task: there is no gallery of the model's glyphs at {gallery}.")
    metrics, missing = open_metrics(names, gallery=gallery, scale=scale_of(decoder))
    for sentence in missing:
        say(sentence)
    return ImageScorer(cache, decoder, metrics)


def play_scores(
    snrs_db: Sequence[float],
    *,
    episodes: int,
    seed: int,
    env_kwargs: Mapping[str, Any],
    policies: Sequence[str],
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
    score: Score | None = None,
) -> Table:
    """Episodes of every policy at every SNR on common draws, with all scores.

    Args:
        snrs_db: mean SNRs [dB].
        episodes: how many to play for each policy and SNR.
        seed: seed of the evaluation.
        env_kwargs: environment arguments; those that a policy is made for come on top.
        policies: names of the policies.
        workers, progress, score: see :func:`refine_env.evaluation.roll_out_many`.
    """
    table: Table = []
    for snr_db in snrs_db:  # one after the other: the optimal policies' tables need not fit in memory all at once
        entries = [
            Entry(partial(agents.make, name), {**env_kwargs, **agents.env_kwargs(name), "snr_db": float(snr_db)})
            for name in policies
        ]
        tables = roll_out_many(
            entries, episodes=episodes, seed=seed, workers=workers, progress=progress, score=score, anytime=True
        )
        table += [row for own in tables for row in own]
    return table


def _values(table: Table) -> dict[tuple[str, float], Table]:
    """Rows by policy and SNR."""
    found: dict[tuple[str, float], Table] = {}
    for row in table:
        found.setdefault((row["agent"], row["snr_db"]), []).append(row)
    return found


def _column(rows: Table, name: str) -> NDArray[np.float64] | None:
    """A score's values (episodes,); None where it was not to be had."""
    if any(row.get(name) is None for row in rows):
        return None
    return np.array([row[name] for row in rows], dtype=np.float64)


def summarize_scores(table: Table) -> Table:
    """Every score's mean by policy and SNR.

    Args:
        table: rows that :func:`play_scores` made.

    Returns:
        Rows of :data:`MEAN_COLUMNS`.
    """
    cells: Table = []
    for (agent, snr_db), rows in _values(table).items():
        cell: dict[str, Any] = {
            "agent": agent,
            "coder": rows[0]["coder"],
            "payload": rows[0]["payload"],
            "snr_db": snr_db,
            "episodes": len(rows),
        }
        for name in SCORES:
            values = _column(rows, name)
            given = (None,) * 3 if values is None else (float(values.mean()), *bootstrap_interval(values))
            cell |= {name + end: value for end, value in zip(_ENDS, given, strict=True)}
        cells.append(cell)
    return cells


def _coefficients(one: NDArray[np.float64], other: NDArray[np.float64]) -> tuple[float, float]:
    """Kendall's τ_b and Spearman's ρ of two scores of the policies; NaN where one of them is constant."""
    from scipy import stats  # here, since importing it takes as long as all else of the command

    if np.ptp(one) == 0.0 or np.ptp(other) == 0.0:
        return math.nan, math.nan
    return float(stats.kendalltau(one, other).statistic), float(stats.spearmanr(one, other).statistic)


def measure_agreement(table: Table, resamples: int = RESAMPLES) -> Table:
    """How far the order of the policies by each score is that by latent MSE, at every SNR and in the mean over them.

    A tie in one of the two orders alone counts as neither agreement nor disagreement (τ_b): a score that can no longer
    tell policies apart agrees the less.

    Args:
        table: rows that :func:`play_scores` made.
        resamples: bootstrap replicates; all policies and SNRs are resampled alike, since their draws are common.

    Returns:
        Rows of :data:`AGREEMENT_COLUMNS`.
    """
    cells = _values(table)
    policies = list(dict.fromkeys(policy for policy, _ in cells))
    snrs_db = list(dict.fromkeys(snr_db for _, snr_db in cells))

    def means(name: str, snr_db: float) -> NDArray[np.float64] | None:
        """The means, then those of the resamples, with less always better, (1 + resamples, policies)."""
        columns = [_column(cells[policy, snr_db], name) for policy in policies]
        known = [values for values in columns if values is not None]
        if len(known) < len(columns):
            return None
        resampled = [np.append(values.mean(), resampled_means(values, resamples=resamples)) for values in known]
        return SCORES[name].sign * np.stack(resampled, axis=1)

    references = {snr_db: means(REFERENCE, snr_db) for snr_db in snrs_db}
    rows: Table = []
    for name in SCORES:
        found: list[NDArray[np.float64]] = []
        for snr_db in snrs_db:
            own, reference = means(name, snr_db), references[snr_db]
            if name == REFERENCE or own is None or reference is None:
                continue
            found.append(np.array([_coefficients(*pair) for pair in zip(own, reference, strict=True)]))
            rows.append(_agreement_row(name, snr_db, len(policies), found[-1]))
        defined = [values for values in found if not np.isnan(values[0]).any()]
        if len(found) > 1 and defined:
            # A resample in which all policies are on a level at an SNR says nothing of that SNR.
            together = np.ma.masked_invalid(np.stack(defined)).mean(axis=0).filled(math.nan)
            rows.append(_agreement_row(name, None, len(policies), together))
    return rows


def _agreement_row(name: str, snr_db: float | None, policies: int, values: NDArray[np.float64]) -> dict[str, Any]:
    """A row of :data:`AGREEMENT_COLUMNS`: of the coefficients (1 + resamples, 2) the first are those measured."""
    row: dict[str, Any] = {"score": name, "snr_db": snr_db, "policies": policies}
    for coefficient, column in zip(_COEFFICIENTS, values.T, strict=True):
        resampled = column[1:][~np.isnan(column[1:])]
        known = not math.isnan(column[0]) and resampled.size > 0
        given = (float(column[0]), *percentile_interval(resampled)) if known else (None,) * 3
        row |= {coefficient + end: value for end, value in zip(_ENDS, given, strict=True)}
    return row


def read_scores(folder: Path) -> tuple[Table, Table]:
    """Read ``scores.csv`` and ``agreement.csv``.

    Returns:
        Rows of :data:`MEAN_COLUMNS`, and rows of :data:`AGREEMENT_COLUMNS`.

    Raises:
        ConfigurationError: if a file is missing, or not such a table.
    """
    command = "python -m agents.evaluate --study scores"
    means = read_table(folder / "scores.csv", MEAN_COLUMNS, optional=_OPTIONAL_MEANS, command=command)
    return means, read_table(folder / "agreement.csv", AGREEMENT_COLUMNS, optional=_OPTIONAL_AGREEMENT, command=command)


def print_agreement(rows: Table) -> None:
    """Kendall's τ on the terminal: a line for each SNR, a column for each score."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    names = list(dict.fromkeys(row["score"] for row in rows))
    view = RichTable(title="Kendall's τ between the order by a score and that by latent MSE", box=box.SIMPLE_HEAD)
    view.add_column("SNR [dB]", justify="right")
    for name in names:
        view.add_column(SCORES[name].label, justify="right", no_wrap=True)
    for snr_db in dict.fromkeys(row["snr_db"] for row in rows):
        cells = {row["score"]: row for row in rows if row["snr_db"] == snr_db}
        view.add_row("mean" if snr_db is None else f"{snr_db:g}", *(_show(cells.get(name)) for name in names))
    console = Console()
    console.print(view)
    console.print("Second line: 95 % bootstrap interval over paired episodes.", style="dim")


def _show(row: Mapping[str, Any] | None) -> str:
    if row is None or row["kendall_tau"] is None:
        return "–"
    return f"{row['kendall_tau']:.2f}\n[dim]{row['kendall_tau_low']:.2f}…{row['kendall_tau_high']:.2f}[/dim]"


def _run(request: Request) -> tuple[list[Path], dict[str, Any]]:
    """Play, write and show the study."""
    scorer = open_image_scores(str(request.env_kwargs["cache"]), typer.echo)
    with request.progress(len(POLICIES) * len(request.snrs_db) * request.episodes, "scores") as progress:
        table = play_scores(
            request.snrs_db,
            episodes=request.episodes,
            seed=request.seed,
            env_kwargs=request.env_kwargs,
            policies=POLICIES,
            workers=request.workers,
            progress=progress,
            score=scorer,
        )
    agreement = measure_agreement(table)
    tables: tuple[tuple[str, Table, dict[str, type]], ...] = (
        ("episodes.csv", table, episode_columns(table)),
        ("scores.csv", summarize_scores(table), MEAN_COLUMNS),
        ("agreement.csv", agreement, AGREEMENT_COLUMNS),
    )
    for name, rows, columns in tables:
        write_table(request.out / name, rows, columns)
    print_agreement(agreement)
    return [request.out / name for name, *_ in tables], {"policies": list(POLICIES), "resamples": RESAMPLES}


SCORES_STUDY = Study(
    "scores",
    "which policy is better by which score",
    tuple(map(float, range(0, 19, 3))),
    100,
    _run,
)
