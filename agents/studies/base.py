"""What every study has in common: what it is asked for, and what the command line knows of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from refine_env.dynamics.settings import EnvSettings
from refine_env.evaluation import Entry, Score, Table, roll_out_many, write_table

__all__ = ["Request", "Study", "common_settings", "write_tables"]


def common_settings(env_kwargs: Mapping[str, Any]) -> EnvSettings:
    """The settings that the policies of an evaluation share; a policy's own come on top.

    They are checked for the closed-loop coder, since a payload may be given, which holds for policies on that one.

    Raises:
        ConfigurationError: if an argument is unknown or out of range.
    """
    return EnvSettings.from_kwargs({**env_kwargs, "coder": "closed_loop"})


def write_tables(folder: Path, tables: Mapping[str, tuple[Table, Mapping[str, type]]]) -> list[Path]:
    """Write the tables of a study.

    Args:
        folder: folder for the files.
        tables: rows and columns by the name of the file.

    Returns:
        The files written.
    """
    for name, (rows, columns) in tables.items():
        write_table(folder / name, rows, columns)
    return [folder / name for name in tables]


@dataclass(frozen=True)
class Request:
    """What the command line asks of a study.

    Args:
        snrs_db: mean SNRs [dB].
        episodes: how many to play for each policy and SNR.
        seed: seed of the evaluation.
        env_kwargs: environment arguments; those of a policy come on top.
        out: folder for the tables, which exists.
        workers: threads for the deliveries, see :func:`refine_env.evaluation.roll_out_many`.
        target_mse: latent MSE that is to be reached, in studies that ask for one; None: the study's own.
        reuse_ratios: ratios of reuse, likewise.
    """

    snrs_db: tuple[float, ...]
    episodes: int
    seed: int
    env_kwargs: Mapping[str, Any]
    out: Path
    workers: int = 1
    target_mse: float | None = None
    reuse_ratios: tuple[float, ...] | None = None

    def roll_out(
        self, entries: Sequence[Entry], progress: Callable[[int], None] | None = None, score: Score | None = None
    ) -> list[Table]:
        """Play policies in their environments, see :func:`refine_env.evaluation.roll_out_many`."""
        return roll_out_many(
            entries, episodes=self.episodes, seed=self.seed, workers=self.workers, progress=progress, score=score
        )

    @contextmanager
    def progress(self, total: int, label: str, unit: str = "episode") -> Iterator[Callable[[int], None]]:
        """A progress bar on the terminal; what it gives is called with the number of units that have just ended."""
        from tqdm import tqdm

        with tqdm(total=total, unit=unit, desc=label) as bar:
            yield bar.update


class Study(NamedTuple):
    """A question that ``python -m agents.evaluate --study NAME`` answers with tables.

    Attributes:
        name: its name on the command line, and of its folder among the results.
        summary: what it asks, a phrase for the command's help.
        snrs_db: the SNRs where none are given [dB].
        episodes: the number of episodes where none is given.
        run: plays it, writes its tables and prints what they say; gives the files and what describes the run beside
            the request, JSON values.
        has_figure: whether :mod:`agents.figures` draws its tables.
        takes: options of the command that it takes, of those that the others do not.
    """

    name: str
    summary: str
    snrs_db: tuple[float, ...]
    episodes: int
    run: Callable[[Request], tuple[list[Path], dict[str, Any]]]
    has_figure: bool = True
    takes: tuple[str, ...] = ()
