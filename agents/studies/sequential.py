"""What progressive refinement is worth against computing first and sending then, done well.

``python -m agents.evaluate --study sequential`` plays sequential schemes (x_0 at one bit depth, at an adaptive one, at
the best ones), generation in few steps by deterministic samplers, and the progressive policies, on common draws.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import agents
from agents.studies.base import Request, Study, write_tables
from agents.studies.few_steps import SAMPLERS, few_step_cache
from agents.studies.paired import Resampled, interval, mean_and_interval, resample
from refine_env import TrajectoryCache
from refine_env.coding import LOSSLESS_BITS
from refine_env.commands import print_table
from refine_env.config import PAPER_BIT_DEPTHS
from refine_env.evaluation import EPISODE_COLUMNS, Entry, Table, read_table

__all__ = [
    "CURVE_COLUMNS",
    "FEW_STEPS",
    "GAIN_COLUMNS",
    "REFERENCE_STEPS",
    "SEQUENTIAL",
    "Curve",
    "ReferenceScorer",
    "curves",
    "read_sequential",
    "summarize_sequential",
]

FEW_STEPS = (5, 10, 20, 25, 50)
"""T′, the numbers of steps in which the deterministic samplers generate; the last one is the paper's T."""

REFERENCE_STEPS = (50, 200)
"""Steps of the same sampler from the same x_T, whose x_0 is what a device is to show."""

_FIXED = ("final-only", *(f"final-q{bits}" for bits in PAPER_BIT_DEPTHS if bits != LOSSLESS_BITS))
_ADAPTIVE = {"forward": "final-adaptive", "closed_loop": "final-adaptive-closed-loop"}
_REFERENCES = tuple(f"mse_{steps}" for steps in REFERENCE_STEPS)
_KEYS = ("sampler", "steps", "agent", "coder", "snr_db")
_SCORES = ("latent_mse", *_REFERENCES)


class Curve(NamedTuple):
    """A policy in a system.

    Attributes:
        sampler: how the trajectories were generated.
        steps: in how many steps, T.
        agent: of :func:`agents.make`.
        coder: the refinement coder.
    """

    sampler: str
    steps: int
    agent: str
    coder: str


def curves(own_sampler: str, num_steps: int) -> list[Curve]:
    """All that is played: on a cache's own trajectories, and on those of few steps.

    Args:
        own_sampler: the sampler that generated the cache.
        num_steps: its T.
    """
    forward = ["lookahead", *_FIXED, _ADAPTIVE["forward"]]
    closed_loop = ["dp", "dp-final", "lookahead-closed-loop", *_FIXED, _ADAPTIVE["closed_loop"]]
    own = [Curve(own_sampler, num_steps, agent, "forward") for agent in forward]
    own += [Curve(own_sampler, num_steps, agent, "closed_loop") for agent in closed_loop]
    few = ["lookahead-closed-loop", "final-adaptive-closed-loop", "dp-final", "dp"]
    return own + [
        Curve(sampler, steps, agent, "closed_loop") for sampler in SAMPLERS for steps in FEW_STEPS for agent in few
    ]


class ReferenceScorer:
    """Scores what the devices hold at the deadline against the x_0 of other caches, trajectory by trajectory.

    A :data:`refine_env.evaluation.Score`.

    Args:
        references: a cache for each column.
    """

    def __init__(self, references: Mapping[str, TrajectoryCache]) -> None:
        self._clean = {
            name: np.stack([cache.latents(index)[0].reshape(-1) for index in range(len(cache))]).astype(np.float32)
            for name, cache in references.items()
        }

    def __call__(self, rows: Table, latents: NDArray[np.float32]) -> list[dict[str, float]]:
        """(1/M) ‖ŷ − x_0‖² of every row, by column.

        Args:
            rows: one row for each episode.
            latents: what each device holds at the deadline, float32 (len(rows), M).
        """
        trajectories = [row["trajectory"] for row in rows]
        columns = {
            name: np.square(latents - clean[trajectories], dtype=np.float64).mean(axis=1).tolist()
            for name, clean in self._clean.items()
        }
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


CURVE_COLUMNS: dict[str, type] = {
    **dict(zip(_KEYS, (str, int, str, str, float), strict=True)),
    "episodes": int,
    **{name + end: float for name in _SCORES for end in ("", "_low", "_high")},
}
"""Columns of ``sequential.csv``: per sampler, number of steps, policy, coder and SNR the mean MSE at the deadline, with
a 95 % interval of the bootstrap: against the trajectory's own x_0 (``latent_mse``), and against the x_0 of 50 and of
200 steps of the same sampler from the same x_T (empty for a sampler that is not deterministic)."""

