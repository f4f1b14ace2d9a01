"""Paired roll-outs of policies: a table of episodes, its summary, and both as CSV files."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
from gymnasium.utils import seeding
from numpy.typing import NDArray

from refine_env._files import write_atomically
from refine_env._validation import check_integer
from refine_env.coding import LOSSLESS_BITS, Chain, Coder
from refine_env.config import SystemConfig
from refine_env.dynamics.process import DecisionProcess, Draws, draw_for_all
from refine_env.dynamics.settings import EnvSettings
from refine_env.errors import ConfigurationError
from refine_env.trajectories import TrajectoryCache

__all__ = [
    "EPISODE_COLUMNS",
    "IMAGE_COLUMNS",
    "SUMMARY_COLUMNS",
    "Entry",
    "Policy",
    "Score",
    "Table",
    "bootstrap_interval",
    "episode_seeds",
    "read_table",
    "resampling_counts",
    "reset_policy",
    "roll_out",
    "roll_out_many",
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
    """What a roll-out asks of a policy.

    One with the attribute ``needs_rates`` set is no policy but a bound: it is told the whole episode's channel by
    ``reset(num_envs, rates=...)``, bits per slot (N, T_d).
    """

    name: str

    def reset(self, num_envs: int = 1) -> None:
        """Forget all episodes; ``num_envs`` new ones begin."""

    def select_action(self, observation: Mapping[str, Any], info: Mapping[str, Any]) -> Any:
        """Actions (N,) for the vector environment's observation."""

    def check_config(self, config: SystemConfig) -> None:
        """Raise if the policy was not made for that system."""


def reset_policy(policy: Policy, num_envs: int, rates: NDArray[np.float64]) -> None:
    """Begin new episodes: of a bound that says it ``needs_rates`` with the whole channel, of a policy without.

    Args:
        policy: the policy.
        num_envs: N.
        rates: bits that every slot of every episode will carry (N, T_d).
    """
    if getattr(policy, "needs_rates", False):
        policy.reset(num_envs, rates=rates)  # type: ignore[call-arg]
    else:
        policy.reset(num_envs)


def episode_seeds(seed: int, episodes: int) -> list[int]:
    """The environment seed of every episode of an evaluation; more episodes keep the earlier ones' seeds.

    Raises:
        ConfigurationError: if ``seed`` is negative or ``episodes`` not positive.
    """
    check_integer("episodes", episodes, 1, advice="Give the number of episodes, for example 200.")
    check_integer("seed", seed, 0, advice="Give a non-negative seed, for example 0.")
    return [int(word) for word in np.random.SeedSequence(seed).generate_state(episodes)]


class Entry(NamedTuple):
    """A policy, and the environment that it plays in.

    Attributes:
        make_policy: called once with the environment's configuration.
        env_kwargs: the environment's arguments; ``split`` defaults to ``"test"`` here.
    """

    make_policy: Callable[[SystemConfig], Policy]
    env_kwargs: Mapping[str, Any]


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
    (table,) = roll_out_many(
        [Entry(make_policy, env_kwargs)],
        episodes=episodes,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
        score=score,
    )
    return table


