"""Paired roll-outs of policies: a table of episodes, its summary, and both as CSV files."""

from __future__ import annotations

import csv
import io
import math
import os
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from gymnasium.utils import seeding
from numpy.typing import NDArray

from refine_env._validation import check_integer
from refine_env.coding import Chain
from refine_env.config import SystemConfig
from refine_env.errors import ConfigurationError
from refine_env.process import DecisionProcess, split_look
from refine_env.settings import EnvSettings

__all__ = [
    "EPISODE_COLUMNS",
    "IMAGE_COLUMNS",
    "SUMMARY_COLUMNS",
    "Policy",
    "Score",
    "Table",
    "bootstrap_interval",
    "episode_seeds",
    "read_table",
    "roll_out",
    "summarize",
    "write_atomically",
    "write_table",
]

Table = list[dict[str, Any]]
"""Rows of equal keys."""

Score = Callable[[Table, NDArray[np.float32]], Sequence[Mapping[str, Any]]]
"""Further columns of finished episodes, one mapping a row, from their rows and what each device held at the deadline,
float32 (N, M)."""

IMAGE_COLUMNS = ("psnr_db", "ssim", "lpips")
"""Metrics of the decoded image, in a table of episodes and, as means, in a summary; None, an empty cell, where they
were not computed. Tables without these columns are read as if they were empty."""

_OPTIONAL_COLUMNS = ("scored_episodes", *(name + end for name in IMAGE_COLUMNS for end in ("", "_low", "_high")))

EPISODE_COLUMNS: dict[str, type] = {
    "agent": str,
    "snr_db": float,
    "episode": int,
    "seed": int,
    "trajectory": int,
    "latent_mse": float,
    "no_delivery_mse": float,
    "device_step": int,
    "device_bits": int,
    "num_deliveries": int,
    "bits_sent": float,
    "uplink_slots": int,
    "coder": str,
    "payload": str,
    **dict.fromkeys(IMAGE_COLUMNS, float),
}
"""Columns of a table of episodes. ``no_delivery_mse`` is what the episode's device would score with nothing
delivered, ``device_step`` = T means just that, ``uplink_slots`` = 0 an uplink that never finished."""

SUMMARY_COLUMNS: dict[str, type] = {
    "agent": str,
    "snr_db": float,
    "episodes": int,
    "latent_mse": float,
    "ci_low": float,
    "ci_high": float,
    "no_delivery_mse": float,
    "delivered_share": float,
    "mean_device_step": float,
    "mean_num_deliveries": float,
    "mean_bits_sent": float,
    "coder": str,
    "payload": str,
    "scored_episodes": int,
    **{name + end: float for name in IMAGE_COLUMNS for end in ("", "_low", "_high")},
}
"""Columns of a summary: one row per agent, SNR, coder and payload, ``ci_low`` … ``ci_high`` a 95 % bootstrap interval
of the mean ``latent_mse``; and likewise the image metrics' means over the ``scored_episodes``, with ``_low`` and
``_high``."""


class Policy(Protocol):
    """What a roll-out asks of a policy."""

    name: str

    def reset(self, num_envs: int = 1) -> None:
        """Forget all episodes; ``num_envs`` new ones begin."""

    def select_action(self, observation: Mapping[str, Any], info: Mapping[str, Any]) -> Any:
        """Actions (N,) for the vector environment's observation."""

    def check_config(self, config: SystemConfig) -> None:
        """Raise if the policy was not made for that system."""


def episode_seeds(seed: int, episodes: int) -> list[int]:
    """The environment seed of every episode of an evaluation; more episodes keep the earlier ones' seeds.

    Raises:
        ConfigurationError: if ``seed`` is negative or ``episodes`` not positive.
    """
    check_integer("episodes", episodes, 1, advice="Give the number of episodes, for example 200.")
    check_integer("seed", seed, 0, advice="Give a non-negative seed, for example 0.")
    return [int(word) for word in np.random.SeedSequence(seed).generate_state(episodes)]


