"""Paired roll-outs of policies: N episodes at once, latents touched only for what was delivered."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, cast

import numpy as np
from gymnasium.utils import seeding
from numpy.typing import NDArray

from refine_env._validation import check_flag, check_integer, check_positive
from refine_env.coding import LOSSLESS_BITS, Chain, Coder
from refine_env.coding.kernels import mean_square_error
from refine_env.config import SystemConfig
from refine_env.dynamics.process import FULL_LATENT_MSE, DecisionProcess, Draws, draw_for_all
from refine_env.dynamics.settings import EnvSettings
from refine_env.errors import ConfigurationError
from refine_env.evaluation.episode import Policy, reset_policy
from refine_env.evaluation.tables import IMAGE_COLUMNS, Table
from refine_env.trajectories import TrajectoryCache

__all__ = ["Entry", "Score", "episode_seeds", "roll_out", "roll_out_many"]

Score = Callable[[Table, NDArray[np.float32]], Sequence[Mapping[str, Any]]]
"""Further columns of finished episodes, one mapping per row, from the rows and the latents ŷ that the devices hold at
the deadline, float32 (N, M). These rows have one key more than the tables: ``device_error``, the coding error e of what
the device holds, which both ends know."""

_STATE_COLUMNS = (
    "trajectory",
    "latent_mse",
    "device_step",
    "device_bits",
    "num_deliveries",
    "bits_sent",
    "uplink_slots",
)


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
    anytime: bool = False,
    target_mse: float | None = None,
) -> Table:
    """Play episodes with one policy; episode k has the same seed whatever the policy, hence the same draws.

    An episode is that of the environment with the same seed, and the row says what its device holds, to the bit. But
    latents are touched only at the end: first the policy decides all slots of a batch, then what was delivered is
    carried out, once for all episodes in which it is the same. So the policy finds NaN in ``info["latent_mse"]``,
    which a real server does not know either.

    Args:
        make_policy: called once with the environment's configuration.
        env_kwargs: the environment's arguments; ``split`` defaults to ``"test"`` here.
        episodes: number of episodes.
        seed: seed of the evaluation.
        batch_size: episodes played at once; the table does not depend on it for a deterministic policy.
        progress: called with the number of episodes that have just ended.
        score: fills columns of :data:`IMAGE_COLUMNS`; called with every batch.
        anytime, target_mse: see :func:`roll_out_many`.

    Returns:
        One row per episode, columns :func:`refine_env.evaluation.episode_columns`.

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
        anytime=anytime,
        target_mse=target_mse,
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
    anytime: bool = False,
    target_mse: float | None = None,
) -> list[Table]:
    """:func:`roll_out` of many policies, or of one at many SNRs, with nothing done twice; the tables are the same.

    What is random is drawn once for all entries on the same cache, split, deadline and link, whatever their SNRs.
    What was delivered is carried out once for all entries whose systems differ in nothing but the SNR, common
    beginnings once, and nothing from before the last lossless delivery, which leaves no trace of it. Nothing of a
    batch is kept but its rows. Where a coder says that its predicted error depends on the latents
    (``error_needs_latents``), and policies observe it, episodes are played with latents instead, each for itself.

    Policies decide in the calling thread, in the order of the entries, batch by batch. Deliveries, compiled loops
    that need no interpreter, are carried out by ``workers`` threads beside it. So the tables do not depend on the
    number of workers, whatever the policy.

    Args:
        entries: policies with their environments' arguments.
        episodes: number of episodes of each entry.
        seed: seed of the evaluation.
        batch_size: episodes of each entry that are played at once; the tables do not depend on it for deterministic
            policies.
        workers: threads that carry out deliveries; with 1 the calling thread does that too.
        progress: called with the number of episodes that have just ended.
        score: fills columns of :data:`IMAGE_COLUMNS`; called, in the calling thread, with every batch of an entry.
        anytime: also the column ``anytime_mse``: the mean over slots 1 … T_d of the latent MSE that the device shows
            after each; what is delivered in a slot is shown after it.
        target_mse: also the column ``slots_to_target``: the first slot after which that MSE is below this value,
            T_d + 1 if it never is.

    Returns:
        For each entry one row per episode, columns :func:`refine_env.evaluation.episode_columns`.

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
    threads = _Workers(check_integer("workers", workers, 1, advice="Give the number of processor cores to use."))
    caches: dict[str, TrajectoryCache] = {}
    check_flag("anytime", anytime)
    if target_mse is not None:
        check_positive("target_mse", target_mse, advice="Give a latent MSE, for example 0.01, or leave it out.")
    course = _CourseScores(anytime, target_mse)
    runs = [_PolicyRun(entry, caches, size, threads, course) for entry in entries]
    tables: list[Table] = [[] for _ in entries]
    with threads:
        pending: list[_Deliveries] = []  # carried out while the policies decide the next batch
        for first in range(0, episodes, size):
            batch = seeds[first : first + size]
            started: dict[str, _Deliveries] = {}
            for run, draws, table in zip(runs, _draw(runs, batch), tables, strict=True):
                rows, courses, devices = run.play(batch, draws, first, keep_devices=score is not None)
                if score is not None:
                    if courses is not None:
                        own = _Deliveries(run)
                        own.add(rows, courses, devices)
                        own.start(threads)
                        own.fill_in(None)
                    for row, columns in zip(rows, score(rows, devices), strict=True):
                        row.update(columns)
                        del row["device_error"]
                elif courses is not None:
                    started.setdefault(run.delivery_key, _Deliveries(run)).add(rows, courses, devices)
                if progress is not None and (score is not None or courses is None):
                    progress(len(rows))
                table.extend(rows)
            for deliveries in started.values():
                deliveries.start(threads)
            for deliveries in pending:
                deliveries.fill_in(progress)
            pending = list(started.values())
        for deliveries in pending:
            deliveries.fill_in(progress)
    return tables


def _make_policy(entry: Entry, config: SystemConfig) -> Policy:
    """The entry's policy; raises ConfigurationError if it lacks what a roll-out asks of one."""
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
    policy.check_config(config)
    return policy