def roll_out_many(
    entries: Sequence[Entry],
    *,
    episodes: int,
    seed: int = 0,
    batch_size: int = 256,
    workers: int = 1,
    progress: Callable[[int], None] | None = None,
    score: Score | None = None,
) -> list[Table]:
    """:func:`roll_out` of many policies, or of one at many SNRs, with nothing done twice; the tables are the same.

    What is random is drawn once for all entries on the same cache, split, deadline and link, whatever their SNRs.
    What was delivered is carried out once for all entries whose systems differ in nothing but the SNR, common
    beginnings once, and nothing from before the last lossless delivery, which leaves no trace of it. Nothing of a
    batch is kept but its rows. Where a coder says that its predicted error depends on the latents
    (``error_needs_latents``), and policies observe it, episodes are played with latents instead, each for itself.

    Policies decide in the calling thread, in the order of the entries, batch by batch. Deliveries, compiled loops
    that need no interpreter, are carried out by ``workers`` threads beside it. So the tables do not depend on their
    number, for no policy.

    Args:
        entries: policies with their environments' arguments.
        episodes: how many, of each.
        seed: of the evaluation.
        batch_size: episodes of each entry that are played at once; the tables do not depend on it for deterministic
            policies.
        workers: threads that carry out deliveries; with 1 the calling thread does that too.
        progress: called with the number of episodes that have just ended.
        score: fills columns of :data:`IMAGE_COLUMNS`; called, in the calling thread, with every batch of an entry.

    Returns:
        For each entry one row per episode, columns :data:`EPISODE_COLUMNS`.

    Raises:
        ConfigurationError: if an argument is out of range, an environment has an SNR range, or a policy was made for
            another system.
        ActionError: if a policy gives what is not in the action space.
    """
    for entry in entries:
        for name in ("autoreset_mode", "num_envs"):
            if name in entry.env_kwargs:
                raise ConfigurationError(
                    f"`env_kwargs` must leave `{name}` to the roll-out, got {entry.env_kwargs[name]!r}. Leave it out."
                )
    seeds = episode_seeds(seed, episodes)
    size = min(check_integer("batch_size", batch_size, 1, advice="Give for example 256."), episodes)
    crew = _Crew(check_integer("workers", workers, 1, advice="Give the number of processor cores to use."))
    caches: dict[str, TrajectoryCache] = {}
    players = [_Player(entry, caches, size, crew) for entry in entries]
    tables: list[Table] = [[] for _ in entries]
    with crew:
        ahead: list[_Deliveries] = []  # under way while the next batch is decided
        for first in range(0, episodes, size):
            part = seeds[first : first + size]
            draws = _draw(players, part)
            begun: dict[str, _Deliveries] = {}
            for player, table in zip(players, tables, strict=True):
                rows, chains, held = player.play(part, draws[id(player)], first, keep_devices=score is not None)
                if score is not None:
                    if chains is not None:
                        alone = _Deliveries(player)
                        alone.add(rows, chains, held)
                        alone.begin(crew)
                        alone.finish(None)
                    for row, columns in zip(rows, score(rows, held), strict=True):
                        row.update(columns)
                elif chains is not None:
                    begun.setdefault(player.delivery_key, _Deliveries(player)).add(rows, chains, held)
                if progress is not None and (score is not None or chains is None):
                    progress(len(rows))
                table.extend(rows)
            for deliveries in begun.values():
                deliveries.begin(crew)
            for deliveries in ahead:
                deliveries.finish(progress)
            ahead = list(begun.values())
        for deliveries in ahead:
            deliveries.finish(progress)
    return tables


def _made(entry: Entry, config: SystemConfig) -> Policy:
    """The entry's policy, which has what a roll-out asks of one."""
    if not callable(entry.make_policy):
        raise ConfigurationError(
            f"`make_policy` must be a function that makes a policy from a SystemConfig, got a "
            f"{type(entry.make_policy).__name__}. "
            "Give for example lambda config: agents.make('lookahead', config)."
        )
    policy = entry.make_policy(config)
    missing = [name for name in ("name", "reset", "select_action", "check_config") if not hasattr(policy, name)]
    if missing:
        raise ConfigurationError(
            f"`make_policy` must make a policy with name, reset, select_action and check_config, got a "
            f"{type(policy).__name__} without {', '.join(missing)}. Wrap it as docs/own-agent.md does a plain function."
        )
    return policy


class _Crew:
    """The threads that carry out deliveries; one is the calling thread itself.

    Args:
        workers: how many.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._threads = ThreadPoolExecutor(workers) if workers > 1 else None

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """The function's values in the order of the items; begun at once where there are threads."""
        return map(function, items) if self._threads is None else self._threads.map(function, items)


class _SharedOut:
    """A coder that has the deliveries of a batch carried out by a crew, everyone a part of the episodes."""

    def __init__(self, coder: Coder, crew: _Crew) -> None:
        self._coder = coder
        self._crew = crew

    def __getattr__(self, name: str) -> Any:
        return getattr(self._coder, name)

    def deliver_batch(self, state: NDArray[Any], addresses: NDArray[np.uint64], device: NDArray[np.float32]) -> None:
        """See :class:`refine_env.coding.Coder`."""
        bounds = np.linspace(0, len(state), min(self._crew.workers, len(state)) + 1).astype(int)
        parts = [slice(start, stop) for start, stop in itertools.pairwise(bounds.tolist())]
        for _ in self._crew.map(lambda own: self._coder.deliver_batch(state[own], addresses[own], device[own]), parts):
            pass


