"""Timings of the parts: ``pytest tests/benchmarks --benchmark-only``; for ratios see ``python -m agents.benchmark``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import agents
import refine_env
from agents.policies.dynamic_programming import Solution, independent_slots
from refine_env import SystemConfig
from refine_env.coding import LloydMax, kernels
from refine_env.evaluation import Entry, roll_out_many
from refine_env.link import draw_gains, slot_rates, total_power
from refine_env.trajectories import generate_gaussian
from tests.twin import refine

M = 16384


@pytest.fixture(scope="session")
def paper_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 ideal trajectories of the paper's size."""
    folder = tmp_path_factory.mktemp("caches") / "paper"
    generate_gaussian(folder, num_trajectories=16, latent_shape=(4, 64, 64), num_steps=50, seed=7)
    return folder


@pytest.mark.parametrize("bits", [3, 4, 8, 10])
@pytest.mark.parametrize("plain", [False, True], ids=["kernel", "searchsorted"])
def test_refinement(benchmark: Any, rng: np.random.Generator, bits: int, plain: bool) -> None:
    quantizer = LloydMax(bits)
    held = rng.standard_normal(M, dtype=np.float32)
    latent = (0.9 * held + np.sqrt(0.19) * rng.standard_normal(M)).astype(np.float16)
    if plain:
        levels, thresholds = quantizer.levels.astype(np.float32), quantizer.thresholds.astype(np.float32)
        benchmark(refine, latent, held, 0.9, np.sqrt(0.19), levels, thresholds)
        return
    device = np.empty_like(held)

    def restored() -> tuple[tuple[Any, ...], dict[str, Any]]:
        device[:] = held
        return (latent.view(np.uint16), device, 0.9, float(np.sqrt(0.19)), quantizer.table), {}

    benchmark.pedantic(kernels.refine, setup=restored, rounds=2000, warmup_rounds=10)


@pytest.mark.parametrize("snr_db", [0.0, 12.0, 24.0])
def test_waterfilling_of_600_slots(benchmark: Any, rng: np.random.Generator, snr_db: float) -> None:
    benchmark(slot_rates, draw_gains(rng, 600, 60), total_power(snr_db, 60), 70.0)


def test_gains_of_600_slots(benchmark: Any, rng: np.random.Generator) -> None:
    out = np.empty((600, 60))
    benchmark(draw_gains, rng, 600, 60, out)


@pytest.mark.parametrize("name", [refine_env.ENV_ID, "CartPole-v1"])
def test_single_env(benchmark: Any, name: str) -> None:
    env = gym.make(name)
    env.reset(seed=0)

    def step() -> None:
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            env.reset()

    benchmark.pedantic(step, rounds=100, iterations=200, warmup_rounds=5)


@pytest.mark.parametrize("count", [1, 16, 256, 1024])
def test_vector_env(benchmark: Any, count: int) -> None:
    """Whole episodes, with their resets."""
    envs = gym.make_vec(refine_env.ENV_ID, num_envs=count)
    envs.reset(seed=0)
    actions = [envs.action_space.sample() for _ in range(61)]

    def episode() -> None:
        for one in actions:
            envs.step(one)

    benchmark.pedantic(episode, rounds=20, warmup_rounds=1)


def test_lookahead_table(benchmark: Any) -> None:
    benchmark(agents.make, "lookahead", SystemConfig(snr_db=6.0))


@pytest.mark.parametrize("bit_depths", [(3, 4, 8, 10, 16), tuple(range(1, 17))])
def test_dynamic_programming_tables(benchmark: Any, bit_depths: tuple[int, ...]) -> None:
    """All tables of one SNR at the paper's size, the law at hand."""
    config = SystemConfig(snr_db=0.0, coder="closed_loop", bit_depths=bit_depths)
    knowledge = independent_slots(config.rate_law, config, 1)
    benchmark(Solution, config, knowledge)


@pytest.mark.parametrize("workers", [1, 2])
def test_evaluation(benchmark: Any, paper_cache: Path, workers: int) -> None:
    """Three policies at three SNRs, 64 episodes each."""
    entries = [
        Entry(partial(agents.make, name), {"cache": str(paper_cache), "snr_db": snr_db, "split": "all"})
        for snr_db in (0.0, 6.0, 15.0)
        for name in ("lookahead", "persistent-q3", "persistent-q8")
    ]
    benchmark.pedantic(
        partial(roll_out_many, entries, episodes=64, workers=workers), rounds=5, iterations=1, warmup_rounds=1
    )
