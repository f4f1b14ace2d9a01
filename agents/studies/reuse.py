"""What reuse of midpoints buys on the link: ``python -m agents.evaluate --study reuse``.

Over the reuse ratio, with and without the midpoint at the device: the MSE at the deadline over the SNR, and the least
deadline by which the mean MSE is below a target, so how much sooner the phone has its picture. On an ordinary cache
the midpoint is the trajectory's own, which is reuse at its best; a cache that starts at midpoints has one ratio.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import agents
from agents.studies.base import Request, Study, write_tables
from agents.studies.paired import Resampled, mean_and_interval, resample
from refine_env import ConfigurationError, TrajectoryCache
from refine_env._validation import check_positive
from refine_env.commands import print_table
from refine_env.evaluation import EPISODE_COLUMNS, Entry, Table, read_table
from refine_env.trajectories import Reuse

__all__ = [
    "DEADLINE_COLUMNS",
    "DEADLINE_SNRS_DB",
    "POLICIES",
    "RATIOS",
    "REUSE",
    "REUSE_COLUMNS",
    "START_COLUMNS",
    "TARGET_MSE",
    "Start",
    "intervals",
    "least_deadlines",
    "read_reuse",
    "saved_slots",
    "show_deadline",
    "starts_of",
]

RATIOS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.94, 0.98)
"""R, the part of the steps that is not computed."""

POLICIES = ("lookahead", "dp")
"""What plays, each on the coder that it is made for: the paper's and the closed-loop coder."""

DEADLINE_SNRS_DB = (0.0, 6.0, 12.0)
"""SNRs at which the least deadline is looked for, as far as they are asked for; all that are, if none of these is."""

TARGET_MSE = 1e-2
MOST_SLOTS = 200
"""Deadlines beyond are not tried."""
STRIDE = 5
"""Slots between the first deadlines that are tried."""

_FULL = "full_latent_mse"
_SCORES = ("latent_mse", _FULL)
_KEYS = ("agent", "coder", "ratio", "step", "shared", "snr_db")
START_COLUMNS: dict[str, type] = {
    "agent": str,
    "coder": str,
    "ratio": float,
    "step": int,
    "shared": str,
    "snr_db": float,
}
"""Columns that say what was played: policy, coder, R, m, whether the device has the midpoint, and SNR."""


def intervals(*names: str) -> dict[str, type]:
    """Columns of values with the ends of their intervals."""
    return {name + end: float for name in names for end in ("", "_low", "_high")}


REUSE_COLUMNS: dict[str, type] = {**START_COLUMNS, "deadline": int, "episodes": int, **intervals(*_SCORES)}
"""Columns of ``reuse.csv``: per policy, coder, R, m, whether the device has the midpoint (``yes`` or ``no``) and SNR
the mean latent MSE at the deadline T_d [slots], with a 95 % interval of the bootstrap, and likewise that against the
x_0 of the full run (empty where the cache has none)."""

DEADLINE_COLUMNS: dict[str, type] = {
    **START_COLUMNS,
    "target_mse": float,
    "episodes": int,
    **dict.fromkeys(intervals("deadline", "sooner"), int),
    **intervals(*_SCORES),
}
"""Columns of ``deadline.csv``: the least deadline T_d [slots] at which the mean latent MSE is at most the target;
``deadline_low`` and ``deadline_high`` are those at which the lower and the upper end of its 95 % interval are.
``sooner`` is the least deadline without reuse less this one, empty where that was not played. The scores are those at
that deadline; all is empty where no deadline up to :data:`MOST_SLOTS` will do."""

_OPTIONAL = tuple(intervals("deadline", "sooner", *_SCORES))


class Start(NamedTuple):
    """Where generation starts.

    Attributes:
        ratio: R.
        step: m; T without reuse.
        shared: whether the device has the midpoint.
        env_kwargs: the environment's arguments that say so.
    """

    ratio: float
    step: int
    shared: bool
    env_kwargs: Mapping[str, Any]

    def columns(self) -> dict[str, Any]:
        """What the tables say of it."""
        return {"ratio": self.ratio, "step": self.step, "shared": "yes" if self.shared else "no"}


