"""How early a vehicle has a usable radio map: ``python -m agents.evaluate --study coverage --cache radiomap``.

Over the reuse ratio, with and without the midpoint at the vehicle: the least deadline by which the places that are
covered on the vehicle's map are those on the server's, by intersection over union. As in the study ``reuse`` the
midpoint is the trajectory's own, which is reuse at its best.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

import agents
from agents.studies.base import Request, Study, write_tables
from agents.studies.images import ImageScorer, decode, open_decoder, scale_arrays, scale_in, to_tile
from agents.studies.paired import mean_and_interval, resample
from agents.studies.reuse import (
    DEADLINE_SNRS_DB,
    POLICIES,
    START_COLUMNS,
    Start,
    intervals,
    least_deadlines,
    saved_slots,
    show_deadline,
    starts_of,
)
from refine_env import ConfigurationError, TrajectoryCache
from refine_env.commands import print_table
from refine_env.evaluation import Entry, Table, read_table, write_atomically
from refine_env.metrics import MapTask, coverage_iou
from refine_env.radiomap import PowerScale
from refine_env.render.decoder import pictures_of
from refine_env.trajectories.pipeline import LatentDecoder

__all__ = ["COVERAGE", "COVERAGE_COLUMNS", "RATIOS", "USABLE", "Maps", "read_coverage"]

RATIOS = (0.0, 0.5, 0.8, 0.9, 0.94, 0.98)
USABLE = 0.9
"""A map is usable from this intersection over union on."""

COVERAGE_COLUMNS: dict[str, type] = {
    **START_COLUMNS,
    "usable": float,
    "episodes": int,
    **dict.fromkeys((*intervals("deadline", "sooner"), "deadline_each"), int),
    **dict.fromkeys((*intervals("task_coverage"), "usable_share", "task_truth"), float),
}
"""Columns of ``map_coverage.csv``: the least deadline T_d [slots] at which the mean intersection over union is at least
``usable``, with the ends of its 95 % interval; ``deadline_each`` is the least one at which that part of the episodes
each have a map so good. ``sooner`` is the least deadline without reuse less this one. The scores are those at that
deadline: the mean, the part of the episodes with a usable map, and the mean against the truth where it is known. All is
empty where no deadline that is tried will do."""

_FOUND = ("deadline_each", "usable_share", "task_truth")
_OPTIONAL = tuple(intervals("deadline", "sooner", "task_coverage")) + _FOUND
_MAPS = "coverage.npz"
_SHOWN_RATIO = 0.94


class Maps(NamedTuple):
    """What one episode's vehicle shows, for the figure.

    Attributes:
        agent: the policy.
        snr_db: mean SNR [dB].
        ratios: R of every row.
        shared: whether the vehicle has the midpoint, of every row.
        deadlines: T_d of every column.
        pictures: uint8 (rows, columns, height, width, 3).
        coverage: intersection over union, (rows, columns).
        clean: the server's map, uint8 (height, width, 3).
        truth: the true map, or an empty array.
        scale: of the colors.
    """

    agent: str
    snr_db: float
    ratios: list[float]
    shared: list[bool]
    deadlines: list[int]
    pictures: NDArray[np.uint8]
    coverage: NDArray[np.float64]
    clean: NDArray[np.uint8]
    truth: NDArray[np.uint8]
    scale: PowerScale | None


class _Search:
    """The least deadlines of one policy at one start and SNR; what was played once is kept."""

    def __init__(self, request: Request, policy: str, start: Start, snr_db: float, scorer: ImageScorer) -> None:
        self._request, self._scorer = request, scorer
        self._make = partial(agents.make, policy)
        self._kwargs = {**request.env_kwargs, **agents.env_kwargs(policy), **start.env_kwargs, "snr_db": snr_db}
        self._played: dict[int, Table] = {}

    def play(self, deadline: int) -> Table:
        """The episodes at a deadline."""
        if deadline not in self._played:
            entry = Entry(self._make, {**self._kwargs, "deadline": deadline})
            (rows,) = self._request.roll_out([entry], score=self._scorer)
            self._played[deadline] = [{**row, "missed": 1.0 - row["task_coverage"]} for row in rows]
        return self._played[deadline]

    def _missed(self, deadline: int) -> dict[str, Any]:
        return dict(mean_and_interval("missed", resample(self.play(deadline), (), "missed")[()]))

    def _ends(self, deadline: int) -> list[float]:
        """What is missing to a coverage of 1: in the mean, at the ends of its interval, and the unusable maps."""
        return [*self._missed(deadline).values(), 1.0 - self._usable_share(deadline)]

    def _usable_share(self, deadline: int) -> float:
        return float(np.mean([row["task_coverage"] >= USABLE for row in self.play(deadline)]))

    def row(self) -> dict[str, Any]:
        """The columns of the table that are found by playing."""
        *found, each = least_deadlines(self._ends, 1.0 - USABLE)
        if found[0] is None:
            return dict.fromkeys((*intervals("deadline", "task_coverage"), *_FOUND))
        missed, rows = self._missed(found[0]), self.play(found[0])
        names = ("missed", "missed_high", "missed_low")  # least is covered where most is missed
        return {
            **dict(zip(intervals("deadline"), found, strict=True)),
            "deadline_each": each,
            **{name: 1.0 - missed[other] for name, other in zip(intervals("task_coverage"), names, strict=True)},
            "usable_share": self._usable_share(found[0]),
            "task_truth": None if "task_truth" not in rows[0] else float(np.mean([row["task_truth"] for row in rows])),
        }


def _play(
    request: Request,
    starts: list[Start],
    snrs_db: Sequence[float],
    scorer: ImageScorer,
    progress: Callable[[int], None],
) -> Table:
    """Rows of :data:`COVERAGE_COLUMNS`."""
    table: Table = []
    for policy in POLICIES:
        for snr_db in snrs_db:
            usual = None
            for start in starts:
                found = _Search(request, policy, start, snr_db, scorer).row()
                if start.ratio == 0.0:
                    usual = found
                table.append(
                    {
                        "agent": policy,
                        "coder": agents.env_kwargs(policy)["coder"],
                        **start.columns(),
                        "snr_db": snr_db,
                        "usable": USABLE,
                        "episodes": request.episodes,
                        **saved_slots(usual, found),
                        **found,
                    }
                )
                progress(1)
    return table


def _show(
    request: Request,
    starts: list[Start],
    table: Table,
    cache: TrajectoryCache,
    decoder: LatentDecoder,
    threshold: float,
) -> Maps | None:
    """What the vehicle of the first episode shows at the deadlines that it needs with and without reuse, and others."""
    rows = [row for row in table if row["agent"] == POLICIES[-1] and row["deadline"] is not None]
    if not rows:
        return None
    snr_db = sorted({row["snr_db"] for row in rows})[len({row["snr_db"] for row in rows}) // 2]
    ratio = min((start.ratio for start in starts), key=lambda ratio: abs(ratio - _SHOWN_RATIO))
    own = [row for row in rows if row["snr_db"] == snr_db and row["shared"] == "no"]
    if not own:
        return None
    last = max(row["deadline"] for row in own)
    first = min((row["deadline"] for row in own if row["ratio"] == ratio), default=last)
    deadlines = sorted({-(-first // 2), first, (first + last) // 2, last})
    chosen = [start for start in starts if start.ratio in (0.0, ratio)]
    held: list[NDArray[np.float32]] = []
    trajectory = 0

    def keep(rows: Table, latents: NDArray[np.float32]) -> list[dict[str, Any]]:
        nonlocal trajectory
        trajectory = int(rows[0]["trajectory"])
        held.append(latents[0].copy())
        return [{} for _ in rows]

    one = Request(request.snrs_db, 1, request.seed, request.env_kwargs, request.out, 1)
    policy = POLICIES[-1]
    for start in chosen:
        kwargs = {**request.env_kwargs, **agents.env_kwargs(policy), **start.env_kwargs, "snr_db": snr_db}
        for deadline in deadlines:
            one.roll_out([Entry(partial(agents.make, policy), {**kwargs, "deadline": deadline})], score=keep)
    clean = cache.latents(trajectory)[:1].astype(np.float32)
    images = decode(decoder, np.concatenate([clean, np.stack(held).reshape(-1, *cache.latent_shape)]))
    if cache.truth is not None:
        truth = np.repeat(cache.truth[trajectory, None, :, :, None], 3, axis=3).astype(np.float32) / 255.0
        images = np.concatenate([images, truth])
    pictures = to_tile(pictures_of(images, decoder, cache, [trajectory] * len(images)))
    shown = slice(1, 1 + len(held))
    scores = coverage_iou(np.repeat(images[:1], len(held), axis=0), images[shown], threshold)
    grid = (len(chosen), len(deadlines))
    return Maps(
        policy,
        snr_db,
        [start.ratio for start in chosen],
        [start.shared for start in chosen],
        deadlines,
        pictures[shown].reshape(*grid, *pictures.shape[1:]),
        scores.reshape(grid),
        pictures[0],
        pictures[len(held) + 1] if cache.truth is not None else np.empty(0, np.uint8),
        decoder.scale,
    )


def _write_maps(maps: Maps | None, folder: Path) -> list[Path]:
    path = folder / _MAPS
    path.unlink(missing_ok=True)  # an earlier run may have left it
    if maps is None:
        return []
    buffer = io.BytesIO()
    arrays = {name: np.array(value) for name, value in maps._asdict().items() if name != "scale"}
    np.savez_compressed(buffer, allow_pickle=False, **arrays, **scale_arrays(maps.scale))
    write_atomically(path, buffer.getvalue())
    return [path]


def read_coverage(folder: Path) -> tuple[Table, Maps | None]:
    """Read ``map_coverage.csv`` and, where they are, the maps of one episode.

    Raises:
        ConfigurationError: if a file is missing, or not one of these.
    """
    command = "python -m agents.evaluate --study coverage --cache radiomap"
    table = read_table(folder / "map_coverage.csv", COVERAGE_COLUMNS, optional=_OPTIONAL, command=command)
    path = folder / _MAPS
    if not path.is_file():
        return table, None
    try:
        with np.load(path, allow_pickle=False) as file:
            names = ("ratios", "shared", "deadlines")
            lists = {name: file[name].tolist() for name in names}
            arrays = {name: file[name] for name in ("pictures", "coverage", "clean", "truth")}
            agent, snr_db = str(file["agent"]), float(file["snr_db"])
            return table, Maps(agent=agent, snr_db=snr_db, **lists, **arrays, scale=scale_in(file))
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigurationError(
            f"`{_MAPS}` must hold the maps of an episode, got {path} ({type(error).__name__}: {error}). Make it with: "
            f"{command}"
        ) from None


def _run(request: Request) -> tuple[list[Path], dict[str, Any]]:
    cache = TrajectoryCache.open(str(request.env_kwargs["cache"]))
    decoder = open_decoder(cache)
    if decoder.scale is None:
        raise ConfigurationError(
            f"`cache` must hold radio maps, got {cache.path.name!r}, whose model draws images. Use --cache radiomap."
        )
    task = MapTask(decoder.scale)
    scorer = ImageScorer(cache, decoder, {"task": task}, tile_episodes=1)
    default = RATIOS if cache.manifest.recipe.reuse is None else None
    starts = starts_of(cache, default if request.reuse_ratios is None else request.reuse_ratios)
    snrs_db = [snr_db for snr_db in request.snrs_db if snr_db in DEADLINE_SNRS_DB] or list(request.snrs_db)
    with request.progress(len(POLICIES) * len(snrs_db) * len(starts), "coverage", unit="system") as progress:
        table = _play(request, starts, snrs_db, scorer, progress)
    paths = write_tables(request.out, {"map_coverage.csv": (table, COVERAGE_COLUMNS)})
    paths += _write_maps(_show(request, starts, table, cache, decoder, task.threshold), request.out)
    for policy in POLICIES:
        lines = []
        for start in starts:
            own = [r for r in table if r["agent"] == policy and start.columns().items() <= r.items()]
            lines.append([f"{start.ratio:g}", str(start.step), start.columns()["shared"], *map(show_deadline, own)])
        print_table(
            {"R": "right", "m": "right", "shared": "left", **{f"{snr_db:g} dB": "right" for snr_db in snrs_db}},
            lines,
            title=f"least deadline in slots with a mean coverage of {USABLE:g}, {policy}",
            notes=["In brackets: so many slots sooner than without reuse."],
        )
    details = {"ratios": [start.ratio for start in starts], "usable": USABLE, "coverage_dbm": task.coverage_dbm}
    return paths, {**details, "policies": list(POLICIES)}


COVERAGE = Study(
    "coverage",
    "how early a vehicle has a usable radio map (--cache radiomap)",
    DEADLINE_SNRS_DB,
    64,
    _run,
    takes=("--reuse-ratios",),
)
