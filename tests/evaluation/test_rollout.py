"""Many policies at once: equal to one after the other and to plain NumPy, and nothing done twice."""

from __future__ import annotations

import itertools
import tracemalloc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils import seeding
from numpy.typing import NDArray

import agents
import refine_env
from agents.evaluate import DEFAULT_AGENTS, evaluate
from agents.policies.lookahead import Lookahead
from refine_env import CacheError, ConfigurationError, SystemConfig, TrajectoryCache
from refine_env.coding import CODERS, ForwardCoder, base_distortion
from refine_env.dynamics.process import DecisionProcess, draw_for_all
from refine_env.dynamics.settings import EnvSettings
from refine_env.evaluation import IMAGE_COLUMNS, Entry, Table, play_episode, roll_out, roll_out_many
from refine_env.link.channel import ChannelModel
from refine_env.model.distortion import total_distortion
from refine_env.trajectories import generate_gaussian
from tests.twin import Twin, lookahead_table, plain_rule, waterfilling_rates

SNRS_DB = (0.0, 6.0, 15.0, 30.0)


def entry(name: str, **kwargs: Any) -> Entry:
    return Entry(partial(agents.make, name), kwargs)


@pytest.fixture
def entries(gaussian_cache: Path, tiny_kwargs: dict[str, Any]) -> list[Entry]:
    """Policies that share draws and systems, some of them, and some that share neither."""
    cache = str(gaussian_cache)
    return [
        *(entry(name, cache=cache, snr_db=snr_db) for snr_db in SNRS_DB for name in ("lookahead", "random")),
        entry("random", cache=cache, snr_db=15.0, split="all"),
        entry("persistent-q3", cache=cache, snr_db=15.0, deadline=55),
        entry("persistent-q4", cache=cache, snr_db=15.0, bit_depths=[4, 16]),
        entry("persistent-q3", cache=cache, snr_db=15.0, link={"num_subchannels": 30}),
        entry("lookahead", cache=cache, snr_db=6.0, decision_epochs=True),
        entry("random", cache=cache, snr_db=15.0, coder="closed_loop"),
        entry("random", cache=cache, snr_db=15.0, coder="closed_loop", sent_scale=False),
        entry("persistent-q16", **tiny_kwargs),
        entry("random", **tiny_kwargs),
    ]


def keep_devices(
    kept: list[NDArray[np.float32]],
) -> Callable[[Table, NDArray[np.float32]], Sequence[Mapping[str, Any]]]:
    """A score that keeps what the devices hold."""

    def score(rows: Table, held: NDArray[np.float32]) -> Sequence[Mapping[str, Any]]:
        kept.append(held.copy())
        return [{"psnr_db": float(values.sum())} for values in held]

    return score


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("batch_size", [4, 256])
def test_many_at_once_are_each_alone(entries: list[Entry], workers: int, batch_size: int) -> None:
    alone = [roll_out(*e[:1], env_kwargs=e.env_kwargs, episodes=13, seed=4, batch_size=batch_size) for e in entries]
    ended: list[int] = []
    tables = roll_out_many(entries, episodes=13, seed=4, batch_size=batch_size, workers=workers, progress=ended.append)
    assert tables == alone
    assert sum(ended) == 13 * len(entries)


