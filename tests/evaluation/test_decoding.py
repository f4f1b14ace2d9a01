"""A device with a decoder: what it shows is E[x_0 | what it holds], where that helps, and the tables say so."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import agents
from refine_env import ConfigurationError, TrajectoryCache
from refine_env.evaluation import (
    DECODED_COLUMN,
    EPISODE_COLUMNS,
    DecodingScorer,
    DeviceDecoder,
    Entry,
    Table,
    roll_out,
    roll_out_many,
    summarize,
)
from refine_env.trajectories import generate_gaussian
from refine_env.trajectories.denoising import LinearDenoiser, measure_decoder, record_decoder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryCache:
    """12 ideal trajectories, T = 50, M = 4096, whose decoder has been measured."""
    folder = tmp_path_factory.mktemp("decoded") / "ideal"
    opened = generate_gaussian(folder, 12, (4, 32, 32), num_steps=50, seed=7)
    return record_decoder(opened, measure_decoder(opened, LinearDenoiser()))


def play(cache: TrajectoryCache, score: Any, payload: str = "latent", snr_db: float = -3.0, **kwargs: Any) -> Table:
    env_kwargs = {
        "cache": str(cache.path),
        "snr_db": snr_db,
        "coder": "closed_loop",
        "payload": payload,
        "bit_depths": [1, 2, 3, 4, 8, 16],
        **kwargs,
    }
    return roll_out(
        lambda config: agents.make("dp", config), env_kwargs=env_kwargs, episodes=40, seed=2, batch_size=16, score=score
    )


@pytest.mark.parametrize("payload", ["latent", "posterior_mean"])
@pytest.mark.parametrize("snr_db", [-9.0, -3.0, 6.0])
def test_simulated_means_are_those_of_the_closed_form(cache: TrajectoryCache, payload: str, snr_db: float) -> None:
    """Along the chains of an optimal policy, too: the mean of ν/(1 + ν) over 40 episodes of 6 trajectories."""
    observation = cache.device_observation(payload)
    expected: list[float] = []

    def note(rows: Table, latents: NDArray[np.float32]) -> list[Mapping[str, Any]]:
        for row in rows:
            noise = float(observation.noise_to_signal(row["device_step"], row["device_error"]))
            expected.append(noise / (1.0 + noise) if np.isfinite(noise) else 1.0)
        return [{}] * len(rows)

    rows = play(cache, DecodingScorer(DeviceDecoder(cache, LinearDenoiser()), note), payload, snr_db)
    decoded = np.array([row[DECODED_COLUMN] for row in rows])
    assert decoded.mean() == pytest.approx(np.mean(expected), rel=0.03)
    assert (decoded <= 1.01 * np.array([row["latent_mse"] for row in rows])).all()


def test_nothing_but_the_column_changes(cache: TrajectoryCache) -> None:
    plain = play(cache, None)
    decoded = play(cache, DecodingScorer(DeviceDecoder(cache, LinearDenoiser())))
    assert [{name: row[name] for name in row if name != DECODED_COLUMN} for row in decoded] == plain
    assert set(plain[0]) == set(EPISODE_COLUMNS)
    (summary,) = summarize(decoded)
    mean = np.mean([row[DECODED_COLUMN] for row in decoded])
    assert summary["decoded_latent_mse_low"] < summary[DECODED_COLUMN] == mean < summary["decoded_latent_mse_high"]
    assert not any(name.startswith(DECODED_COLUMN) for name in summarize(plain)[0])


def test_payloads_and_batches_may_be_mixed(cache: TrajectoryCache) -> None:
    kwargs = {"cache": str(cache.path), "snr_db": 0.0, "coder": "closed_loop"}
    payloads = ("latent", "posterior_mean")
    tables = roll_out_many(
        [Entry(lambda config: agents.make("dp", config), {**kwargs, "payload": payload}) for payload in payloads],
        episodes=20,
        seed=2,
        score=DecodingScorer(DeviceDecoder(cache, LinearDenoiser(), batch_size=3)),
    )
    for payload, table in zip(payloads, tables, strict=True):
        alone = roll_out(
            lambda config: agents.make("dp", config),
            env_kwargs={**kwargs, "payload": payload},
            episodes=20,
            seed=2,
            score=DecodingScorer(DeviceDecoder(cache, LinearDenoiser())),
        )
        assert table == alone


class Wrong(LinearDenoiser):
    """A decoder that makes everything worse."""

    def __call__(self, samples: Any, noise_to_signal: Any, prompts: Any) -> NDArray[np.float32]:
        return np.asarray(samples, dtype=np.float32) + 2.0


def test_where_the_curve_says_no_the_decoder_is_not_asked(tmp_path: Path) -> None:
    opened = generate_gaussian(tmp_path / "ideal", 6, (4, 8, 8), num_steps=50, seed=7)
    written = record_decoder(opened, measure_decoder(opened, Wrong()))
    rows = play(written, DecodingScorer(DeviceDecoder(written, Wrong())))
    assert [row[DECODED_COLUMN] for row in rows] == pytest.approx([row["latent_mse"] for row in rows], rel=1e-6)


def test_a_cache_without_curves_is_refused(gaussian_cache: Path) -> None:
    cache = TrajectoryCache.open(gaussian_cache)
    with pytest.raises(ConfigurationError, match="`cache` must hold what its decoder was measured to do"):
        DeviceDecoder(cache, LinearDenoiser())
    with pytest.raises(ConfigurationError, match="`cache` must hold what its decoder was measured to do"):
        play(cache, None, device_decoder="denoise")


def test_the_configuration_has_the_curve_where_it_is_asked_for(cache: TrajectoryCache) -> None:
    seen = []

    def make(config: Any) -> Any:
        seen.append(config)
        return agents.make("final-only", config)

    for choice in ("none", "denoise"):
        kwargs = {"cache": str(cache.path), "snr_db": 3.0, "device_decoder": choice}
        roll_out(make, env_kwargs=kwargs, episodes=1)
    assert seen[0].decoder_curve is None
    assert seen[1].decoder_curve == cache.decoder_curve("latent")
    with pytest.raises(ConfigurationError, match="`config` must be the one that final-only was made for"):
        agents.make("final-only", seen[0]).check_config(seen[1])