class _Workers:
    """The threads that carry out deliveries; a single worker is the calling thread itself.

    Args:
        count: how many there are.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._threads = ThreadPoolExecutor(count) if count > 1 else None

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._threads is not None:
            self._threads.shutdown(cancel_futures=True)

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """The function's values in the order of the items; threads start at once, the calling thread when asked."""
        return map(function, items) if self._threads is None else self._threads.map(function, items)


class _ParallelCoder:
    """A coder that splits the deliveries of a batch among the workers, each with a part of the episodes."""

    def __init__(self, coder: Coder, workers: _Workers) -> None:
        self._coder = coder
        self._workers = workers

    def __getattr__(self, name: str) -> Any:
        return getattr(self._coder, name)

    def deliver_batch(self, state: NDArray[Any], addresses: NDArray[np.uint64], device: NDArray[np.float32]) -> None:
        """See :class:`refine_env.coding.Coder`.

        The caller holds the memory behind ``addresses`` until this returns, which it does when all parts are done.
        """
        bounds = np.linspace(0, len(state), min(self._workers.count, len(state)) + 1).astype(int)
        parts = [slice(start, stop) for start, stop in itertools.pairwise(bounds.tolist())]

        def deliver(part: slice) -> None:
            self._coder.deliver_batch(state[part], addresses[part], device[part])

        for _ in self._workers.map(deliver, parts):  # taking the values waits for them, and raises what was raised
            pass


class _Course(NamedTuple):
    """What a device shows in the course of an episode.

    Attributes:
        slots: the slots from whose ends on it shows each of ``chains``; the first is 1.
        chains: what had been delivered, as far as it leaves a trace; the last one at the deadline.
    """

    slots: list[int]
    chains: list[Chain]


class _CourseScores(NamedTuple):
    """Which columns that depend on the course of an episode are asked for, see :func:`roll_out_many`."""

    anytime: bool
    target_mse: float | None

    @property
    def wanted(self) -> bool:
        """Whether any is."""
        return self.anytime or self.target_mse is not None

    def columns(self, slots: Sequence[int], mse: Sequence[float], deadline: int) -> dict[str, Any]:
        """The columns of an episode.

        Args:
            slots: as :class:`_Course` has them.
            mse: the latent MSE that the device shows from each of these on.
            deadline: T_d.
        """
        columns: dict[str, Any] = {}
        spans = list(zip(slots, [*slots[1:], deadline + 1], mse, strict=True))
        if self.anytime:
            columns["anytime_mse"] = sum((end - start) * value for start, end, value in spans) / deadline
        if self.target_mse is not None:
            below = (start for start, end, value in spans if start < end and value < self.target_mse)
            columns["slots_to_target"] = next(below, deadline + 1)
        return columns