@pytest.mark.parametrize("workers", [1, 3])
def test_scores_do_not_depend_on_the_workers(entries: list[Entry], workers: int) -> None:
    kept: list[NDArray[np.float32]] = []
    ended: list[int] = []
    tables = roll_out_many(
        entries, episodes=7, seed=4, batch_size=4, workers=workers, progress=ended.append, score=keep_devices(kept)
    )
    plain = roll_out_many(entries, episodes=7, seed=4, batch_size=4)
    assert [[{**row, **dict.fromkeys(IMAGE_COLUMNS)} for row in table] for table in tables] == plain
    assert ended == [4] * len(entries) + [3] * len(entries)
    devices = [np.concatenate(kept[k :: len(entries)]) for k in range(len(entries))]
    for one, table, held in zip(entries, tables, devices, strict=True):
        cache = TrajectoryCache.open(one.env_kwargs["cache"])
        for row, values in zip(table, held, strict=True):
            clean = cache.latents(row["trajectory"])[0].ravel().astype(np.float64)
            assert np.mean((values - clean) ** 2) == pytest.approx(row["latent_mse"], rel=1e-12, abs=1e-300)
            assert row["psnr_db"] == float(values.sum())


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("scored", [False, True])
def test_play_with_latents_gives_the_same(
    gaussian_cache: Path, monkeypatch: pytest.MonkeyPatch, workers: int, scored: bool
) -> None:
    """What a coder whose error depends on the latents needs, on a coder that does not."""
    cache = str(gaussian_cache)
    entries = [
        entry(name, cache=cache, snr_db=snr_db, decision_epochs=epochs)
        for snr_db in SNRS_DB
        for name in ("lookahead", "persistent-q3", "random", "final-only")
        for epochs in (False, True)
    ]
    kept: tuple[list[NDArray[np.float32]], ...] = ([], [])
    run = partial(roll_out_many, entries, episodes=11, seed=1, batch_size=4, workers=workers)
    expected = run(score=keep_devices(kept[0]) if scored else None)
    monkeypatch.setattr(ForwardCoder, "error_needs_latents", True, raising=False)
    monkeypatch.setattr(ForwardCoder, "score_chains", None)
    assert run(score=keep_devices(kept[1]) if scored else None) == expected
    for one, other in zip(*kept, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("coder", CODERS)
@pytest.mark.parametrize("sent_scale", [False, True])
def test_rows_are_the_environment_s_episodes(gaussian_cache: Path, coder: str, sent_scale: bool) -> None:
    """Lossless deliveries in the middle of a chain included, after which what was before leaves no trace."""
    kwargs = {"cache": str(gaussian_cache), "snr_db": 24.0, "coder": coder, "sent_scale": sent_scale}
    table = roll_out(partial(agents.make, "random"), env_kwargs=kwargs, episodes=6, seed=2, batch_size=1)
    env = gym.make(refine_env.ENV_ID, split="test", **kwargs)
    agent = agents.make("random", env.unwrapped.config)  # type: ignore[attr-defined]
    middle = 0
    for row in table:
        observation, info = env.reset(seed=row["seed"])
        assert info["latent_mse"] == row["no_delivery_mse"]
        agent.reset(1)
        terminated = False
        while not terminated:
            before = observation["device_bits"]
            observation, _, terminated, _, info = env.step(agent.select_action(observation, info))
            middle += before == 16 and info["delivered"]
        assert info["latent_mse"] == row["latent_mse"]
        assert info["bits_sent"] == row["bits_sent"]
    assert middle > 3


SYSTEMS: dict[str, dict[str, Any]] = {
    "forward": {},
    "closed-loop": {"coder": "closed_loop"},
    "model-scale": {"coder": "closed_loop", "sent_scale": False},
    "no-rotation": {"coder": "closed_loop", "sent_scale": False, "rotation": False},
    "posterior-mean": {"coder": "closed_loop", "payload": "posterior_mean", "sent_scale": False},
    "entropy-coded": {"coder": "closed_loop", "entropy_coding": True},
}
"""Coders and payloads, with latents in play and without."""


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("name", agents.names())
def test_what_is_shown_before_the_deadline_is_the_environment_s(gaussian_cache: Path, name: str, system: str) -> None:
    kwargs = {"cache": str(gaussian_cache), **agents.env_kwargs(name), **SYSTEMS[system], "snr_db": 9.0}
    if name.startswith("lookahead") and kwargs.get("coder") == "closed_loop" and name != "lookahead-closed-loop":
        kwargs["decision_epochs"] = True  # slots that are run through count, too
    target = 0.02
    make = partial(agents.make, name, neglect_errors=True)
    table = roll_out(make, env_kwargs=kwargs, episodes=3, seed=2, batch_size=1, anytime=True, target_mse=target)
    plain = roll_out(make, env_kwargs=kwargs, episodes=3, seed=2, batch_size=1)
    assert [{key: row[key] for key in other} for row, other in zip(table, plain, strict=True)] == plain
    env = gym.make(refine_env.ENV_ID, split="test", **{**kwargs, "decision_epochs": False})
    agent = make(env.unwrapped.config)  # type: ignore[attr-defined]
    for row in table:
        shown = [step.info["latent_mse"] for step in play_episode(env, agent, seed=row["seed"])][1:]
        assert len(shown) == 60
        assert shown[-1] == row["latent_mse"]
        assert row["anytime_mse"] == pytest.approx(np.mean(shown), rel=1e-12)
        assert row["slots_to_target"] == next((n for n, mse in enumerate(shown, 1) if mse < target), 61)


def test_slots_to_an_easy_and_to_a_hopeless_target(gaussian_cache: Path) -> None:
    for target, slots in ((1e3, 1), (1e-30, 61)):
        (rows,) = roll_out_many([entry("persistent-q3", cache=str(gaussian_cache))], episodes=4, target_mse=target)
        assert [row["slots_to_target"] for row in rows] == [slots] * 4
        assert "anytime_mse" not in rows[0]


@pytest.mark.parametrize("workers", [1, 3])
def test_many_courses_at_once_are_each_alone(entries: list[Entry], workers: int) -> None:
    run = partial(roll_out_many, episodes=9, seed=4, batch_size=4, anytime=True, target_mse=0.01, workers=workers)
    alone = [run([one])[0] for one in entries]
    assert run(entries) == alone
    kept: list[NDArray[np.float32]] = []
    scored = run(entries, score=keep_devices(kept))
    assert [[{**row, **dict.fromkeys(IMAGE_COLUMNS)} for row in table] for table in scored] == alone


def test_no_policy_learns_the_latent_mse(gaussian_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Curious(agents.Agent):
        def decide(self, observation: Any, legal: Any) -> Any:
            return np.ones(legal.shape, dtype=np.int64)

        def select_action(self, observation: Any, info: Any) -> Any:
            assert np.isnan(info["latent_mse"]).all()
            return super().select_action(observation, info)

    for needs_latents in (False, True):
        monkeypatch.setattr(ForwardCoder, "error_needs_latents", needs_latents, raising=False)
        rows = roll_out(
            lambda config: Curious(config, name="curious"), env_kwargs={"cache": str(gaussian_cache)}, episodes=2
        )
        assert all(row["num_deliveries"] > 0 and row["latent_mse"] > 0.0 for row in rows)


WARM_STARTS = [
    {"step": 35, "shared": False},
    {"step": 35, "shared": True, "name_bits": 500.0},
    {"step": 10, "shared": True},
]


@pytest.mark.parametrize(
    ("name", "snr_db", "start"),
    [
        *itertools.product(DEFAULT_AGENTS, SNRS_DB, [None]),
        *itertools.product(("lookahead", "persistent-q3", "final-only"), (0.0, 6.0), WARM_STARTS),
    ],
)
def test_evaluation_is_that_of_plain_numpy(
    gaussian_cache: Path, name: str, snr_db: float, start: dict[str, Any] | None
) -> None:
    """The MSE to 1e-6: the same float32 arithmetic, but the last bits of rates and of the mean."""
    kwargs = {"cache": str(gaussian_cache), "snr_db": snr_db, "split": "all", "warm_start": start}
    cache = TrajectoryCache.open(gaussian_cache)
    config = EnvSettings.from_kwargs(kwargs).config_for(cache)
    twin = Twin(cache, config, "all", plain_rule(name, config))
    for row in roll_out(partial(agents.make, name), env_kwargs=kwargs, episodes=25, seed=8):
        plain = twin.play(row["seed"])
        assert plain["trajectory"] == row["trajectory"]
        assert len(plain["chain"]) == row["num_deliveries"]
        if plain["chain"]:
            assert plain["chain"][-1] == (row["device_step"], row["device_bits"])
        assert plain["latent_mse"] == pytest.approx(row["latent_mse"], rel=1e-6, abs=1e-300)


@pytest.mark.parametrize("variant", [{}, {"literal": True}, {"tight": True}], ids=["paper", "literal", "tight"])
@pytest.mark.parametrize("snr_db", [-5.0, 6.0, 27.0])
def test_lookahead_table_is_that_of_plain_numpy(snr_db: float, variant: dict[str, bool]) -> None:
    config = SystemConfig(snr_db=snr_db)
    agent = Lookahead(config, **variant)
    distortion = total_distortion(config.schedule, np.array([base_distortion(bits) for bits in config.bit_depths]))
    plain = lookahead_table(
        distortion,
        agent.latency,
        config.deadline,
        slack=int(variant.get("tight", False)),
        literal=variant.get("literal", False),
    )
    np.testing.assert_array_equal(agent.table, plain)


def test_plain_waterfilling_by_hand() -> None:
    """Floors 1, 2, 4 and power 2: the level is 2.5, over two of three."""
    rates = waterfilling_rates(np.array([[1.0, 0.25, 0.5]]), 2.0, 3.0)
    assert rates == pytest.approx(3.0 * (np.log2(2.5) + np.log2(1.25)))


@pytest.mark.parametrize("link", [None, {"csi_delay": 2, "num_subchannels": 7}])
def test_draws_for_all_are_the_draws_of_each(gaussian_cache: Path, link: dict[str, Any] | None) -> None:
    """To the bit, over several chunks of episodes."""
    processes = [
        DecisionProcess(EnvSettings(snr_db=snr_db, cache=str(gaussian_cache), link=link), 1, latents=False)
        for snr_db in (6.0, -3.0, 6.0, 30.0)
    ]
    seeds = range(21)
    rngs = [seeding.np_random(seed)[0] for seed in seeds]
    for process, draws in zip(processes, draw_for_all(processes, rngs), strict=True):
        own = [seeding.np_random(seed)[0] for seed in seeds]
        expected = process.draw(own)
        np.testing.assert_array_equal(draws.trajectories, expected.trajectories)
        np.testing.assert_array_equal(draws.rates, expected.rates)


def test_nothing_is_done_twice(gaussian_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches opened, policies made, channels drawn, and chains carried out: each once, for 4 SNRs and 3 policies."""
    counts: Counter[str] = Counter()
    carried_out: list[tuple[int, tuple[Any, ...]]] = []
    open_cache, draw_gains, score_chains = TrajectoryCache.open, ChannelModel.draw_gains, ForwardCoder.score_chains

    def counted_open(cache: Any) -> TrajectoryCache:
        counts["open"] += 1
        return open_cache(cache)

    def counted_draw(*args: Any, **kwargs: Any) -> NDArray[np.float64]:
        counts["draw"] += 1
        return draw_gains(*args, **kwargs)

    def noted_chains(self: ForwardCoder, latents: NDArray[np.uint16], chains: Any, **kwargs: Any) -> Any:
        carried_out.extend((latents.ctypes.data, chain) for chain in chains)
        return score_chains(self, latents, chains, **kwargs)

    def make(name: str, config: SystemConfig) -> agents.Agent:
        counts["make"] += 1
        return agents.make(name, config)

    monkeypatch.setattr(TrajectoryCache, "open", counted_open)
    monkeypatch.setattr(ChannelModel, "draw_gains", counted_draw)
    monkeypatch.setattr(ForwardCoder, "score_chains", noted_chains)
    entries = [
        Entry(partial(make, name), {"cache": str(gaussian_cache), "snr_db": snr_db})
        for snr_db in SNRS_DB
        for name in ("persistent-q3", "persistent-q16", "final-only")
    ]
    tables = roll_out_many(entries, episodes=40, seed=0)
    assert counts == {"open": 1, "make": len(entries), "draw": 40}
    assert len(carried_out) == len(set(carried_out))
    # Of Persistent-Q16 only the last delivery counts, and Final-Only's are among these.
    lossless = {key for key in carried_out if key[1] and key[1][0][1] == 16}
    assert lossless
    assert all(len(chain) == 1 for _, chain in lossless)
    ends = {(row["trajectory"], row["device_step"]) for table in tables for row in table if row["device_bits"] == 16}
    assert len(lossless) == len(ends)


def test_the_comparison_makes_its_policies_once(
    gaussian_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from agents import evaluate as module

    made: list[tuple[str, Any]] = []
    make = agents.make

    def noted(name: str, config: SystemConfig) -> agents.Agent:
        made.append((name, config.snr_db))
        return make(name, config)

    monkeypatch.setattr(agents, "make", noted)
    module.main(
        agent_names="lookahead,random", snr_db="0,6", episodes=3, out=tmp_path, cache=str(gaussian_cache), figures=False
    )
    assert sorted(made) == [(name, snr_db) for name in ("lookahead", "random") for snr_db in (0.0, 6.0)]


@pytest.mark.parametrize("workers", [1, 2])
def test_a_delivery_that_fails_ends_the_evaluation(
    gaussian_cache: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    def fail(self: TrajectoryCache, index: int, kind: str) -> Any:
        raise CacheError(f"trajectory {index} cannot be read")

    monkeypatch.setattr(TrajectoryCache, "payload", fail)
    entries = [entry("persistent-q3", cache=str(gaussian_cache), snr_db=6.0)] * 2
    with pytest.raises(CacheError, match=r"trajectory \d+ cannot be read"):
        roll_out_many(entries, episodes=30, batch_size=10, workers=workers)


def test_arguments_out_of_range(gaussian_cache: Path) -> None:
    good = entry("persistent-q3", cache=str(gaussian_cache))
    assert roll_out_many([], episodes=3) == []
    with pytest.raises(ConfigurationError, match="`workers` must be an integer >= 1, got 0"):
        roll_out_many([good], episodes=3, workers=0)
    with pytest.raises(ConfigurationError, match="`batch_size` must be an integer >= 1, got 0"):
        roll_out_many([good], episodes=3, batch_size=0)
    for target in (0.0, -1.0):
        with pytest.raises(ConfigurationError, match=f"`target_mse` must be > 0, got {target}. Give a latent MSE"):
            roll_out_many([good], episodes=3, target_mse=target)
    with pytest.raises(ConfigurationError, match="`anytime` must be True or False, got 1"):
        roll_out_many([good], episodes=3, anytime=1)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="`env_kwargs` must leave `num_envs` to the roll-out, got 3"):
        roll_out_many([good, entry("random", num_envs=3)], episodes=3)


def peak_memory(run: Callable[[], Any]) -> int:
    """Bytes that ``run`` holds at most, files that are mapped not counted, without what it returns."""
    tracemalloc.start()
    result = run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    del result
    kept = before - tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return peak - kept


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("needs_latents", [False, True])
def test_memory_grows_with_neither_cache_nor_episodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needs_latents: bool, workers: int
) -> None:
    """Anonymous memory, at M = 2048; the larger cache has 26 MB, and what 128 devices hold is 1 MB."""
    for count in (8, 128):
        generate_gaussian(tmp_path / str(count), num_trajectories=count, latent_shape=(8, 16, 16), num_steps=50, seed=7)
    monkeypatch.setattr(ForwardCoder, "error_needs_latents", needs_latents, raising=False)

    def run(count: int, episodes: int) -> Any:
        entries = [
            entry(name, cache=str(tmp_path / str(count)), snr_db=snr_db, split="all")
            for name in ("persistent-q3", "persistent-q8", "final-only")
            for snr_db in SNRS_DB
        ]
        return roll_out_many(entries, episodes=episodes, batch_size=32, workers=workers)

    run(8, 1)  # what is compiled, and what is kept in tables
    small = peak_memory(lambda: run(8, 64))
    assert peak_memory(lambda: run(128, 64)) < small + 1_500_000
    assert peak_memory(lambda: run(128, 256)) < small + 1_500_000
    assert small < 8_000_000


def test_workers_of_the_command_change_no_table(gaussian_cache: Path) -> None:
    kwargs = {"cache": str(gaussian_cache)}
    run = partial(evaluate, ("lookahead", "random"), SNRS_DB, episodes=9, seed=3, env_kwargs=kwargs)
    assert run(workers=3) == run(workers=1)
    assert [(row["snr_db"], row["agent"], row["episode"]) for row in run()] == [
        (snr_db, name, k) for snr_db in SNRS_DB for name in ("lookahead", "random") for k in range(9)
    ]


class Model:
    """As Stable-Baselines3 has them."""

    name = "ppo"

    def predict(self, observation: Any) -> Any:
        return 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("lookahead", "`make_policy` must be a function that makes a policy from a SystemConfig, got a str. Give"),
        (Model(), "`make_policy` must be a function that makes a policy from a SystemConfig, got a Model. Give"),
        (lambda config: Model(), "got a Model without reset, select_action, check_config. Wrap it as docs/own-agent"),
        (lambda config: None, "got a NoneType without name, reset, select_action, check_config"),
    ],
)
def test_what_is_no_policy(gaussian_cache: Path, given: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        roll_out(given, env_kwargs={"cache": str(gaussian_cache)}, episodes=1)
