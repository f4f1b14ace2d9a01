"""Named, frozen tasks, and every policy on every one of them: ``python -m agents.leaderboard``.

A task fixes trajectories, link, SNRs, deadline, bit depths and the seeds of its episodes; coder and payload are the
policy's own. A policy from elsewhere enters with the actions that it took: they are replayed here on the same seeds, so
that what the table says of it was measured as everything else in it was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

import agents
from refine_env import ConfigurationError, SystemConfig, TrajectoryCache
from refine_env._validation import shown
from refine_env.commands import command, parse_list, print_table, run
from refine_env.dynamics.settings import EnvSettings
from refine_env.evaluation import (
    Entry,
    Policy,
    Table,
    episode_seeds,
    read_table,
    resampled_means,
    roll_out_many,
    write_atomically,
    write_table,
)

__all__ = ["COLUMNS", "TASKS", "Task", "enter", "play", "policies_for", "replay"]

DEFAULT_CACHE = "bd78bec5903073b43d8f22caa14d426c1f93c1e1d5f24b01a2be8dd4d105c534"
"""SHA-256 of the manifest of the default cache."""

_OWN = ("coder", "payload", "moments", "rotation", "sent_scale", "same_step_refinement", "entropy_coding")
"""Arguments of the environment that a policy brings with it."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is fixed.

    Args:
        summary: a phrase.
        snrs_db: mean SNRs [dB]; the score is the mean over them.
        env_kwargs: further arguments of the environment.
        cache_sha256: of the cache's manifest.
        episodes: of each SNR.
        seed: of the evaluation.
        tells_snr: whether the policies are told the SNR; else only those play that can do without.
    """

    summary: str
    snrs_db: tuple[float, ...]
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    cache_sha256: str = DEFAULT_CACHE
    episodes: int = 1000
    seed: int = 2026
    tells_snr: bool = True

    @property
    def cache(self) -> str:
        """The cache's name."""
        return str(self.env_kwargs.get("cache", "default"))

    def arguments(self, snr_db: float, own: Mapping[str, Any]) -> dict[str, Any]:
        """The environment's arguments for a policy.

        Args:
            snr_db: one of the task's.
            own: what the policy brings with it.

        Raises:
            ConfigurationError: if it brings what the task fixes.
        """
        fixed = sorted(set(own) - set(_OWN))
        if fixed:
            raise ConfigurationError(
                f"`env_kwargs` of an entry must be among {', '.join(_OWN)}, got {', '.join(fixed)}. "
                "Leave out what the task fixes."
            )
        return {**own, **self.env_kwargs, "snr_db": snr_db, "split": "test"}

    def check_cache(self) -> None:
        """Refuse another cache than the one that the task was frozen with.

        Raises:
            ConfigurationError: if the cache of that name has another hash.
        """
        found = TrajectoryCache.open(self.cache).sha256
        if found != self.cache_sha256:
            raise ConfigurationError(
                f"`cache` must be the {self.cache!r} that the task was frozen with (manifest SHA-256 "
                f"{self.cache_sha256[:12]}…), got {found[:12]}…. Use the bundled one: unset what overrides it."
            )


TASKS: Mapping[str, Task] = {
    "paper-3dB": Task(summary="the paper's setting at 3 dB", snrs_db=(3.0,)),
    "paper-6dB": Task(summary="the paper's setting at 6 dB", snrs_db=(6.0,)),
    "paper-12dB": Task(summary="the paper's setting at 12 dB", snrs_db=(12.0,)),
    "snr-unseen": Task(
        summary="0 to 15 dB, and nobody says which",
        snrs_db=(0.0, 3.0, 6.0, 9.0, 12.0, 15.0),
        tells_snr=False,
    ),
    "correlated": Task(
        summary="6 dB, gains correlated over slots (Gauss–Markov, 0.9)",
        snrs_db=(6.0,),
        env_kwargs={"link": {"correlation": "gauss-markov", "correlation_coefficient": 0.9}},
    ),
    "all-depths": Task(
        summary="6 dB, all bit depths 1 to 16 on the closed-loop coder",
        snrs_db=(6.0,),
        env_kwargs={"bit_depths": list(range(1, 17)), "coder": "closed_loop"},
    ),
}
"""The tasks by name. They do not change: another task gets another name."""

COLUMNS: dict[str, type] = {
    "task": str,
    "policy": str,
    "training": str,
    "latent_mse": float,
    "ci_low": float,
    "ci_high": float,
    "geometric_mean": float,
    "score": float,
    "score_low": float,
    "score_high": float,
}
"""Columns of ``leaderboard.csv``: the mean latent MSE over all episodes of the task, the geometric mean over the SNRs
of the means there, and the normalized score, 0 for the best Persistent-Q and 1 for ``dp`` (``dp-inferred`` where nobody
is told the SNR); all but the second with a 95 % interval. Nothing is added to any of them; a mean of 0 is a geometric
mean of 0."""