class _Player:
    """A policy, made and checked, with the process that it plays.

    Args:
        entry: what is played.
        caches: the open caches by name; a further one is put in.
        batch_size: episodes at once; the last batch may be smaller.
        crew: carries out deliveries where episodes are played with latents.

    Attributes:
        process: of a whole batch, without latents.
        draws_key: equal for players that draw the same but for their SNRs.
        delivery_key: equal for players in whose systems the same deliveries leave the same.
    """

    def __init__(self, entry: Entry, caches: dict[str, TrajectoryCache], batch_size: int, crew: _Crew) -> None:
        self._settings = EnvSettings.from_kwargs({"split": "test", **entry.env_kwargs})
        name = self._settings.cache
        if name not in caches:
            caches[name] = self._settings.open_cache()
        self._cache = caches[name]
        self._crew = crew
        self.process = DecisionProcess(self._settings, batch_size, latents=False, cache=self._cache)
        config = self.process.config
        self._policy = _made(entry, config)
        self._policy.check_config(config)
        self._snr_db = config.single_snr_db("an evaluation")
        self._needs_latents = self.process.episodes.coder.error_needs_latents
        system = {key: value for key, value in config.to_dict().items() if key != "snr_db"}
        self.draws_key = json.dumps([name, self._settings.split, config.deadline, system["link"]])
        self.delivery_key = json.dumps([name, system])

    def play(
        self, seeds: Sequence[int], draws: Draws, first_episode: int, keep_devices: bool
    ) -> tuple[Table, list[Chain] | None, NDArray[np.float32]]:
        """Play one episode a seed to its end.

        Args:
            seeds: of the episodes (N,).
            draws: theirs.
            first_episode: number of the first of them.
            keep_devices: whether what the devices hold at the deadline is asked for.

        Returns:
            The rows, but for what the latents decide; the deliveries of every episode; and room for what the devices
            hold, float32 (N, M), or (0, M). Where episodes are played with latents all is there, and None stands for
            the deliveries.
        """
        count = len(seeds)
        process = self.process
        if self._needs_latents:  # made anew, since what N devices hold is the largest thing here
            process = DecisionProcess(self._settings, count, cache=self._cache)
            if self._crew.workers > 1:
                process.episodes.coder = cast(Coder, _SharedOut(process.episodes.coder, self._crew))
        elif count != len(process.episodes):
            process = DecisionProcess(self._settings, count, latents=False, cache=self._cache)
        config, state = process.config, process.episodes.state
        reset_policy(self._policy, count, draws.rates)
        process.begin(range(count), draws, {})
        nothing_delivered = state["latent_mse"].tolist()
        chains: list[list[tuple[int, int]]] = [[] for _ in seeds]
        while not process.episodes.finished().all():
            observation, info = process.observe().as_dicts()
            info["latent_mse"][:] = math.nan  # no policy is to know it, also where it is known
            process.step(process.check_actions(self._policy.select_action(observation, info)))
            delivered = np.flatnonzero(state["delivered"])
            steps, bits = state["device_step"][delivered].tolist(), state["device_bits"][delivered].tolist()
            for i, delivery in zip(delivered.tolist(), zip(steps, bits, strict=True), strict=True):
                chains[i].append(delivery)
        columns = [
            state[name].tolist()
            for name in (
                "trajectory",
                "latent_mse",
                "device_step",
                "device_bits",
                "num_deliveries",
                "bits_sent",
                "uplink_slots",
            )
        ]
        rows: Table = [
            {
                "agent": self._policy.name,
                "snr_db": self._snr_db,
                "episode": first_episode + i,
                "seed": seeds[i],
                "trajectory": trajectory,
                "latent_mse": latent_mse,
                "no_delivery_mse": nothing_delivered[i],
                "device_step": device_step,
                "device_bits": device_bits,
                "num_deliveries": num_deliveries,
                "bits_sent": bits_sent,
                "uplink_slots": uplink_slots,
                "coder": config.coder,
                "payload": config.payload,
                **dict.fromkeys(IMAGE_COLUMNS),
            }
            for i, (
                trajectory,
                latent_mse,
                device_step,
                device_bits,
                num_deliveries,
                bits_sent,
                uplink_slots,
            ) in enumerate(zip(*columns, strict=True))
        ]
        if self._needs_latents:
            return rows, None, process.episodes.device
        room = np.empty((count if keep_devices else 0, config.latent_dim), dtype=np.float32)
        return rows, [tuple(self._what_counts(chain)) for chain in chains], room

    def _what_counts(self, deliveries: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The deliveries from the last lossless one on, after which the device holds x_t whatever was before.

        All of them where a delivery depends on how many there were, as rotations do.
        """
        if self.process.episodes.coder.rotation:
            return deliveries
        lossless = (k for k in range(len(deliveries) - 1, 0, -1) if deliveries[k][1] == LOSSLESS_BITS)
        return deliveries[next(lossless, 0) :]


def _draw(players: Sequence[_Player], seeds: Sequence[int]) -> dict[int, Draws]:
    """What is random in a batch, by the player's ``id``; drawn once for all that share it."""
    sharing: dict[Any, list[_Player]] = {}
    for player in players:
        sharing.setdefault(player.draws_key, []).append(player)
    draws: dict[int, Draws] = {}
    for group in sharing.values():
        rngs = [seeding.np_random(seed)[0] for seed in seeds]
        for player, own in zip(group, draw_for_all([player.process for player in group], rngs), strict=True):
            draws[id(player)] = own
    return draws


class _Deliveries:
    """What was delivered in a batch of episodes, to be carried out trajectory by trajectory, each distinct chain once.

    Args:
        player: one of those whose episodes they are, for its cache and coder.
    """

    def __init__(self, player: _Player) -> None:
        self._cache = player.process.cache
        self._kind = player.process.config.payload
        self._coder = player.process.episodes.coder
        self._episodes: dict[int, list[tuple[dict[str, Any], Chain, NDArray[np.float32] | None]]] = {}
        self._keep_devices = False
        self._results: Iterator[_Result] = iter(())

    def add(self, rows: Table, chains: Sequence[Chain], held: NDArray[np.float32]) -> None:
        """Add episodes.

        Args:
            rows: theirs; :meth:`finish` fills in what the latents decide.
            chains: what was delivered, one a row.
            held: for what the devices hold at the deadline, float32 (N, M); or (0, M) to leave it out.
        """
        self._keep_devices |= len(held) > 0
        for i, (row, chain) in enumerate(zip(rows, chains, strict=True)):
            own = held[i] if len(held) > 0 else None
            self._episodes.setdefault(row["trajectory"], []).append((row, chain, own))

    def begin(self, crew: _Crew) -> None:
        """Have them carried out."""
        self._results = crew.map(self._carry_out, self._episodes)

    def _carry_out(self, trajectory: int) -> _Result:
        """All chains of one trajectory."""
        chains = sorted({(), *(chain for _, chain, _ in self._episodes[trajectory])})
        payload = self._cache.payload(trajectory, self._kind)
        patterns = payload.reshape(len(payload), -1).view(np.uint16)
        mse, devices = self._coder.score_chains(patterns, chains, keep_devices=self._keep_devices)
        return {chain: (value, k) for k, (chain, value) in enumerate(zip(chains, mse.tolist(), strict=True))}, devices

    def finish(self, progress: Callable[[int], None] | None) -> None:
        """Wait for it, and fill in the rows and what the devices hold.

        Args:
            progress: called with the number of episodes that have just ended.
        """
        for episodes, (found, devices) in zip(self._episodes.values(), self._results, strict=True):
            for row, chain, held in episodes:
                row["latent_mse"], place = found[chain]
                row["no_delivery_mse"] = found[()][0]
                if held is not None:
                    held[:] = devices[place]
            if progress is not None:
                progress(len(episodes))
        self._results = iter(())  # which refers to this object: the two would wait for the garbage collector


_Result = tuple[dict[Chain, tuple[float, int]], NDArray[np.float32]]
"""Latent MSE and place of every chain, and what the devices hold after them, (C, M) or (0, M)."""


@lru_cache(maxsize=2)
def resampling_counts(size: int, resamples: int, seed: int) -> NDArray[np.float64]:
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
    means = resampling_counts(values.size, resamples, seed) @ values / values.size
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