GAIN_COLUMNS: dict[str, type] = {
    "gain": str,
    "snr_db": float,
    "score": str,
    "over": str,
    "under": str,
    **dict.fromkeys(("ratio", "ratio_low", "ratio_high"), float),
}
"""Columns of ``gains.csv``: the mean score of one curve (``over``) divided by that of another (``under``), with a 95 %
interval of the paired bootstrap."""

_OPTIONAL = tuple(name + end for name in _REFERENCES for end in ("", "_low", "_high"))

GAINS = {
    "adaptive rate": (("final-only", "forward"), ("final-adaptive", "forward")),
    "progressiveness, paper's coder": (("final-adaptive", "forward"), ("lookahead", "forward")),
    "closed-loop coder": (("final-adaptive", "forward"), ("final-adaptive-closed-loop", "closed_loop")),
    "best sequential schedule": (("final-adaptive-closed-loop", "closed_loop"), ("dp-final", "closed_loop")),
    "progressiveness": (("dp-final", "closed_loop"), ("dp", "closed_loop")),
    "dp over final-adaptive": (("final-adaptive-closed-loop", "closed_loop"), ("dp", "closed_loop")),
    "all of it": (("final-only", "forward"), ("dp", "closed_loop")),
}
"""What each ingredient is worth on the cache's own trajectories: the scheme without it, and the scheme with it."""


def _play(request: Request, progress: Callable[[int], None]) -> tuple[Table, list[Curve]]:
    """Episodes of every curve at every SNR, on the same prompts, initial noise and channels."""
    origin = TrajectoryCache.open(str(request.env_kwargs["cache"]))
    own = _sampler_of(origin)
    chosen = curves(own, origin.num_steps)
    made = {(s, steps): few_step_cache(origin, s, steps) for s in SAMPLERS for steps in {*FEW_STEPS, *REFERENCE_STEPS}}
    table: Table = []
    for sampler in (own, *SAMPLERS):
        score = None
        if sampler in SAMPLERS:
            score = ReferenceScorer({f"mse_{steps}": made[sampler, steps] for steps in REFERENCE_STEPS})
        played = [curve for curve in chosen if curve.sampler == sampler]
        for snr_db in request.snrs_db:
            entries = []
            for curve in played:
                kwargs = {**request.env_kwargs, "coder": curve.coder, "snr_db": snr_db}
                if sampler in SAMPLERS:
                    kwargs["cache"] = str(made[sampler, curve.steps].path)
                entries.append(Entry(partial(agents.make, curve.agent), kwargs))
            tables = request.roll_out(entries, progress, score)
            for curve, rows in zip(played, tables, strict=True):
                names = {"sampler": curve.sampler, "steps": curve.steps}
                table += [{**dict.fromkeys(_REFERENCES), **row, **names} for row in rows]
    return table, chosen


def _sampler_of(cache: TrajectoryCache) -> str:
    """What generated a cache, for the tables: ``ddpm``, or the scheduler's class, or the source."""
    scheduler = cache.manifest.recipe.scheduler
    if scheduler is None:
        return cache.manifest.recipe.source
    return "ddpm" if scheduler["class"] == "DDPMScheduler" else str(scheduler["class"])


def summarize_sequential(table: Table) -> tuple[Table, Table]:
    """Means of every curve, and what each ingredient is worth, with 95 % intervals of the paired bootstrap.

    Args:
        table: rows of episodes with the columns ``sampler`` and ``steps``.

    Returns:
        Rows of :data:`CURVE_COLUMNS`, and rows of :data:`GAIN_COLUMNS`.
    """
    scores = {name: resample(table, _KEYS, name) for name in _SCORES}
    counts = Counter(tuple(row[key] for key in _KEYS) for row in table)
    cells: Table = []
    for group, count in counts.items():
        cells.append({**dict(zip(_KEYS, group, strict=True)), "episodes": count})
        for name in _SCORES:
            cells[-1] |= mean_and_interval(name, scores[name].get(group))
    own = (table[0]["sampler"], table[0]["steps"])
    gains: Table = []
    for snr_db in dict.fromkeys(row["snr_db"] for row in table):
        for gain, score, over, under in _ingredients(own, snr_db, scores):
            ratio = scores[score][*over, snr_db] / scores[score][*under, snr_db]
            names = {"gain": gain, "snr_db": snr_db, "score": score, "over": _label(over), "under": _label(under)}
            gains.append({**names, **interval("ratio", ratio)})
    return cells, gains