_TRAINING = {"learned": "6 million steps, 0 to 24 dB"}


def policies_for(task: Task) -> list[str]:
    """The registered policies that can play a task, in the order of the table's ties.

    Args:
        task: one of :data:`TASKS`.
    """
    config = _config(task, task.snrs_db[0], {})
    return [name for name in [*agents.names(config), "learned"] if _can_play(name, task)]


def _config(task: Task, snr_db: float, own: Mapping[str, Any]) -> SystemConfig:
    settings = EnvSettings.from_kwargs(task.arguments(snr_db, own))
    return settings.config_for(settings.open_cache())


def _can_play(name: str, task: Task) -> bool:
    config = _config(task, task.snrs_db[0], agents.env_kwargs(name))
    if not task.tells_snr:
        given = task.arguments(task.snrs_db[0], agents.env_kwargs(name))
        low, high = min(task.snrs_db), max(task.snrs_db)
        settings = EnvSettings.from_kwargs({**given, "snr_db": [low, high]})
        config = settings.config_for(settings.open_cache())
    try:
        agents.make(name, config, neglect_errors=True)
    except ConfigurationError:
        return False
    return True


class _Scores:
    """The MSE of every episode of every policy in a task, and what follows from them."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._errors: dict[str, NDArray[np.float64]] = {}  # (number of SNRs, episodes)
        self._training: dict[str, str] = {}

    def add(self, policy: str, tables: Sequence[Table], training: str) -> None:
        """Take a policy's episodes, a table for each SNR."""
        self._errors[policy] = np.array([[row["latent_mse"] for row in table] for table in tables])
        self._training[policy] = training

    def rows(self, name: str) -> Table:
        """The rows of the leaderboard, the best score first."""
        resampled = {
            policy: np.stack([np.concatenate([[row.mean()], resampled_means(row)]) for row in errors])
            for policy, errors in self._errors.items()
        }
        fixed = [policy for policy in resampled if policy.startswith("persistent-q")]
        # The best Persistent-Q at each SNR, chosen by its mean, and not anew in every resample.
        worst = np.stack([min((resampled[policy][k] for policy in fixed), key=lambda m: m[0]) for k in self._snrs])
        best = resampled["dp" if self._task.tells_snr else "dp-inferred"]
        rows = []
        for policy, means in resampled.items():
            mean = means.mean(axis=0)
            score = ((worst - means) / (worst - best)).mean(axis=0)
            low, high = np.quantile(mean[1:], [0.025, 0.975])
            score_low, score_high = np.quantile(score[1:], [0.025, 0.975])
            rows.append(
                {
                    "task": name,
                    "policy": policy,
                    "training": self._training[policy],
                    "latent_mse": float(mean[0]),
                    "ci_low": float(low),
                    "ci_high": float(high),
                    "geometric_mean": _geometric_mean(means[:, 0]),
                    "score": float(score[0]),
                    "score_low": float(score_low),
                    "score_high": float(score_high),
                }
            )
        return sorted(rows, key=lambda row: -row["score"])

    @property
    def _snrs(self) -> range:
        return range(len(self._task.snrs_db))


def _geometric_mean(values: NDArray[np.float64]) -> float:
    return 0.0 if (values == 0.0).any() else float(math.exp(np.log(values).mean()))


def play(
    name: str,
    entries: Sequence[Path] = (),
    *,
    episodes: int | None = None,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
) -> Table:
    """Play a task with every policy that can, and replay entries.

    Args:
        name: of the task.
        entries: folders that :func:`enter` wrote; those without this task are left out.
        episodes: fewer than the task has, to try it; None: all.
        workers: threads that carry out deliveries.
        progress: called with the number of episodes that have just ended.

    Returns:
        The rows of the leaderboard, the best score first.

    Raises:
        ConfigurationError: if there is no such task, its cache is another one, or an entry was made otherwise.
        CacheError: if the cache is missing or damaged.
    """
    task = _task(name)
    task.check_cache()
    count = task.episodes if episodes is None else episodes
    scores = _Scores(task)
    for policy in policies_for(task):
        maker = partial(agents.make, policy, neglect_errors=True)  # the task may ask for the paper's coder
        played = [Entry(maker, task.arguments(snr, agents.env_kwargs(policy))) for snr in task.snrs_db]
        tables = roll_out_many(played, episodes=count, seed=task.seed, workers=workers, progress=progress)
        scores.add(policy, tables, _TRAINING.get(policy, ""))
    for folder in entries:
        if name in _read_entry(folder)["tasks"]:
            policy, training, tables = replay(folder, name, episodes=count)
            scores.add(policy, tables, training)
    return scores.rows(name)