def starts_of(cache: TrajectoryCache, ratios: tuple[float, ...] | None = None) -> list[Start]:
    """All starts that are played.

    Args:
        cache: the trajectories.
        ratios: R; None: :data:`RATIOS`, or that of a cache that starts at midpoints.

    Raises:
        ConfigurationError: if a ratio is none, or skips no step or all, or the cache says its own.
    """
    reuse = cache.manifest.recipe.reuse
    if reuse is not None:
        if ratios is not None:
            raise ConfigurationError(
                f"`--reuse-ratios` must be left out on a cache whose trajectories start at midpoints, got "
                f"{list(ratios)}: its own is {reuse['ratio']:g}. Leave it out, or choose a cache of full runs."
            )
        ratios = (float(reuse["ratio"]),)
    starts = []
    for ratio in RATIOS if ratios is None else ratios:
        step = cache.num_steps if reuse else Reuse(ratio=ratio, static_prompts=["-"]).step(cache.num_steps)
        if ratio == 0.0:
            starts.append(Start(ratio, step, False, {}))
            continue
        for shared in (False, True):
            starts.append(Start(ratio, step, shared, {"warm_start": {"step": step, "shared": shared}}))  # noqa: PERF401
    return starts


@dataclass(frozen=True, eq=False)
class _Played:
    """Resampled means of the scores at one deadline; that against full runs is None where the cache has none."""

    latent_mse: Resampled
    full_latent_mse: Resampled | None

    @cached_property
    def ends(self) -> list[float]:
        """The mean latent MSE, and the ends of its interval."""
        return [value for value in mean_and_interval("mse", self.latent_mse).values() if value is not None]


def least_deadlines(ends_at: Callable[[int], Sequence[float]], target_mse: float) -> list[int | None]:
    """The least deadlines [slots] at which each of several errors is at most the target; None up to :data:`MOST_SLOTS`.

    They are looked for upwards, since with a policy that gambles on its last message more time may be worse: in strides
    of :data:`STRIDE` slots as long as none is, then one by one.

    Args:
        ends_at: the errors at a deadline.
        target_mse: the target.
    """
    first = 1
    while first + STRIDE <= MOST_SLOTS and min(ends_at(first + STRIDE - 1)) > target_mse:
        first += STRIDE
    found: list[int | None] = [None] * len(ends_at(first))
    for deadline in range(first, MOST_SLOTS + 1):
        for k, error in enumerate(ends_at(deadline)):
            if found[k] is None and error <= target_mse:
                found[k] = deadline
        if None not in found:
            break
    return found


class _Search:
    """The least deadlines of one policy at one start and SNR; what was played once is kept.

    Args:
        request: the episodes.
        policy: its name.
        start: where generation starts.
        snr_db: mean SNR [dB].
        target_mse: the target.
    """

    def __init__(self, request: Request, policy: str, start: Start, snr_db: float, target_mse: float) -> None:
        self._request, self._policy, self._target = request, policy, target_mse
        self._kwargs = {**request.env_kwargs, **agents.env_kwargs(policy), **start.env_kwargs, "snr_db": snr_db}
        self._played: dict[int, _Played] = {}

    def play(self, deadline: int) -> _Played:
        """The scores at a deadline."""
        if deadline not in self._played:
            entry = Entry(partial(agents.make, self._policy), {**self._kwargs, "deadline": deadline})
            (rows,) = self._request.roll_out([entry])
            rows = [{_FULL: None, **row} for row in rows]
            found = [next(iter(resample(rows, (), name).values()), None) for name in _SCORES]
            assert found[0] is not None
            self._played[deadline] = _Played(found[0], found[1])
        return self._played[deadline]

    def row(self) -> dict[str, Any]:
        """The columns of the table that are found by playing."""
        found = least_deadlines(lambda deadline: self.play(deadline).ends, self._target)
        if found[0] is None:
            return dict.fromkeys(intervals("deadline", *_SCORES))
        played = self.play(found[0])
        return {
            **dict(zip(intervals("deadline"), found, strict=True)),
            **mean_and_interval("latent_mse", played.latent_mse),
            **mean_and_interval(_FULL, played.full_latent_mse),
        }


def _play_over_snr(request: Request, starts: list[Start], progress: Callable[[int], None]) -> Table:
    """Episodes of every policy at every start and SNR, on common draws."""
    played = [(policy, start, snr_db) for start in starts for policy in POLICIES for snr_db in request.snrs_db]
    entries = [
        Entry(
            partial(agents.make, policy),
            {**request.env_kwargs, **agents.env_kwargs(policy), **start.env_kwargs, "snr_db": snr_db},
        )
        for policy, start, snr_db in played
    ]
    tables = request.roll_out(entries, progress)
    return [
        {_FULL: None, **row, **start.columns()}
        for (_, start, _), rows in zip(played, tables, strict=True)
        for row in rows
    ]


def _summarize(table: Table, deadline: int) -> Table:
    """Rows of :data:`REUSE_COLUMNS`."""
    scores = {name: resample(table, _KEYS, name) for name in _SCORES}
    counts: dict[tuple[Any, ...], int] = {}
    for row in table:
        key = tuple(row[name] for name in _KEYS)
        counts[key] = counts.get(key, 0) + 1
    return [
        {
            **dict(zip(_KEYS, key, strict=True)),
            "deadline": deadline,
            "episodes": count,
            **{k: v for name in _SCORES for k, v in mean_and_interval(name, scores[name].get(key)).items()},
        }
        for key, count in counts.items()
    ]


