"""The paper's recipe from end to end, on Stable Diffusion v1-5's own architecture, narrow, with random weights."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from refine_env import NoiseSchedule, TrajectoryCache, cli
from refine_env.trajectories import read_prompts

from .models import SD15_CHECKER, SD15_LATENT_SHAPE, SD15_SCHEDULER
from .test_prompts import ROWS, record, write_csv

pytest.importorskip("diffusers")

ROOT = Path(__file__).parents[2]
HUB_ID = "stable-diffusion-v1-5/stable-diffusion-v1-5"


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit, match=r"^\d+$") as end:
        cli.main(["generate", "diffusers", *map(str, arguments)])
    assert isinstance(end.value.code, int)
    return end.value.code


def test_is_the_original_s_architecture(sd15_model: Path) -> None:
    """As its model_index.json and configuration files have it, but for the widths."""
    index = json.loads((sd15_model / "model_index.json").read_bytes())
    assert {name: value[1] for name, value in index.items() if isinstance(value, list)} == {
        "feature_extractor": "CLIPImageProcessor",
        "safety_checker": "StableDiffusionSafetyChecker",
        "scheduler": "PNDMScheduler",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
        "unet": "UNet2DConditionModel",
        "vae": "AutoencoderKL",
    } | ({"image_encoder": None} if "image_encoder" in index else {})
    assert not (sd15_model / "safety_checker").exists()
    unet = json.loads((sd15_model / "unet" / "config.json").read_bytes())
    assert unet["down_block_types"] == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert unet["up_block_types"] == ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    assert (unet["layers_per_block"], unet["attention_head_dim"], unet["norm_num_groups"]) == (2, 8, 32)
    assert [width // unet["block_out_channels"][0] for width in unet["block_out_channels"]] == [1, 2, 4, 4]
    vae = json.loads((sd15_model / "vae" / "config.json").read_bytes())
    assert len(vae["block_out_channels"]) == 4
    assert (vae["latent_channels"], vae["scaling_factor"], vae["sample_size"]) == (4, 0.18215, 512)
    assert (
        json.loads((sd15_model / "scheduler" / "scheduler_config.json").read_bytes()).items()
        >= dict(SD15_SCHEDULER).items()
    )


def test_from_a_table_to_a_cache(sd15_model: Path, tmp_path: Path) -> None:
    table = write_csv(tmp_path / "metadata.csv", [record(*row) for row in ROWS])
    choice = ("--prompts", table, "--num-prompts", 2, "--prompt-seed", 1, "--max-nsfw", 0.5)
    settings = ("--num-steps", 2, "--guidance-scale", 7.5, "--batch-size", 1, "--quiet")
    assert run("--model", sd15_model, *choice, *settings, "--out", tmp_path / "cache") == 0
    cache = TrajectoryCache.open(tmp_path / "cache")
    cache.verify()
    assert (len(cache), cache.latent_shape, cache.latent_dim, cache.num_steps) == (2, SD15_LATENT_SHAPE, 16384, 2)
    selection = read_prompts(table, num_prompts=2, seed=1, max_nsfw=0.5)
    assert [cache.prompt(index) for index in range(2)] == list(selection)
    recipe = cache.manifest.recipe
    assert recipe.prompt_source == selection.source
    assert recipe.prompt_source["file"] == "metadata.csv"
    assert str(tmp_path).encode() not in (cache.path / "manifest.json").read_bytes()
    assert recipe.scheduler is not None
    assert recipe.scheduler["class"] == "DDPMScheduler"
    np.testing.assert_allclose(cache.schedule.alpha_bar, NoiseSchedule.stable_diffusion(2).alpha_bar, rtol=1e-5)
    # x_T is standard noise; 2·16384 values: standard error of the mean square 0.8 %.
    assert cache.mean_square[-1] == pytest.approx(1.0, abs=0.04)
    assert sum(shard.bytes for shard in cache.manifest.shards) == pytest.approx(2 * 5 * 16384 * 2, rel=0.01)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision(sd15_model: Path, tmp_path: Path, dtype: str) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n")
    settings = ("--num-steps", 1, "--guidance-scale", 1, "--batch-size", 1, "--dtype", dtype, "--quiet")
    arguments = ("--model", sd15_model, "--prompts", tmp_path / "prompts.txt", *settings)
    assert run(*arguments, "--out", tmp_path / "cache") == 0
    cache = TrajectoryCache.open(tmp_path / "cache")
    assert cache.manifest.recipe.model_dtype == dtype
    assert cache.mean_square[-1] == pytest.approx(1.0, abs=0.06)
    assert 0.01 < cache.mean_square[0] < 100


@pytest.mark.parametrize("offline", [True, False], ids=["told-so", "no-network"])
def test_without_the_weights(tmp_path: Path, offline: bool) -> None:
    """One sentence, that names the command that gets them; nothing is left behind."""
    (tmp_path / "prompts.txt").write_text("a cat\n")
    done = run_apart(tmp_path, HUB_ID, offline=offline)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: `model` must be within reach, got '{HUB_ID}', which is neither in the")
    assert f"Run `hf download {HUB_ID} --local-dir FOLDER` on a connected machine" in done.stderr
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "cache.partial").exists()


def run_apart(folder: Path, model: str, *, offline: bool) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with the hub's cache in ``folder/hub`` and no way to the network."""
    nowhere = "http://127.0.0.1:9"  # a proxy that nobody is
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")} | {
        "HF_HOME": str(folder / "hub"),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HTTPS_PROXY": nowhere,
        "HTTP_PROXY": nowhere,
        "PYTHONPATH": str(ROOT),
    }
    arguments = ["--model", model, "--prompts", "prompts.txt", "--out", "cache", "--num-steps", "2"]
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "refine_env.cli", "generate", "diffusers", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_from_the_hub_s_cache_without_a_network(tiny_model: Path, tmp_path: Path) -> None:
    """Downloaded before, without the safety checker that its index names; the hub's commit is in the manifest."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "hub" / "models--someone--model"
    shutil.copytree(tiny_model, repository / "snapshots" / commit)
    index = repository / "snapshots" / commit / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_bytes()) | SD15_CHECKER))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    done = run_apart(tmp_path, "someone/model", offline=True)
    assert done.returncode == 0, done.stderr
    assert TrajectoryCache.open(tmp_path / "cache").manifest.recipe.model == {"id": "someone/model", "revision": commit}


def test_the_advice_is_a_command_that_exists() -> None:
    hf = Path(sys.executable).with_name("hf")
    if not hf.exists():
        pytest.skip("huggingface_hub's command is not beside this Python")
    done = subprocess.run([str(hf), "download", "--help"], capture_output=True, text=True, check=True)
    assert "--local-dir" in done.stdout
    assert "--include" in done.stdout
    assert "--repo-type" in done.stdout
