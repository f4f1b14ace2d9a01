"""The bundled model, as it is in the repository."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from train.diffusion import emoji
from train.diffusion.emoji import Glyph

ROOT = Path(__file__).parents[3]

# Third-party warnings at import and load time; the project's own are still errors.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*lr_scheduler.step.*:UserWarning"
)


def test_bundled_model_is_small_and_half_precision(bundled: Path) -> None:
    assert sum(path.stat().st_size for path in bundled.rglob("*") if path.is_file()) <= 16_000_000
    safetensors = pytest.importorskip("safetensors.numpy")
    files = sorted(bundled.rglob("*.safetensors"))
    assert {path.parent.name for path in files} == {"vae", "unet", "text_encoder"}
    assert all(array.dtype == np.float16 for path in files for array in safetensors.load_file(path).values())


def test_bundled_scheduler_is_stable_diffusion_1_5_with_ddpm(bundled: Path) -> None:
    config = json.loads((bundled / "scheduler/scheduler_config.json").read_text())
    wanted = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "variance_type": "fixed_small",
        "clip_sample": False,
        "prediction_type": "epsilon",
        "timestep_spacing": "leading",
        "steps_offset": 1,
    }
    assert {key: config.get(key) for key in wanted} == wanted


def test_bundled_prompt_lists(bundled: Path) -> None:
    train, held = (
        (bundled / name).read_text(encoding="utf-8").splitlines()
        for name in ("prompts_train.txt", "prompts_heldout.txt")
    )
    assert len(set(train)) == len(train) > 3600
    assert len(set(held)) == len(held) > 150
    assert not set(train) & set(held)
    chosen = (ROOT / "cached_trajectories/default.prompts.txt").read_text(encoding="utf-8").splitlines()
    assert len(set(chosen)) == len(chosen) == 128
    assert set(chosen[:64]) <= set(train)
    assert set(chosen[64:]) <= set(held)


def test_bundled_prompt_lists_are_those_of_the_font(bundled: Path, font_glyphs: list[Glyph]) -> None:
    metrics = json.loads((bundled / "metrics.json").read_text())
    if metrics["glyphs"] != len(font_glyphs):
        pytest.skip("the model was trained on another version of the font")
    _, held = emoji.split(font_glyphs, 0.05, metrics["seeds"]["split_seed"])
    assert (bundled / "prompts_heldout.txt").read_text(encoding="utf-8").splitlines() == [g.prompt for g in held]


def test_bundled_model_loads_offline_and_samples(ldm, bundled: Path) -> None:
    from train.diffusion.pipeline import load_pipeline, sample

    pipeline = load_pipeline(bundled)
    assert pipeline.safety_checker is None
    side = pipeline.unet.config.sample_size
    assert pipeline.vae.config.sample_size == 4 * side
    images, latents = sample(pipeline, ["mouse face", "flag j p"], guidance_scale=2.0, steps=4)
    assert images.shape == (2, 3, 4 * side, 4 * side)
    assert 0.05 < float((latents**2).mean()) < 5
