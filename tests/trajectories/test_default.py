"""The bundled cache is what it says: whole, made by the bundled model, test prompts of held-out glyphs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from refine_env import CacheFormatError, NoiseSchedule, TrajectoryCache
from refine_env.trajectories import Manifest
from refine_env.trajectories.pipeline import _fingerprint

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "refine_env" / "models" / "emoji"


@pytest.fixture(scope="module")
def cache() -> TrajectoryCache:
    return TrajectoryCache.open("default")


def prompts_of(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()


def test_whole(cache: TrajectoryCache) -> None:
    assert cache.path == ROOT / "cached_trajectories" / "default"
    cache.verify(deep=True)
    assert cache.manifest.is_sealed


def test_any_changed_byte_of_the_manifest_is_found(cache: TrajectoryCache, rng: np.random.Generator) -> None:
    raw = (cache.path / "manifest.json").read_bytes()
    for position in rng.choice(len(raw), 400, replace=False):
        changed = bytearray(raw)
        changed[position] ^= int(rng.integers(1, 256))
        with pytest.raises(CacheFormatError, match="manifest.json"):
            Manifest.from_bytes(bytes(changed), "manifest.json")


def test_made_by_the_bundled_model_as_it_is(cache: TrajectoryCache) -> None:
    recipe = cache.manifest.recipe
    assert recipe.model == {"id": "emoji", "revision": _fingerprint(MODEL)}
    assert recipe.scheduler is not None
    assert recipe.scheduler["class"] == "DDPMScheduler"
    config = recipe.scheduler["config"]
    assert (config["variance_type"], config["clip_sample"]) == ("fixed_small", False)
    assert recipe.timesteps == tuple(20 * (t - 1) + 1 for t in range(50, 0, -1))
    assert recipe.note is not None
    assert "SIL Open Font License" in recipe.note


def test_schedule_is_that_of_stable_diffusion(cache: TrajectoryCache) -> None:
    """The model computes its schedule in float32."""
    assert cache.schedule.alpha_bar == pytest.approx(NoiseSchedule.stable_diffusion().alpha_bar, rel=1e-4)


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