def _task(name: str) -> Task:
    if name not in TASKS:
        raise ConfigurationError(f"`task` must be one of {', '.join(TASKS)}, got {shown(name)}. Choose one of them.")
    return TASKS[name]


# --- Entries from elsewhere -------------------------------------------------------------------------

_ENTRY, _ACTIONS = "entry.json", "actions.csv"
_ACTION_COLUMNS: dict[str, type] = {"task": str, "snr_db": float, "episode": int, "seed": int, "actions": str}
_DIGITS = "0123456789abcdefg"  # 0 is WAIT; there are at most 16 bit depths


class _Recorded:
    """A policy whose actions are noted."""

    def __init__(self, policy: Policy, deadline: int) -> None:
        self._policy, self._deadline = policy, deadline
        self.name = policy.name
        self.actions: list[NDArray[np.int64]] = []  # (N, T_d) of every batch

    def reset(self, num_envs: int = 1) -> None:
        """A batch begins."""
        self.actions.append(np.zeros((num_envs, self._deadline), dtype=np.int64))
        self._policy.reset(num_envs)

    def check_config(self, config: SystemConfig) -> None:
        """The policy's own."""
        self._policy.check_config(config)

    def select_action(self, observation: Mapping[str, Any], info: Mapping[str, Any]) -> Any:
        """The policy's own, WAIT where nothing else is legal."""
        chosen = np.asarray(self._policy.select_action(observation, info))
        legal = np.asarray(info["action_mask"])[np.arange(len(chosen)), chosen] == 1
        self.actions[-1][np.arange(len(chosen)), observation["slot"] - 1] = np.where(legal, chosen, 0)
        return chosen


class _Replayed:
    """Actions that were noted, as a policy."""

    def __init__(self, name: str, actions: NDArray[np.int64], config: SystemConfig) -> None:
        self.name, self.config = name, config
        self._actions, self._first, self._size = actions, 0, 0

    def reset(self, num_envs: int = 1) -> None:
        """The next batch begins."""
        self._first, self._size = self._first + self._size, num_envs

    def check_config(self, config: SystemConfig) -> None:
        """The task is checked before."""

    def select_action(self, observation: Mapping[str, Any], info: Mapping[str, Any]) -> Any:
        """What was done in this slot."""
        rows = self._first + np.arange(self._size)
        return self._actions[rows, observation["slot"] - 1]


def enter(
    make_policy: Callable[[SystemConfig], Policy],
    out: Path,
    *,
    name: str,
    training: str = "",
    env_kwargs: Mapping[str, Any] | None = None,
    tasks: Sequence[str] = tuple(TASKS),
    episodes: int | None = None,
) -> Path:
    """Play tasks with a policy of one's own, and write what it did: the entry that :func:`replay` checks.

    Args:
        make_policy: called with the configuration of every task and SNR, see :class:`refine_env.evaluation.Policy`.
        out: folder of the entry.
        name: of the policy in the table.
        training: its budget, in words: steps, SNRs.
        env_kwargs: coder and payload that it is made for.
        tasks: names.
        episodes: fewer than the tasks have, to try it; None: all.

    Raises:
        ConfigurationError: as :func:`play` does.
    """
    own = dict(env_kwargs or {})
    rows: Table = []
    for task_name in tasks:
        task = _task(task_name)
        task.check_cache()
        count = task.episodes if episodes is None else episodes
        seeds = episode_seeds(task.seed, count)
        for snr_db in task.snrs_db:
            recorded: list[_Recorded] = []

            def record(config: SystemConfig, kept: list[_Recorded] = recorded) -> Policy:
                kept.append(_Recorded(make_policy(config), config.deadline))
                return kept[0]

            roll_out_many([Entry(record, task.arguments(snr_db, own))], episodes=count, seed=task.seed)
            actions = np.concatenate(recorded[0].actions)
            texts = ["".join(_DIGITS[action] for action in row) for row in actions.tolist()]
            rows += [
                dict(zip(_ACTION_COLUMNS, (task_name, snr_db, episode, seed, text), strict=True))
                for episode, (seed, text) in enumerate(zip(seeds, texts, strict=True))
            ]
    out.mkdir(parents=True, exist_ok=True)
    write_table(out / _ACTIONS, rows, _ACTION_COLUMNS)
    caches = {name: TASKS[name].cache_sha256 for name in tasks}
    entry = {"name": name, "training": training, "env_kwargs": own, "tasks": caches}
    write_atomically(out / _ENTRY, json.dumps(entry, indent=1) + "\n")
    return out