def _play_deadlines(
    request: Request, starts: list[Start], snrs_db: list[float], target_mse: float, progress: Callable[[int], None]
) -> Table:
    """Rows of :data:`DEADLINE_COLUMNS`."""
    rows: Table = []
    for policy in POLICIES:
        for snr_db in snrs_db:
            usual = None
            for start in starts:
                found = _Search(request, policy, start, snr_db, target_mse).row()
                if start.ratio == 0.0:
                    usual = found
                rows.append(
                    {
                        "agent": policy,
                        "coder": agents.env_kwargs(policy)["coder"],
                        **start.columns(),
                        "snr_db": snr_db,
                        "target_mse": target_mse,
                        "episodes": request.episodes,
                        **saved_slots(usual, found),
                        **found,
                    }
                )
                progress(1)
    return rows


def saved_slots(usual: Mapping[str, Any] | None, found: Mapping[str, Any]) -> dict[str, Any]:
    """The slots that are saved, at least and at most as the intervals of the two deadlines say."""
    ends = ("deadline", "deadline_high", "deadline_low")  # the most is saved where this deadline is the lowest
    pairs = zip(("deadline", "deadline_low", "deadline_high"), ends, strict=True)
    if usual is None or None in (*(usual[a] for a in ends), *(found[a] for a in ends)):
        return dict.fromkeys(intervals("sooner"))
    return dict(zip(intervals("sooner"), (usual[a] - found[b] for a, b in pairs), strict=True))


def read_reuse(folder: Path) -> tuple[Table, Table]:
    """Read ``reuse.csv`` and ``deadline.csv``.

    Raises:
        ConfigurationError: if a file is missing, or not such a table.
    """
    command = "python -m agents.evaluate --study reuse"
    cells = read_table(folder / "reuse.csv", REUSE_COLUMNS, optional=_OPTIONAL[-3:], command=command)
    return cells, read_table(folder / "deadline.csv", DEADLINE_COLUMNS, optional=_OPTIONAL, command=command)


def _run(request: Request) -> tuple[list[Path], dict[str, Any]]:
    advice = "Give a latent MSE, for example 0.01."
    wanted = TARGET_MSE if request.target_mse is None else request.target_mse
    target_mse = check_positive("target_mse", wanted, advice=advice)
    cache = TrajectoryCache.open(str(request.env_kwargs["cache"]))
    starts = starts_of(cache, request.reuse_ratios)
    number = len(starts) * len(POLICIES)
    with request.progress(number * len(request.snrs_db) * request.episodes, "reuse") as progress:
        table = _play_over_snr(request, starts, progress)
    cells = _summarize(table, int(request.env_kwargs["deadline"]))
    snrs_db = [snr_db for snr_db in request.snrs_db if snr_db in DEADLINE_SNRS_DB] or list(request.snrs_db)
    with request.progress(number * len(snrs_db), "deadlines", unit="system") as progress:
        deadlines = _play_deadlines(request, starts, snrs_db, target_mse, progress)
    columns = {"ratio": float, "step": int, "shared": str, **EPISODE_COLUMNS, _FULL: float}
    tables = {
        "episodes.csv": (table, columns),
        "reuse.csv": (cells, REUSE_COLUMNS),
        "deadline.csv": (deadlines, DEADLINE_COLUMNS),
    }
    paths = write_tables(request.out, tables)
    for policy in POLICIES:
        lines = []
        for start in starts:
            own = [r for r in deadlines if r["agent"] == policy and start.columns().items() <= r.items()]
            lines.append([f"{start.ratio:g}", str(start.step), start.columns()["shared"], *map(show_deadline, own)])
        print_table(
            {"R": "right", "m": "right", "shared": "left", **{f"{snr_db:g} dB": "right" for snr_db in snrs_db}},
            lines,
            title=f"least deadline in slots with a mean latent MSE of {target_mse:g}, {policy}",
            notes=["In brackets: so many slots sooner than without reuse."],
        )
    return paths, {"ratios": [start.ratio for start in starts], "target_mse": target_mse, "policies": list(POLICIES)}


def show_deadline(row: Mapping[str, Any]) -> str:
    """A row of least deadlines on the terminal: the deadline, and in brackets the slots that are saved."""
    if row["deadline"] is None:
        return "–"
    return f"{row['deadline']}" + ("" if row["sooner"] is None else f" ({row['sooner']})")


REUSE = Study(
    "reuse",
    "what reuse of midpoints buys on the link",
    tuple(map(float, range(0, 25, 3))),
    300,
    _run,
    takes=("--target-mse", "--reuse-ratios"),
)
