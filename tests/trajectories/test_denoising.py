"""The device's decoder, on ideal trajectories in closed form and with a network: what it gives and what is recorded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from refine_env import CacheFormatError, ConfigurationError, NoiseSchedule, TrajectoryCache, cli
from refine_env.trajectories import generate_diffusers, generate_gaussian
from refine_env.trajectories.denoising import (
    NOISES,
    SHARES,
    LinearDenoiser,
    denoise,
    measure_decoder,
    open_denoiser,
    record_decoder,
)

from .manifests import read_values, write_values

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


@pytest.fixture
def cache(tmp_path: Path) -> TrajectoryCache:
    """8 ideal trajectories, T = 4, M = 4096; four of them are the train split."""
    schedule = NoiseSchedule([1.0, 0.95, 0.7, 0.3, 0.05])
    return generate_gaussian(
        tmp_path / "ideal", num_trajectories=8, latent_shape=(4, 32, 32), schedule=schedule, seed=3
    )


def test_measured_curves_are_the_closed_form(cache: TrajectoryCache) -> None:
    """ν/(1 + ν) of a Gaussian x_0; 16,384 values and the same noise at every point: 2 %."""
    record = measure_decoder(cache, open_denoiser(cache), seed=1)
    noises = np.array(NOISES)
    assert record.noise_decoded == pytest.approx(noises / (1.0 + noises), rel=0.02)
    for payload in ("latent", "posterior_mean"):
        observation = cache.device_observation(payload)
        for step in range(cache.num_steps):
            errors = np.array(SHARES) * observation.power[step]
            noise = observation.noise_to_signal(step, errors)
            assert record.decoded[payload][step] == pytest.approx(noise / (1.0 + noise), rel=0.03, abs=1e-4)
        assert np.ptp(record.decoded[payload][-1]) == 0.0  # nothing delivered: there is no coding error
    held = record.held["latent"]
    clean = 2.0 * (1.0 - np.sqrt(cache.schedule.alpha_bar))
    assert held[:, 0] == pytest.approx(clean, rel=0.06, abs=1e-4)
    assert (record.model, record.guidance_scale) == (None, 1.0)


def test_draws_and_seeds(cache: TrajectoryCache) -> None:
    one, again, other, two = (
        measure_decoder(cache, LinearDenoiser(), seed=seed, draws=draws).to_dict()["decoder_curves"]
        for seed, draws in ((1, 1), (1, 1), (2, 1), (1, 2))
    )
    assert one == again
    assert one != other
    assert one != two


def test_the_record_survives_the_manifest(cache: TrajectoryCache) -> None:
    before = (cache.path / "manifest.json").read_bytes()
    record = measure_decoder(cache, LinearDenoiser())
    written = record_decoder(cache, record)
    assert written.manifest.decoder is not None
    assert written.manifest.decoder.to_dict() == record.to_dict()
    written.verify(deep=True)
    assert written.manifest.recipe == cache.manifest.recipe
    curve = written.decoder_curve("latent")
    assert curve.distortion(2, 0.0) == pytest.approx(record.decoded["latent"][2, 0])
    # Without it the manifest is what it was, to the byte.
    values = json.loads((cache.path / "manifest.json").read_bytes())
    assert list(values)[-4:] == ["decoder", "decoder_curves", "shards", "manifest_sha256"]
    assert cache.manifest.to_bytes() == before


def test_a_cache_without_curves_says_how_to_measure_them(cache: TrajectoryCache) -> None:
    assert cache.manifest.decoder is None
    with pytest.raises(ConfigurationError, match="`cache` must hold what its decoder .* refine-env decoder ideal"):
        cache.decoder_curve("latent")
    with pytest.raises(ConfigurationError, match="`kind` must be one of"):
        cache.decoder_curve("pixels")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda v: v.pop("decoder_curves"), r"`decoder_curves` .* must be a list of objects"),
        (lambda v: v["decoder_curves"].pop(), r"`decoder_curves` .* must be curves of latent, posterior_mean, 5 steps"),
        (lambda v: v["decoder"].update(shares=[0.0]), r"`decoder.shares` .* ascend from 0 to less than 1"),
        (lambda v: v["decoder"].update(noise_to_signal=[0.0]), r"`decoder.noise_to_signal` .* positive numbers"),
        (lambda v: v["decoder"].update(draws=0), r"`decoder.draws` .* an integer >= 1"),
        (lambda v: v["decoder_curves"][3].update(held=[1.0]), r"`decoder_curves\[3\].held` .* shape \(10,\)"),
        (lambda v: v["decoder_curves"][3]["held"].__setitem__(0, -1.0), "`decoder_curves` .* none below 0"),
    ],
)
def test_what_is_no_record_is_named(cache: TrajectoryCache, change: object, named: str) -> None:
    record_decoder(cache, measure_decoder(cache, LinearDenoiser()))
    values = read_values(cache.path)
    change(values)  # type: ignore[operator]
    write_values(cache.path, values)
    with pytest.raises(CacheFormatError, match=named):
        TrajectoryCache.open(cache.path)


def test_the_command(cache: TrajectoryCache, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="^0$") as done:
        cli.main(["decoder", str(cache.path), "--seed", "5"])
    assert done.value.code == 0
    written = TrajectoryCache.open(cache.path)
    assert written.manifest.decoder is not None
    assert written.manifest.decoder.seed == 5
    assert f"holds the decoder's curves (manifest SHA-256 {written.sha256})" in capsys.readouterr().out
    first = hashlib.sha256((cache.path / "manifest.json").read_bytes()).hexdigest()
    with pytest.raises(SystemExit, match="^0$"):
        cli.main(["decoder", str(cache.path), "--seed", "5", "--quiet"])
    assert hashlib.sha256((cache.path / "manifest.json").read_bytes()).hexdigest() == first
    assert capsys.readouterr().out == ""
    for wrong in (("--draws", "0"), ("--draws", "101"), ("--model", "emoji")):
        with pytest.raises(SystemExit, match="^2$") as refused:
            cli.main(["decoder", str(cache.path), *wrong])
        assert refused.value.code == 2


def test_a_network_gives_the_estimates_that_the_cache_holds(tiny_model: Path, tmp_path: Path) -> None:
    """y_t of a sampler without guidance is the posterior mean of x_{t+1}, at the very timestep; and of any batch."""
    cache = generate_diffusers(
        tmp_path / "tiny", str(tiny_model), ["a", "b", "a b", "c"], num_steps=5, guidance_scale=1.0, batch_size=4
    )
    denoiser = open_denoiser(cache, str(tiny_model))
    observation = cache.device_observation("latent")
    for step in range(2, cache.num_steps + 1):
        held = np.stack([cache.latents(i)[step] for i in range(4)]).astype(np.float32)
        steps, errors, prompts = np.full(4, step), np.zeros(4), [cache.prompt(i) for i in range(4)]
        clean = np.stack([cache.clean_estimates(i)[step - 1] for i in range(4)]).astype(np.float32)
        # Of float16 latents.
        decoded = denoise(denoiser, observation, held, steps, errors, prompts)
        assert decoded == pytest.approx(clean, abs=5e-3 * float(np.abs(clean).max()))
        alone = denoise(denoiser, observation, held, steps, errors, prompts, batch_size=1)
        assert alone == pytest.approx(decoded, rel=1e-4, abs=1e-5)
    with pytest.raises(ConfigurationError, match="`batch_size` must be"):
        denoise(denoiser, observation, held, steps, errors, prompts, batch_size=0)


def test_guidance_takes_the_prompt_less_estimate(tiny_model: Path) -> None:
    from refine_env.trajectories.pipeline import LatentDenoiser

    x = np.random.default_rng(0).standard_normal((1, 4, 4, 4), dtype=np.float32)
    plain, guided, none = (
        LatentDenoiser(tiny_model, guidance_scale=scale)(x, [1.0], ["a"]) for scale in (1.0, 3.0, 0.0)
    )
    assert guided == pytest.approx(none + 3.0 * (plain - none), rel=1e-3, abs=1e-4)
    assert not np.allclose(plain, none)