def roll_out(
    make_policy: Callable[[SystemConfig], Policy],
    *,
    env_kwargs: Mapping[str, Any],
    episodes: int,
    seed: int = 0,
    batch_size: int = 256,
    progress: Callable[[int], None] | None = None,
    score: Score | None = None,
) -> Table:
    """Play episodes with one policy; episode k has the same seed whatever the policy, hence the same draws.

    An episode is that of the environment with the same seed, and the row says what its device holds, to the bit. But
    latents are touched only at the end: first the policy decides all slots of a batch, then what was delivered is
    carried out, once for all episodes in which it is the same. So the policy finds NaN as ``info["latent_mse"]``,
    which a real server does not know either.

    Args:
        make_policy: called once with the environment's configuration.
        env_kwargs: the environment's arguments; ``split`` defaults to ``"test"`` here.
        episodes: how many.
        seed: of the evaluation.
        batch_size: episodes played at once; the table does not depend on it for a deterministic policy.
        progress: called with the number of episodes that have just ended.
        score: fills columns of :data:`IMAGE_COLUMNS`; called with every batch.

    Returns:
        One row per episode, columns :data:`EPISODE_COLUMNS`.

    Raises:
        ConfigurationError: if an argument is out of range, the environment has an SNR range, or the policy was
            made for another system.
        ActionError: if the policy gives what is not in the action space.
    """
    for name in ("autoreset_mode", "num_envs"):
        if name in env_kwargs:
            raise ConfigurationError(
                f"`env_kwargs` must leave `{name}` to the roll-out, got {env_kwargs[name]!r}. Leave it out."
            )
    seeds = episode_seeds(seed, episodes)
    size = min(check_integer("batch_size", batch_size, 1, advice="Give for example 256."), episodes)
    settings = EnvSettings.from_kwargs({"split": "test", **env_kwargs})
    rows: Table = []
    policy: Policy | None = None
    for start in range(0, episodes, size):
        batch = seeds[start : start + size]
        process = DecisionProcess(settings, len(batch), latents=False)
        if policy is None:
            policy = make_policy(process.config)
        policy.check_config(process.config)
        played, chains = _decide(process, policy, batch, first_episode=start)
        held = np.empty((len(batch) if score is not None else 0, process.config.latent_dim), dtype=np.float32)
        _deliver(process, played, chains, held)
        if score is not None:
            for row, columns in zip(played, score(played, held), strict=True):
                row.update(columns)
        rows.extend(played)
        if progress is not None:
            progress(len(batch))
    return rows


def _decide(
    process: DecisionProcess, policy: Policy, seeds: Sequence[int], first_episode: int
) -> tuple[Table, list[Chain]]:
    """Play one episode a seed to its end, without latents: what is delivered does not depend on them.

    Returns:
        The rows, but for what the latents decide, and the deliveries of every episode.
    """
    config, state = process.config, process.episodes.state
    snr_db = config.single_snr_db("an evaluation")
    policy.reset(len(seeds))
    process.begin(range(len(seeds)), [seeding.np_random(seed)[0] for seed in seeds], {})
    chains: list[list[tuple[int, int]]] = [[] for _ in seeds]
    while not process.episodes.finished().all():
        observation, info = split_look(process.look())
        process.step(process.check_actions(policy.select_action(observation, info)))
        for i in np.flatnonzero(state["delivered"]).tolist():
            chains[i].append((int(state["device_step"][i]), int(state["device_bits"][i])))
    rows: Table = [
        {
            "agent": policy.name,
            "snr_db": snr_db,
            "episode": first_episode + i,
            "seed": seeds[i],
            "trajectory": int(s["trajectory"]),
            "latent_mse": math.nan,
            "no_delivery_mse": math.nan,
            "device_step": int(s["device_step"]),
            "device_bits": int(s["device_bits"]),
            "num_deliveries": int(s["num_deliveries"]),
            "bits_sent": float(s["bits_sent"]),
            "uplink_slots": int(s["uplink_slots"]),
            "coder": config.coder,
            "payload": config.payload,
            **dict.fromkeys(IMAGE_COLUMNS),
        }
        for i, s in enumerate(state)
    ]
    return rows, [tuple(chain) for chain in chains]


def _deliver(process: DecisionProcess, rows: Table, chains: Sequence[Chain], held: NDArray[np.float32]) -> None:
    """Carry out what was delivered, trajectory by trajectory, each distinct chain once; fills in the latent MSE.

    Args:
        process: whose cache and coder they are.
        rows: of :func:`_decide`.
        chains: of :func:`_decide`.
        held: overwritten with what the devices hold at the deadline, (N, M); or (0, M) to leave it out.
    """
    episodes_of: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        episodes_of.setdefault(row["trajectory"], []).append(i)
    for trajectory, members in episodes_of.items():
        distinct = sorted({(), *(chains[i] for i in members)})
        latents = process.cache.latents(trajectory)
        mse, devices = process.episodes.coder.score_chains(
            latents.reshape(len(latents), -1).view(np.uint16), distinct, keep_devices=len(held) > 0
        )
        place = {chain: k for k, chain in enumerate(distinct)}
        for i in members:
            k = place[chains[i]]
            rows[i]["latent_mse"], rows[i]["no_delivery_mse"] = float(mse[k]), float(mse[0])
            if len(held) > 0:
                held[i] = devices[k]


