"""The bundled caches are what they say: whole, of the bundled models, their test prompts held-out glyphs and scenes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from refine_env import CacheFormatError, NoiseSchedule, TrajectoryCache
from refine_env.radiomap import other_transmitters
from refine_env.trajectories import Manifest
from refine_env.trajectories.pipeline import _fingerprint

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "refine_env" / "models" / "emoji"


@pytest.fixture(scope="module")
def cache() -> TrajectoryCache:
    return TrajectoryCache.open("default")


def prompts_of(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(("name", "model"), [("default", "emoji"), ("radiomap", "radiomap")])
def test_whole(name: str, model: str) -> None:
    cache = TrajectoryCache.open(name)
    assert cache.path == ROOT / "cached_trajectories" / name
    cache.verify(deep=True)
    assert cache.manifest.is_sealed
    recipe = cache.manifest.recipe
    assert recipe.model == {"id": model, "revision": _fingerprint(ROOT / "refine_env" / "models" / model)}
    assert recipe.scheduler is not None
    assert recipe.scheduler["class"] == "DDPMScheduler"
    config = recipe.scheduler["config"]
    assert (config["variance_type"], config["clip_sample"]) == ("fixed_small", False)
    assert recipe.timesteps == tuple(20 * (t - 1) + 1 for t in range(50, 0, -1))
    assert cache.schedule.alpha_bar == pytest.approx(NoiseSchedule.stable_diffusion().alpha_bar, rel=1e-4)


def test_any_changed_byte_of_the_manifest_is_found(cache: TrajectoryCache, rng: np.random.Generator) -> None:
    raw = (cache.path / "manifest.json").read_bytes()
    for position in rng.choice(len(raw), 400, replace=False):
        changed = bytearray(raw)
        changed[position] ^= int(rng.integers(1, 256))
        with pytest.raises(CacheFormatError, match="manifest.json"):
            Manifest.from_bytes(bytes(changed), "manifest.json")


def test_the_license_of_what_the_model_was_trained_on(cache: TrajectoryCache) -> None:
    assert cache.manifest.recipe.note is not None
    assert "SIL Open Font License" in cache.manifest.recipe.note


def test_radio_maps_are_of_two_transmitters_a_scene() -> None:
    """Train and test have no scene in common, and every trajectory its scene and truth."""
    cache = TrajectoryCache.open("radiomap")
    assert (len(cache), cache.latent_shape, cache.num_steps) == (64, (4, 16, 16), 50)
    seeds = [k for first in (0, 10**6) for k in range(first, first + 16)]
    assert [cache.prompt(k) for k in range(64)] == [f"scene {seed}{end}" for seed in seeds for end in ("", " b")]
    assert cache.indices("train").tolist() == list(range(32))
    assert cache.conditions is not None
    assert cache.conditions.shape == (64, 3, 64, 64)
    assert other_transmitters(cache.conditions).tolist() == [k ^ 1 for k in range(64)]
    assert cache.truth is not None
    assert cache.truth.shape == (64, 64, 64)
    assert not cache.truth[cache.conditions[:, 0] >= 0.5].any()  # nothing is received inside buildings
    assert 0.7 < (cache.truth > 51).mean() / (cache.conditions[:, 0] < 0.5).mean() < 0.95  # above the noise floor
    assert 0.8 < cache.mean_square[0] < 1.2


def test_prompts_and_splits(cache: TrajectoryCache) -> None:
    assert len(cache) == 128
    assert cache.indices("train").tolist() == list(range(64))
    assert cache.indices("test").tolist() == list(range(64, 128))
    prompts = [cache.prompt(i) for i in range(128)]
    assert prompts == prompts_of(ROOT / "cached_trajectories" / "default.prompts.txt")
    assert len(set(prompts)) == 128
    assert set(prompts[:64]) <= set(prompts_of(MODEL / "prompts_train.txt"))
    assert set(prompts[64:]) <= set(prompts_of(MODEL / "prompts_heldout.txt"))


def test_latents_are_in_the_model_s_units(cache: TrajectoryCache) -> None:
    """x_T is standard noise (128·1024 values: standard error 0.4 % of the mean square), x_0 of about unit power."""
    noise = np.array([cache.latents(i)[-1] for i in range(128)], dtype=np.float64)
    assert (noise**2).mean() == pytest.approx(1.0, abs=0.02)
    assert 0.8 < cache.mean_square[0] < 1.1
    assert cache.mmse[0] == 0.0
    # The estimates of x_0 get better with every step, and the first is better than none (t = T).
    assert (np.diff(cache.mmse) > 0.0).all()


def test_its_decoder_s_curves_are_those_of_the_bundled_model(cache: TrajectoryCache) -> None:
    """Measured again at some of the points: what another library or machine does to the last digits is below 1 %."""
    pytest.importorskip("diffusers")
    from refine_env.trajectories.denoising import denoise, open_denoiser

    record = cache.manifest.decoder
    assert record is not None
    assert (record.model, record.guidance_scale) == (cache.manifest.recipe.model, 1.0)
    denoiser = open_denoiser(cache)
    indices = cache.indices("train").tolist()
    clean = np.stack([cache.latents(i)[0] for i in indices]).astype(np.float32)
    for payload, step in (("latent", 50), ("latent", 20), ("posterior_mean", 20)):
        held = np.stack([cache.initial(i, payload) if step == 50 else cache.payload(i, payload)[step] for i in indices])
        decoded = denoise(
            denoiser,
            cache.device_observation(payload),
            held.astype(np.float32),
            np.full(len(indices), step),
            np.zeros(len(indices)),
            [cache.prompt(i) for i in indices],
        )
        found = np.square(decoded - clean, dtype=np.float64).mean()
        assert found == pytest.approx(record.decoded[payload][step, 0], rel=0.01)