def _read_entry(folder: Path) -> dict[str, Any]:
    path = folder / _ENTRY
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        right = {"name": str, "training": str, "env_kwargs": dict, "tasks": dict}
        assert all(isinstance(entry[key], kind) for key, kind in right.items())
    except (OSError, ValueError, KeyError, TypeError, AssertionError):
        raise ConfigurationError(
            f"`entry` must be a folder with the {_ENTRY} that agents.leaderboard.enter writes, got {str(folder)!r}. "
            "Make the entry anew."
        ) from None
    return dict(entry)


def replay(folder: Path, name: str, *, episodes: int | None = None) -> tuple[str, str, list[Table]]:
    """Play the actions of an entry on the seeds of a task.

    Args:
        folder: of the entry.
        name: of the task.
        episodes: as many as are to be replayed; None: all of the task.

    Returns:
        Name and training of the entry, and for each SNR the table of its episodes.

    Raises:
        ConfigurationError: if the entry is damaged, or was made with other seeds or another cache.
    """
    entry, task = _read_entry(folder), _task(name)
    task.check_cache()
    if entry["tasks"].get(name) != task.cache_sha256:
        raise ConfigurationError(
            f"`entry` must have been made with the cache of {name} (manifest SHA-256 {task.cache_sha256[:12]}…), got "
            f"{shown(entry['tasks'].get(name))}. Play the task again with the bundled cache."
        )
    count = task.episodes if episodes is None else episodes
    rows = [row for row in read_table(folder / _ACTIONS, _ACTION_COLUMNS, command="enter") if row["task"] == name]
    tables = []
    for snr_db in task.snrs_db:
        own = [row for row in rows if row["snr_db"] == snr_db][:count]
        if [row["seed"] for row in own] != episode_seeds(task.seed, count):
            raise ConfigurationError(
                f"`entry` must have the {count} seeds of {name} at {snr_db:g} dB, in their order, got "
                f"{len(own)} rows with other ones. Play the task again with agents.leaderboard.enter."
            )
        given = task.arguments(snr_db, entry["env_kwargs"])
        config = _config(task, snr_db, entry["env_kwargs"])
        texts = [row["actions"] for row in own]
        if any(len(text) != config.deadline or not {*text} <= {*_DIGITS[: config.num_actions]} for text in texts):
            raise ConfigurationError(
                f"`entry` must have {config.deadline} actions of {_DIGITS[: config.num_actions]} in every row of "
                f"{name}, got others. Play the task again with agents.leaderboard.enter."
            )
        actions = np.array([[_DIGITS.index(letter) for letter in text] for text in texts])
        replayed = Entry(partial(_Replayed, entry["name"], actions), given)
        tables += roll_out_many([replayed], episodes=count, seed=task.seed)
    return entry["name"], entry["training"], tables


@command
def main(
    out: Annotated[Path, typer.Option(help="Folder of leaderboard.csv.")] = Path("results/leaderboard"),
    tasks: Annotated[str, typer.Option(help=f"Tasks, of {', '.join(TASKS)}.")] = ",".join(TASKS),
    entry: Annotated[list[Path] | None, typer.Option(help="Folder of an entry to replay; may be repeated.")] = None,
    episodes: Annotated[int, typer.Option(help="Episodes of each SNR; 0: the task's own.", min=0, max=1000)] = 0,
    workers: Annotated[int, typer.Option(help="Threads that carry out deliveries.", min=1, max=1024)] = 1,
) -> None:
    """Play every task with every policy that can, and replay entries from elsewhere.

    Exit codes: 0 done, 2 an argument or an entry is wrong, 3 a cache is missing or damaged, or the output cannot be
    written.
    """
    chosen = parse_list("--tasks", tasks, str, advice=f"Choose of {', '.join(TASKS)}.")
    for name in chosen:
        _task(name)
    rows: Table = []
    for name in chosen:
        rows += play(name, entry or (), episodes=episodes or None, workers=workers)
        lines = [
            (row["policy"], f"{row['latent_mse']:.3g}", f"{row['geometric_mean']:.3g}", f"{row['score']:.3f}")
            for row in rows
            if row["task"] == name
        ]
        sides: dict[str, Any] = {"policy": "left", **dict.fromkeys(("mean MSE", "geometric mean", "score"), "right")}
        print_table(sides, lines, title=f"{name}: {TASKS[name].summary}")
    out.mkdir(parents=True, exist_ok=True)
    write_table(out / "leaderboard.csv", rows, COLUMNS)


if __name__ == "__main__":
    run(main)