@lru_cache(maxsize=2)
def _resampling_counts(size: int, resamples: int, seed: int) -> NDArray[np.float64]:
    """How often each of ``size`` values is in each resample, (resamples, size)."""
    counts = np.random.default_rng(seed).multinomial(size, np.full(size, 1.0 / size), size=resamples)
    return counts.astype(np.float64)


def bootstrap_interval(
    values: NDArray[np.float64], *, level: float = 0.95, resamples: int = 2_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean.

    Tables of the same length are resampled alike, so intervals of paired episodes are paired too.

    Args:
        values: (n,).
        level: coverage.
        resamples: bootstrap replicates.
        seed: of the resampling.

    Raises:
        ConfigurationError: if there are no values.
    """
    if values.size == 0:
        raise ConfigurationError("`values` must hold at least one number, got none. Evaluate some episodes first.")
    means = _resampling_counts(values.size, resamples, seed) @ values / values.size
    low, high = np.quantile(means, [(1.0 - level) / 2.0, (1.0 + level) / 2.0])
    return float(low), float(high)


def summarize(episodes: Table) -> Table:
    """Mean, interval and averages per agent and SNR, in the order in which they first appear.

    Args:
        episodes: rows with :data:`EPISODE_COLUMNS`.

    Returns:
        Rows with :data:`SUMMARY_COLUMNS`.
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
                **_summarize_images(rows),
            }
        )
    return summary


def _summarize_images(rows: Table) -> dict[str, Any]:
    """Means and intervals of the image metrics; None of what no row has."""
    columns: dict[str, Any] = {
        "scored_episodes": sum(any(row.get(name) is not None for name in IMAGE_COLUMNS) for row in rows)
    }
    for name in IMAGE_COLUMNS:
        values = np.array([row[name] for row in rows if row.get(name) is not None])
        low, high = bootstrap_interval(values) if values.size else (None, None)
        columns |= {name: float(values.mean()) if values.size else None, f"{name}_low": low, f"{name}_high": high}
    return columns


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file, text as UTF-8, so that a reader, or a crash, sees the old one or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_table(path: Path, rows: Iterable[Mapping[str, Any]], columns: Mapping[str, type]) -> None:
    """Write rows as CSV, atomically; numbers in full precision."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([row[name] for name in columns] for row in rows)
    write_atomically(path, buffer.getvalue())


def read_table(
    path: Path,
    columns: Mapping[str, type],
    *,
    optional: Collection[str] = _OPTIONAL_COLUMNS,
    command: str = "python -m agents.evaluate",
) -> Table:
    """Read what :func:`write_table` wrote.

    Args:
        path: the file.
        columns: to read.
        optional: those of them that a file may lack or leave empty, which gives None.
        command: that makes such a table, for the messages.

    Raises:
        ConfigurationError: if the file is missing or empty, its columns are not these, or a number is none or not
            finite.
    """
    if not path.is_file():
        raise ConfigurationError(
            f"`{path.name}` must be a table of an evaluation, got no file at {path}. Make one with: {command}"
        )
    remedy = f"Make it anew with: {command}"
    rows: Table = []
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        missing = [name for name in columns if name not in (*(reader.fieldnames or []), *optional)]
        if missing:
            raise ConfigurationError(
                f"`{path.name}` must have the columns {', '.join(columns)}, got none named {', '.join(missing)}. "
                f"{remedy}"
            )
        try:
            rows.extend(
                {
                    name: None if name in optional and row.get(name, "") == "" else _parse(kind, row[name])
                    for name, kind in columns.items()
                }
                for row in reader
            )
        except (ValueError, TypeError, csv.Error) as error:
            raise ConfigurationError(
                f"`{path.name}` must hold a value of the right kind in every column, got {error} in line "
                f"{reader.line_num}. {remedy}"
            ) from None
    if not rows:
        raise ConfigurationError(f"`{path.name}` must have rows, got none below the header. {remedy}")
    return rows


def _parse(kind: type, text: str) -> Any:
    value = kind(text)
    if kind is float and not math.isfinite(value):
        raise ValueError(text)
    return value
