"""Model against simulation: agreement on ideal trajectories, closed forms by hand, tables and command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agents.studies.distortion import (
    DIFFUSION_COLUMNS,
    QUANTIZATION_COLUMNS,
    default_transmissions,
    offsets_db,
    read_distortion_table,
    tabulate_diffusion,
    tabulate_quantization,
)
from refine_env import ConfigurationError, TrajectoryCache
from refine_env.coding import LloydMax, base_distortion
from refine_env.evaluation import bootstrap_interval, write_table
from refine_env.metrics import mean_square_error
from refine_env.trajectories import generate_gaussian
from tests.processes import run_module

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def ideal(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryCache:
    """40 ideal trajectories of M = 1024: 40,960 values a step, relative standard error of a variance 0.7 %, 0.03 dB."""
    return generate_gaussian(tmp_path_factory.mktemp("ideal") / "cache", 40, (4, 16, 16), seed=11)


def test_the_diffusion_model_is_exact_on_ideal_trajectories(ideal: TrajectoryCache) -> None:
    """[K] Eq. (9), within five standard errors at every step."""
    table = tabulate_diffusion(ideal, range(40))
    assert [row["step"] for row in table] == list(range(51))
    assert np.abs(offsets_db(table)).max() < 0.15
    assert offsets_db(table).size == 50


def test_the_quantization_model_is_exact_on_ideal_trajectories(ideal: TrajectoryCache) -> None:
    """[K] Eq. (10) wherever a quantizer's cells are many times hit; the tails of b = 8 are the noisiest."""
    table = tabulate_quantization(ideal, range(40), (1, 3, 5, 8))
    assert len(table) == 4 * len(default_transmissions(50))
    assert np.abs(offsets_db(table)).max() < 0.25


def test_an_offset_is_seen(ideal: TrajectoryCache) -> None:
    """Latents shrunk by 2 leave a quarter of Eq. (9): −6.02 dB more."""

    class Shrunk:
        num_steps, schedule = ideal.num_steps, ideal.schedule

        @staticmethod
        def latents(index: int) -> Any:
            return ideal.latents(index) / np.float16(2.0)

    table = tabulate_diffusion(Shrunk(), range(40))  # type: ignore[arg-type]
    assert offsets_db(table) == pytest.approx(-6.02, abs=0.15)


def test_simulated_values_are_means_over_trajectories(ideal: TrajectoryCache) -> None:
    table = tabulate_diffusion(ideal, (3, 7))
    for step in (0, 1, 30, 50):
        latents = [ideal.latents(index).astype(np.float64) for index in (3, 7)]
        errors = np.array([np.mean((x[step] - x[0]) ** 2) for x in latents])
        row = table[step]
        assert row["simulated"] == pytest.approx(errors.mean())
        assert (row["simulated_low"], row["simulated_high"]) == bootstrap_interval(errors)
        assert row["trajectories"] == 2
    assert (table[0]["model"], table[0]["simulated"], table[0]["offset_db"]) == (0.0, 0.0, None)
    assert table[50]["offset_db"] == pytest.approx(10 * np.log10(table[50]["simulated"] / table[50]["model"]))


def test_a_refinement_s_error_written_out(ideal: TrajectoryCache) -> None:
    """[K] Eqs. (4)–(7) in NumPy: first transmission of x_0, and x_30 to a device that holds x_40 exactly."""
    (first, refined) = tabulate_quantization(ideal, (5,), (3,), [(50, 0), (40, 30)])
    x = ideal.latents(5).astype(np.float64)
    alpha_bar = ideal.schedule.alpha_bar
    quantize = LloydMax(3).quantize
    assert first["simulated"] == pytest.approx(np.mean((quantize(x[0]) - x[0]) ** 2), rel=1e-4)
    assert first["model"] == base_distortion(3)
    gain, scale = np.sqrt(alpha_bar[30] / alpha_bar[40]), np.sqrt((alpha_bar[30] - alpha_bar[40]) / alpha_bar[40])
    received = gain * x[40] + scale * quantize((x[30] - gain * x[40]) / scale)
    assert refined["simulated"] == pytest.approx(np.mean((received - x[30]) ** 2), rel=1e-4)
    assert refined["model"] == pytest.approx(scale**2 * base_distortion(3))


def test_image_errors_are_those_of_the_decoded_steps(gaussian_cache: Path) -> None:
    def decoder(latents: Any) -> Any:
        return np.clip(0.5 + 0.1 * np.asarray(latents, dtype=np.float32)[:, :3].transpose(0, 2, 3, 1), 0, 1)

    cache = TrajectoryCache.open(gaussian_cache)
    calls: list[int] = []
    table = tabulate_diffusion(cache, (1, 2), decoder, calls.append)
    for step in (0, 20):
        errors = [
            mean_square_error(decoder(cache.latents(i)[:1]), decoder(cache.latents(i)[step][None])) for i in (1, 2)
        ]
        assert table[step]["image_mse"] == pytest.approx(np.mean(errors))
    assert calls == [1, 1]
    assert tabulate_diffusion(cache, (1,))[20]["image_mse"] is None


def test_transmissions_of_short_processes() -> None:
    assert default_transmissions(50) == [(50, 0), (40, 30), (10, 0), (1, 0)]
    assert default_transmissions(1) == [(1, 0)]
    assert all(held > sent for T in range(1, 20) for held, sent in default_transmissions(T))


def test_tables_survive_the_disk(gaussian_cache: Path, tmp_path: Path) -> None:
    cache = TrajectoryCache.open(gaussian_cache)
    for name, table, columns in (
        ("fig2a.csv", tabulate_diffusion(cache, range(3)), DIFFUSION_COLUMNS),
        ("fig2b.csv", tabulate_quantization(cache, range(3), (2, 9)), QUANTIZATION_COLUMNS),
    ):
        write_table(tmp_path / name, table, columns)
        assert read_distortion_table(tmp_path / name, columns) == table
    with pytest.raises(ConfigurationError, match=r"`fig2a.csv` must have the columns .* python -m agents.distortion"):
        read_distortion_table(tmp_path / "fig2a.csv", QUANTIZATION_COLUMNS)


def test_command_line(gaussian_cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run_module("agents.distortion", "--cache", str(gaussian_cache), "--trajectories", "5", "--out", str(out))
    assert result.returncode == 0, result.stderr
    assert "No images: `cache` must hold latents of a model" in result.stdout
    assert "Fig. 2a: simulation over model" in result.stdout
    assert {path.name for path in out.iterdir()} == {
        "fig2a.csv", "fig2b.csv", "run.json", "fig2a.png", "fig2a.pdf", "fig2b.png", "fig2b.pdf",
    }  # fmt: skip
    run = json.loads((out / "run.json").read_text())
    assert run["cache"]["sha256"] == TrajectoryCache.open(gaussian_cache).sha256
    assert (run["split"], run["trajectories"], run["model"]) == ("test", 5, None)
    table = read_distortion_table(out / "fig2a.csv", DIFFUSION_COLUMNS)
    assert table == tabulate_diffusion(TrajectoryCache.open(gaussian_cache), range(8, 13))
