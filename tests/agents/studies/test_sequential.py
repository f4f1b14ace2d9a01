"""Sequential schemes, generation in few steps, and what each ingredient is worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.evaluate import main
from agents.figures import draw_all
from agents.studies import few_steps, sequential
from agents.studies.few_steps import cache_name, few_step_cache
from agents.studies.sequential import ReferenceScorer, curves, read_sequential, summarize_sequential
from refine_env import CacheError, ConfigurationError, TrajectoryCache
from refine_env.trajectories import generate_diffusers, generate_gaussian
from tests.processes import run

pytestmark = pytest.mark.extras

PROMPTS = ["red apple", "mobile phone"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small cache of the bundled model."""
    folder = tmp_path_factory.mktemp("few")
    generate_diffusers(folder / "small", "emoji", PROMPTS, num_steps=4, guidance_scale=2.0, batch_size=2, num_train=1)
    return folder


@pytest.fixture(autouse=True)
def few(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches in that folder, and few numbers of steps."""
    monkeypatch.setattr(few_steps, "FOLDER", here)
    monkeypatch.setattr(sequential, "FEW_STEPS", (2, 4))


def test_few_step_caches_begin_with_the_same_noise(here: Path) -> None:
    origin = TrajectoryCache.open(here / "small")
    for sampler in few_steps.SAMPLERS:
        made = few_step_cache(origin, sampler, 2)
        assert made.path.name == cache_name(origin, sampler, 2) == f"small-{sampler.replace('++', '')}-2"
        assert made.num_steps == 2
        assert [made.prompt(i) for i in range(2)] == PROMPTS
        assert made.indices("test").tolist() == origin.indices("test").tolist()
        for i in range(2):
            np.testing.assert_array_equal(made.latents(i)[-1], origin.latents(i)[-1])
        before = made.sha256
        assert few_step_cache(origin, sampler, 2).sha256 == before  # it is not made twice


def test_more_steps_come_closer_to_many(here: Path) -> None:
    """Both samplers follow the same differential equation from the same noise."""
    origin = TrajectoryCache.open(here / "small")
    many = np.array([few_step_cache(origin, "ddim", 200).latents(i)[0] for i in range(2)], dtype=np.float64)
    for sampler in few_steps.SAMPLERS:
        errors = []
        for steps in (2, 4, 20):
            clean = np.array([few_step_cache(origin, sampler, steps).latents(i)[0] for i in range(2)], dtype=np.float64)
            errors.append(float(np.square(clean - many).mean()))
        assert errors[0] > 2.0 * errors[2], (sampler, errors)
        assert errors[2] < 0.02


def test_another_guidance(here: Path) -> None:
    origin = TrajectoryCache.open(here / "small")
    made = few_step_cache(origin, "ddpm", 4, guidance_scale=5.0)
    assert made.manifest.recipe.guidance_scale == 5.0
    assert made.path.name == "small-ddpm-4-guidance-5"
    np.testing.assert_array_equal(made.latents(0)[-1], origin.latents(0)[-1])


def test_what_stands_there_already(here: Path, tmp_path: Path) -> None:
    origin = TrajectoryCache.open(here / "small")
    generate_gaussian(tmp_path / cache_name(origin, "ddim", 3), 2, (4, 16, 16), num_steps=3)
    with pytest.raises(CacheError, match=r"must hold the prompts of 'small' by the model emoji .* Delete it"):
        few_step_cache(origin, "ddim", 3, folder=tmp_path)
    ideal = generate_gaussian(tmp_path / "ideal", 4, (4, 4, 4), num_steps=3)
    with pytest.raises(ConfigurationError, match=r"`cache` must come from a diffusion model .* got 'ideal'"):
        few_step_cache(ideal, "ddim", 3, folder=tmp_path)


def test_scores_against_other_caches(here: Path) -> None:
    origin = TrajectoryCache.open(here / "small")
    other = few_step_cache(origin, "ddim", 2)
    score = ReferenceScorer({"own": origin, "other": other})
    held = np.stack([origin.latents(i)[0].reshape(-1) for i in (1, 0)]).astype(np.float32)
    rows = score([{"trajectory": 1}, {"trajectory": 0}], held)
    assert [row["own"] for row in rows] == [0.0, 0.0]
    for row, i in zip(rows, (1, 0), strict=True):
        apart = origin.latents(i)[0].astype(np.float64) - other.latents(i)[0].astype(np.float64)
        assert row["other"] == pytest.approx(np.square(apart).mean(), rel=1e-5)


def test_gains_are_ratios_of_paired_means() -> None:
    rng = np.random.default_rng(0)
    table: list[dict[str, Any]] = []
    for curve in curves("ddpm", 50):
        for episode in range(20):
            mse = float(rng.uniform(0.5, 1.0)) * (2.0 if curve.agent == "final-only" else 1.0)
            row = {**curve._asdict(), "snr_db": 6.0, "episode": episode, "latent_mse": mse}
            own = curve.sampler == "ddpm"
            table.append({**row, "mse_50": None if own else mse + curve.steps, "mse_200": None if own else mse})
    cells, gains = summarize_sequential(table)
    assert len(cells) == len(curves("ddpm", 50))
    assert all((cell["mse_50"] is None) == (cell["sampler"] == "ddpm") for cell in cells)

    def mean(agent: str, coder: str) -> float:
        rows = [r for r in table if (r["sampler"], r["agent"], r["coder"]) == ("ddpm", agent, coder)]
        return float(np.mean([row["latent_mse"] for row in rows]))

    for gain, (over, under) in sequential.GAINS.items():
        (row,) = (row for row in gains if row["gain"] == gain)
        assert row["ratio"] == pytest.approx(mean(*over) / mean(*under))
        assert row["ratio_low"] < row["ratio"] < row["ratio_high"]
    (few,) = (row for row in gains if row["gain"] == "fewer steps, sequential, ddim")
    options = [cell["mse_200"] for cell in cells if (cell["sampler"], cell["agent"]) == ("ddim", "dp-final")]
    assert few["ratio"] == pytest.approx(options[-1] / min(options))


def test_command(here: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(
        main,
        *("--study", "sequential", "--cache", here / "small", "--episodes", "3", "--snr-db", "3,9", "--deadline", "12"),
        *("--out", out, "--workers", "1"),
    )
    assert {path.name for path in out.iterdir()} == {
        *("episodes.csv", "sequential.csv", "gains.csv", "run.json", "sequential.png", "sequential.pdf")
    }
    described = json.loads((out / "run.json").read_text())
    assert described["study"] == "sequential"
    cells, _ = read_sequential(out)
    assert len(cells) == 2 * len(curves("ddpm", 4)) == 2 * len(described["curves"])
    for cell in cells:
        if cell["sampler"] != "ddpm" and cell["steps"] == 50:
            assert cell["mse_50"] == pytest.approx(cell["latent_mse"])
    before = (out / "sequential.png").read_bytes()
    draw_all(out, tmp_path / "again")
    assert (tmp_path / "again" / "sequential.png").read_bytes() == before