class _PolicyRun:
    """A policy that has been made and checked, with the decision process in which it plays.

    Args:
        entry: the policy and its environment's arguments.
        caches: the open caches by name; a cache that is not among them is opened and added.
        batch_size: episodes that are played at once; the last batch may be smaller.
        workers: carry out the deliveries where episodes are played with latents.
        course_scores: the columns of the course that are asked for.

    Attributes:
        process: the process of a whole batch, without latents.
        draws_key: equal for runs whose draws differ in nothing but the SNR.
        delivery_key: equal for runs in whose systems the same deliveries leave the same latents.
    """

    def __init__(
        self,
        entry: Entry,
        caches: dict[str, TrajectoryCache],
        batch_size: int,
        workers: _Workers,
        course_scores: _CourseScores,
    ) -> None:
        self.course_scores = course_scores
        self._settings = EnvSettings.from_kwargs({"split": "test", **entry.env_kwargs})
        name = self._settings.cache
        if name not in caches:
            caches[name] = self._settings.open_cache()
        self._cache = caches[name]
        self._workers = workers
        self.process = DecisionProcess(self._settings, batch_size, latents=False, cache=self._cache)
        config = self.process.config
        self._policy = _make_policy(entry, config)
        self._snr_db = config.single_snr_db("an evaluation")
        self._needs_latents = self.process.episodes.coder.error_needs_latents
        system = {key: value for key, value in config.to_dict().items() if key != "snr_db"}
        self.draws_key = json.dumps([name, self._settings.split, config.deadline, system["link"]])
        self.delivery_key = json.dumps([name, system])

    def play(
        self, seeds: Sequence[int], draws: Draws, first_episode: int, keep_devices: bool
    ) -> tuple[Table, list[_Course] | None, NDArray[np.float32]]:
        """Play one episode per seed to its end.

        Args:
            seeds: the seeds of the episodes (N,).
            draws: what is random in these episodes.
            first_episode: number of the first of them.
            keep_devices: whether the latents that the devices hold at the deadline are asked for.

        Returns:
            The rows, without the columns that the latents decide; the course of every episode; and an array for
            what the devices hold, float32 (N, M), or (0, M), which :class:`_Deliveries` fills. Where episodes are
            played with latents, rows and array are complete, and the courses are None.
        """
        count = len(seeds)
        process = self.process
        if self._needs_latents:  # made for each batch, since the latents of N devices are the largest array here
            process = DecisionProcess(self._settings, count, cache=self._cache)
            if self._workers.count > 1:
                process.episodes.coder = cast(Coder, _ParallelCoder(process.episodes.coder, self._workers))
        elif count != len(process.episodes):
            process = DecisionProcess(self._settings, count, latents=False, cache=self._cache)
        config, state = process.config, process.episodes.state
        reset_policy(self._policy, count, draws.rates)
        process.begin(range(count), draws, {})
        nothing_delivered = state["latent_mse"].tolist()
        deliveries: list[list[tuple[int, int]]] = [[] for _ in seeds]
        slots: list[list[int]] = [[1] for _ in seeds]
        mse = [[value] for value in nothing_delivered]
        while not process.episodes.finished().all():
            observation, info = process.observe().as_dicts()
            info["latent_mse"][:] = math.nan  # no policy is to know it, not even where it is known
            info.pop(FULL_LATENT_MSE, None)
            process.step(process.check_actions(self._policy.select_action(observation, info)))
            delivered = np.flatnonzero(state["delivered"])
            steps, bits = state["device_step"][delivered].tolist(), state["device_bits"][delivered].tolist()
            for i, delivery in zip(delivered.tolist(), zip(steps, bits, strict=True), strict=True):
                deliveries[i].append(delivery)
            if self.course_scores.wanted:
                since = state["slot"][delivered] - state["slots_after"][delivered]
                values = state["latent_mse"][delivered].tolist()
                for i, slot, value in zip(delivered.tolist(), since.tolist(), values, strict=True):
                    slots[i].append(slot)
                    mse[i].append(value)
        rows: Table = [
            {
                "agent": self._policy.name,
                "snr_db": self._snr_db,
                "episode": first_episode + i,
                "seed": seeds[i],
                "no_delivery_mse": nothing_delivered[i],
                "coder": config.coder,
                "payload": config.payload,
                **dict(zip(_STATE_COLUMNS, values, strict=True)),
                **dict.fromkeys(IMAGE_COLUMNS),
            }
            for i, values in enumerate(zip(*(state[name].tolist() for name in _STATE_COLUMNS), strict=True))
        ]
        if keep_devices:
            for row, error in zip(rows, state["device_error"].tolist(), strict=True):
                row["device_error"] = error
        if self._needs_latents:
            for row, own_slots, own_mse in zip(rows, slots, mse, strict=True):
                row.update(self.course_scores.columns(own_slots, own_mse, config.deadline))
            if process.episodes.has_full:
                for row, value in zip(rows, state[FULL_LATENT_MSE].tolist(), strict=True):
                    row[FULL_LATENT_MSE] = value
            return rows, None, process.episodes.device
        devices = np.empty((count if keep_devices else 0, config.latent_dim), dtype=np.float32)
        return rows, [self._course(*episode) for episode in zip(slots, deliveries, strict=True)], devices

    def _course(self, slots: list[int], deliveries: list[tuple[int, int]]) -> _Course:
        """The course of an episode, or only what the device shows at the deadline where no more is asked for."""
        counts = range(len(deliveries) + 1) if self.course_scores.wanted else [len(deliveries)]
        return _Course(slots, [tuple(self._from_last_lossless(deliveries[:count])) for count in counts])

    def _from_last_lossless(self, deliveries: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """The deliveries from the last lossless one on, after which the device holds x_t whatever came before.

        With rotations all deliveries count, since a delivery then depends on how many came before it.
        """
        if self.process.episodes.coder.rotation:
            return deliveries
        lossless = (k for k in range(len(deliveries) - 1, 0, -1) if deliveries[k][1] == LOSSLESS_BITS)
        return deliveries[next(lossless, 0) :]


def _draw(runs: Sequence[_PolicyRun], seeds: Sequence[int]) -> list[Draws]:
    """What is random in a batch, one for each run; drawn once for all runs that share it."""
    sharing: dict[str, list[int]] = {}
    for k, run in enumerate(runs):
        sharing.setdefault(run.draws_key, []).append(k)
    draws: dict[int, Draws] = {}
    for group in sharing.values():
        # Every group begins with fresh generators: an episode's draws depend on its seed alone.
        rngs = [seeding.np_random(seed)[0] for seed in seeds]
        draws.update(zip(group, draw_for_all([runs[k].process for k in group], rngs), strict=True))
    return [draws[k] for k in range(len(runs))]


class _Deliveries:
    """The deliveries in a batch of episodes, carried out trajectory by trajectory, each distinct chain once.

    Args:
        run: one of the runs that played the episodes, for its cache and its coder.
    """

    def __init__(self, run: _PolicyRun) -> None:
        self._cache = run.process.cache
        self._kind = run.process.config.payload
        self._coder = run.process.episodes.coder
        self._deadline = run.process.config.deadline
        self._first_step = run.process.config.first_device_step
        self._course_scores = run.course_scores
        self._episodes: dict[int, list[tuple[dict[str, Any], _Course, NDArray[np.float32] | None]]] = {}
        self._keep_devices = False
        self._results: Iterator[_Result] = iter(())

    def add(self, rows: Table, courses: Sequence[_Course], devices: NDArray[np.float32]) -> None:
        """Add episodes.

        Args:
            rows: their rows; :meth:`fill_in` adds the columns that the latents decide.
            courses: what was delivered, one course per row.
            devices: an array for what the devices hold at the deadline, float32 (N, M); or (0, M) to leave it out.
        """
        self._keep_devices |= len(devices) > 0
        for i, (row, course) in enumerate(zip(rows, courses, strict=True)):
            device = devices[i] if len(devices) > 0 else None
            self._episodes.setdefault(row["trajectory"], []).append((row, course, device))

    def start(self, workers: _Workers) -> None:
        """Hand the trajectories to the workers."""
        self._results = workers.map(self._carry_out, self._episodes)

    def _carry_out(self, trajectory: int) -> _Result:
        """Carry out all chains of one trajectory."""
        chains = sorted({(), *(chain for _, course, _ in self._episodes[trajectory] for chain in course.chains)})
        latents = self._cache.payload(trajectory, self._kind)
        patterns = latents.reshape(len(latents), -1).view(np.uint16)
        mse, devices = self._coder.score_chains(
            patterns, chains, keep_devices=self._keep_devices or self._cache.has_full, first_step=self._first_step
        )
        full: list[float | None] = [None] * len(chains)
        if self._cache.has_full:
            clean = self._cache.full_latent(trajectory).reshape(-1).view(np.uint16)
            full = [float(mean_square_error(device, clean)) for device in devices]
        scores = zip(mse.tolist(), full, range(len(chains)), strict=True)
        return dict(zip(chains, scores, strict=True)), devices

    def fill_in(self, progress: Callable[[int], None] | None) -> None:
        """Wait for the results, and write them into the rows and the devices' arrays.

        Args:
            progress: called with the number of episodes that have just ended.
        """
        for episodes, (scores, devices) in zip(self._episodes.values(), self._results, strict=True):
            for row, course, device in episodes:
                row["latent_mse"], full, place = scores[course.chains[-1]]
                if full is not None:
                    row[FULL_LATENT_MSE] = full
                row["no_delivery_mse"] = scores[()][0]
                if self._course_scores.wanted:
                    shown = [scores[chain][0] for chain in course.chains]
                    row.update(self._course_scores.columns(course.slots, shown, self._deadline))
                if device is not None:
                    device[:] = devices[place]
            if progress is not None:
                progress(len(episodes))
        # The iterator refers to this object, and so both would wait for the garbage collector.
        self._results = iter(())


_Result = tuple[dict[Chain, tuple[float, float | None, int]], NDArray[np.float32]]
"""The latent MSE, that against the full run and the place of every chain, and what the devices hold after the chains,
(C, M) or (0, M)."""