def _ingredients(
    own: tuple[str, int], snr_db: float, scores: Mapping[str, Mapping[tuple[Any, ...], Resampled]]
) -> Iterator[tuple[str, str, tuple[Any, ...], tuple[Any, ...]]]:
    """Every ingredient's name and score, and the curve without and the curve with it."""

    def lowest(score: str, options: Iterable[tuple[Any, ...]]) -> tuple[Any, ...]:
        return min(options, key=lambda option: float(scores[score][*option, snr_db][0]))

    for gain, (over, under) in GAINS.items():
        yield gain, "latent_mse", (*own, *over), (*own, *under)
    for coder, adaptive in _ADAPTIVE.items():
        fixed = lowest("latent_mse", ((*own, agent, coder) for agent in _FIXED))
        yield f"adaptive over the best fixed depth, {coder}", "latent_mse", fixed, (*own, adaptive, coder)
    for sampler in SAMPLERS:

        def curve(agent: str, steps: int, sampler: str = sampler) -> tuple[Any, ...]:
            return sampler, steps, agent, "closed_loop"

        # Of a scheme in few steps, the number of steps whose mean is the lowest.
        score, many = _REFERENCES[-1], FEW_STEPS[-1]
        sequential, progressive = (
            lowest(score, [curve(agent, steps) for steps in FEW_STEPS]) for agent in ("dp-final", "dp")
        )
        yield f"fewer steps, sequential, {sampler}", score, curve("dp-final", many), sequential
        yield f"fewer steps, progressive, {sampler}", score, curve("dp", many), progressive
        yield f"progressiveness, each in its best steps, {sampler}", score, sequential, progressive
        yield f"progressive in {many} steps over sequential in few, {sampler}", score, sequential, curve("dp", many)


def _label(curve: Sequence[Any]) -> str:
    sampler, steps, agent, coder = curve
    return f"{agent} ({coder}), {sampler} {steps}"


def read_sequential(folder: Path) -> tuple[Table, Table]:
    """Read ``sequential.csv`` and ``gains.csv``.

    Raises:
        ConfigurationError: if a file is missing, or not such a table.
    """
    command = "python -m agents.evaluate --study sequential"
    cells = read_table(folder / "sequential.csv", CURVE_COLUMNS, optional=_OPTIONAL, command=command)
    return cells, read_table(folder / "gains.csv", GAIN_COLUMNS, command=command)


def _run(request: Request) -> tuple[list[Path], dict[str, Any]]:
    origin = TrajectoryCache.open(str(request.env_kwargs["cache"]))
    number = len(curves("", 0)) * len(request.snrs_db) * request.episodes
    with request.progress(number, "sequential") as progress:
        table, chosen = _play(request, progress)
    cells, gains = summarize_sequential(table)
    columns = {"sampler": str, "steps": int, **EPISODE_COLUMNS, **dict.fromkeys(_REFERENCES, float)}
    tables = {
        "episodes.csv": (table, columns),
        "sequential.csv": (cells, CURVE_COLUMNS),
        "gains.csv": (gains, GAIN_COLUMNS),
    }
    paths = write_tables(request.out, tables)
    snrs_db = list(dict.fromkeys(row["snr_db"] for row in gains))
    print_table(
        {"gain": "left", **{f"{snr_db:g} dB": "right" for snr_db in snrs_db}},
        [
            [gain, *(_shown(next(row for row in gains if (row["gain"], row["snr_db"]) == (gain, s))) for s in snrs_db)]
            for gain in dict.fromkeys(row["gain"] for row in gains)
        ],
        title="MSE without over MSE with each ingredient",
        notes=["=: the 95 % interval, which is in gains.csv, holds 1."],
        least_width=44 + 11 * len(snrs_db),
    )
    return paths, {"curves": [curve._asdict() for curve in chosen], "model": origin.manifest.recipe.model}


def _shown(row: Mapping[str, Any]) -> str:
    return f"{row['ratio']:.3g}{' =' if row['ratio_low'] <= 1.0 <= row['ratio_high'] else ''}"


SEQUENTIAL = Study(
    "sequential",
    "what progressiveness, adaptive rate and fewer steps are worth",
    tuple(map(float, range(0, 25, 3))),
    300,
    _run,
)
