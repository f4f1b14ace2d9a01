"""Small systems that can be computed by hand, and small caches, shared by all tests."""

from __future__ import annotations

import importlib.util
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from hypothesis import settings

import refine_env
from refine_env import NoiseSchedule, SystemConfig, TrajectoryCache
from refine_env._store import DIRECTORY_VARIABLE
from refine_env.trajectories import generate_gaussian
from refine_env.trajectories.workers import draw_shards
from refine_env.trajectories.writer import CacheWriter
from tests.browser import browser

__all__ = ["browser"]

PARTS = {
    "lpips": ("torchvision", "lpips"),
    "dask": ("distributed",),
    "ray": ("ray",),
    "libraries": ("torchrl", "tianshou", "ray.rllib"),
    "site": ("sphinx", "furo", "myst_nb", "sphinx_design", "sphinx_copybutton", "ipykernel", "diffusers"),
    "extras": (),
}
"""Markers of the tests that run in an environment of their own, with the packages that each needs."""

# Gymnasium's checker tries every render mode, a window too.
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")

# The first call of a kernel compiles it: no test has a time limit.
settings.register_profile("refine-env", deadline=None)
settings.load_profile("refine-env")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-skips", action="store_true", help="a test that is skipped has failed")
    parser.addoption("--site", metavar="DIR", help="a site that is built already, for tests/test_site.py")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out what belongs to a part whose packages are not here."""
    for mark in item.iter_markers():
        missing = [name for name in PARTS.get(mark.name, ()) if importlib.util.find_spec(name) is None]
        if missing:
            pytest.skip(f"needs {' and '.join(missing)}")


def _fail_if_skipped(report: Any, config: pytest.Config) -> Any:
    if report.skipped and not hasattr(report, "wasxfail") and config.getoption("--no-skips"):
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid} must not be skipped here: {_reason(report)}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
    return _fail_if_skipped((yield), item.config)  # type: ignore[return-value]


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Iterator[None]:
    return _fail_if_skipped((yield), collector.config)  # type: ignore[return-value]


def _reason(report: Any) -> str:
    """Why a test, or all of a file, was skipped."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return str(reason).removeprefix("Skipped: ").splitlines()[0]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say what was left out, one line a reason."""
    left_out: Counter[str] = Counter()
    files: Counter[str] = Counter()
    for report in terminalreporter.stats.get("skipped", []):
        (files if isinstance(report, pytest.CollectReport) else left_out)[_reason(report)] += 1
    for reason in sorted({*left_out, *files}):
        counts = [(left_out[reason], "test"), (files[reason], "file")]
        what = " and ".join(f"{n} {noun}{'s' if n > 1 else ''}" for n, noun in counts if n)
        terminalreporter.write_line(f"left out: {what}: {reason}")


@pytest.fixture(scope="session", autouse=True)
def own_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is computed once is kept in the tests' own folder, not in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(DIRECTORY_VARIABLE, str(tmp_path_factory.mktemp("store")))
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(20261121)


@pytest.fixture(scope="session")
def gaussian_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 ideal trajectories from white Gaussian latents, T = 50, M = 256."""
    folder = tmp_path_factory.mktemp("caches") / "gaussian"
    generate_gaussian(folder, num_trajectories=16, latent_shape=(4, 8, 8), num_steps=50, seed=7)
    return folder


@pytest.fixture(scope="session")
def tiny_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 trajectories with T = 4 and M = 4."""
    folder = tmp_path_factory.mktemp("caches") / "tiny"
    schedule = NoiseSchedule([1.0, 0.9, 0.6, 0.3, 0.05])
    generate_gaussian(folder, num_trajectories=4, latent_shape=(1, 2, 2), schedule=schedule, seed=3)
    return folder


@pytest.fixture
def tiny_config() -> SystemConfig:
    """T = 4, T_d = 8, M = 4, 𝓑 = {1, 2, 16}; the prompt is 6 bits, so the numbers can be followed by hand."""
    return SystemConfig(
        snr_db=0.0,
        latent_dim=4,
        schedule=NoiseSchedule([1.0, 0.9, 0.6, 0.3, 0.05]),
        bit_depths=(1, 2, 16),
        deadline=8,
        link=refine_env.LinkConfig(uplink_bits=6.0, symbols_per_slot=0.05, reference_latent_dim=None),
    )


@pytest.fixture
def tiny_kwargs(tiny_cache: Path) -> dict[str, Any]:
    """The environment arguments that describe ``tiny_config``."""
    return {
        "cache": str(tiny_cache),
        "snr_db": 0.0,
        "bit_depths": [1, 2, 16],
        "deadline": 8,
        "link": {"uplink_bits": 6.0, "symbols_per_slot": 0.05, "reference_latent_dim": None},
        "split": "all",
    }


@pytest.fixture
def make_env(gaussian_cache: Path) -> Callable[..., gym.Env[Any, Any]]:
    """``gym.make`` on the small Gaussian cache."""

    def make(**kwargs: Any) -> gym.Env[Any, Any]:
        return gym.make(refine_env.ENV_ID, **{"cache": str(gaussian_cache), **kwargs})

    return make


@pytest.fixture(scope="session")
def reuse_cache(gaussian_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last 20 steps of the ideal trajectories, as of a generation that starts at midpoints.

    Beside each stands, as the x_0 of its full run, that of the next trajectory.
    """
    ordinary = TrajectoryCache.open(gaussian_cache)
    step, count = 20, len(ordinary)
    own = [ordinary.seed(index) for index in range(count)]
    reuse = {
        "mode": "switch",
        "ratio": 0.6,
        "num_steps": ordinary.num_steps,
        "step": step,
        "stage_one_model": None,
        "with_full": True,
        "prompt_source": None,
        "sources": [{"prompt": "another", "seeds": [seed]} for seed in own],
    }
    recipe = replace(
        ordinary.manifest.recipe, alpha_bar=tuple(ordinary.schedule.alpha_bar[: step + 1].tolist()), reuse=reuse
    )
    folder = tmp_path_factory.mktemp("caches") / "reuse"

    def sample(start: int, stop: int, report: Callable[[float], None]) -> Iterator[Any]:
        for index in range(start, stop):
            full = ordinary.latents((index + 1) % count)[:1]
            yield ordinary.latents(index)[None, : step + 1], ordinary.clean_estimates(index)[None, :step], full[None]

    with CacheWriter(folder, recipe) as writer:
        for summary in draw_shards(sample, writer.staging, recipe, writer.missing(), lambda done: None):
            writer.add(summary)
        writer.finish()
    return folder
