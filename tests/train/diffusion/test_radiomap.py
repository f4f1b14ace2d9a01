"""The training of the radio map model: a tiny run, resuming, its data, stages and assessment, the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refine_env.errors import ConfigurationError
from train.diffusion.radiomap.config import EXTRA, RadioMapConfig
from train.diffusion.radiomap.training import train

for module in EXTRA:
    pytest.importorskip(module, reason="the ldm extra is not installed")

import torch  # noqa: E402

from refine_env.radiomap import gray, other_transmitters, read_scale  # noqa: E402
from refine_env.trajectories import Reuse, generate_diffusers  # noqa: E402
from refine_env.trajectories.conditions import read_conditions  # noqa: E402
from refine_env.trajectories.pipeline import LatentDecoder, LatentSampler  # noqa: E402
from train.diffusion.networks import build_vae  # noqa: E402
from train.diffusion.propagation import received_power  # noqa: E402
from train.diffusion.radiomap.assess import assess, error_figures, truths  # noqa: E402
from train.diffusion.radiomap.data import Dataset, folded, load_planes, turned, unit, variants  # noqa: E402
from train.diffusion.radiomap.scene_file import scene_seed, write_scenes  # noqa: E402
from train.diffusion.radiomap.stages import RadioMapUnetStage, velocity_loss_weight  # noqa: E402
from train.diffusion.scenes import FIRST_TEST_SEED, conditions, make_scene, move_transmitter  # noqa: E402
from train.diffusion.unet import noise_loss_weight  # noqa: E402
from train.diffusion.vae import latent_moments, rescale, standardize, to_signal  # noqa: E402

ROOT = Path(__file__).parents[3]

# Third-party warnings at import and load time; the project's own are still errors.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*lr_scheduler.step.*:UserWarning"
)


class Killed(Exception):
    pass


def tiny(folder: Path, **changes: Any) -> RadioMapConfig:
    options = {
        "out": folder / "model",
        "work": folder / "work",
        "sheet": folder / "sheet.png",
        "scenes": 3,
        "vae_scenes": 2,
        "held_out": 2,
        "threads": 1,
        "bf16": False,
        "log_every": 2,
        "checkpoint_every": 1,
        "vae_channels": "8,8,8",
        "vae_steps": 2,
        "vae_batch": 2,
        "decoder_steps": 2,
        "unet_channels": "8,16",
        "unet_heads": 2,
        "unet_steps": 2,
        "unet_batch": 2,
        "unet_warmup": 1,
        "regressor_channels": "8,8",
        "regressor_steps": 2,
        "regressor_batch": 2,
    }
    return RadioMapConfig(**{**options, **changes})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> RadioMapConfig:
    config = tiny(tmp_path_factory.mktemp("radiomap"))
    threads = torch.get_num_threads()
    assert train(config) == config.out
    torch.set_num_threads(threads)
    return config


def weights(config: RadioMapConfig) -> dict[str, bytes]:
    files = [*config.out.rglob("*.safetensors"), *(config.work / "regressor").rglob("*.safetensors")]
    return {str(file.relative_to(config.out.parent)): file.read_bytes() for file in sorted(files)}


def test_a_resumed_training_gives_the_same_weights(trained: RadioMapConfig, tmp_path: Path) -> None:
    """Killed in each stage, and the stages run by one command each."""
    assert len(weights(trained)) == 4
    broken = tiny(tmp_path)
    for name in ("vae", "decoder", "unet", "regressor"):

        def kill(stage: str, step: int, name: str = name) -> None:
            if (stage, step) == (name, 1):
                raise Killed("at a chosen step")

        with pytest.raises(Killed, match="at a chosen step"):
            train(broken, on_step=kill)
    for stages in ("data", "vae", "decoder", "regressor", "unet,regressor"):
        train(tiny(tmp_path, stages=stages))
    assert weights(broken) == weights(trained)

    seen: list[str] = []
    train(broken, on_step=lambda stage, step: seen.append(stage))
    assert seen == []  # a finished run trains nothing
    assert json.loads((broken.out / "metrics.json").read_text())["regressor"]["images_seen"] == 4
    with pytest.raises(ConfigurationError, match=r"which has unet_lr 0\.001 \(now 0\.1\)\. Use the same options"):
        train(tiny(tmp_path, unet_lr=0.1))


def test_the_folder_is_a_pipeline_that_the_sampler_takes(trained: RadioMapConfig) -> None:
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(trained.out, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    assert type(pipeline).__name__ == "StableDiffusionUpscalePipeline"
    sampler = LatentSampler(trained.out, num_steps=3, guidance_scale=1.0)
    assert (sampler.latent_shape, sampler.condition_shape) == ((4, 16, 16), (48, 16, 16))
    assert read_scale(trained.out) == (-124.0, -24.0)
    scenes = [make_scene(FIRST_TEST_SEED + k) for k in range(2)]
    seen = np.stack([conditions(scene) for scene in scenes])
    latents, _ = sampler.sample(["", "anything"], [0, 1], conditions=seen)
    pipeline.scheduler = sampler._scheduler
    maps = pipeline(
        ["", ""],
        image=torch.nn.functional.pixel_unshuffle(torch.from_numpy(seen), 4),
        noise_level=0,
        guidance_scale=1.0,
        num_inference_steps=3,
        generator=[torch.Generator().manual_seed(seed) for seed in (0, 1)],
        output_type="pt",
    ).images
    decoded = LatentDecoder(trained.out)(latents[:, 0])
    assert decoded.shape == (2, 64, 64, 3)
    np.testing.assert_allclose(decoded[..., 0], maps[:, 0].numpy(), atol=2e-3)
    assert pipeline.vae.config.scaling_factor == 0.08333
    # In training the network saw the same.
    np.testing.assert_array_equal(
        folded(torch.from_numpy(seen), 4).numpy(),
        pipeline.image_processor.preprocess(sampler._condition_arguments(seen, 2)["image"]).numpy(),
    )


def test_data(tmp_path: Path) -> None:
    planes = load_planes(tmp_path, "test", 2, 64)
    assert (planes.shape, planes.dtype) == ((6, 4, 64, 64), torch.uint8)
    scenes = [scene for k in range(2) for scene in variants(FIRST_TEST_SEED + k, 64)]
    for plane, scene in zip(unit(planes, "cpu").numpy(), scenes, strict=True):
        np.testing.assert_allclose(plane[:3], conditions(scene), atol=0.5 / 255 + 1e-6)
        np.testing.assert_allclose(plane[3], gray(received_power(scene)), atol=0.5 / 255 + 1e-6)
    assert len({scene.transmitter for scene in scenes[:3]}) == 3
    assert [bool(scene.cars.any()) for scene in scenes[:3]] == [True, True, False]
    (written,) = tmp_path.iterdir()
    assert torch.equal(load_planes(tmp_path, "test", 2, 64), planes)
    assert not torch.equal(load_planes(tmp_path, "train", 2, 64), planes)
    other = np.load(written)
    other[0] = 7
    np.save(written, other)  # what is there is taken
    assert int(load_planes(tmp_path, "test", 2, 64)[0].max()) == 7
    whole = written.read_bytes()
    for damaged in (whole[:-1], whole[:10], b"", whole.replace(b"|u1", b"|i1")):
        written.write_bytes(damaged)
        with pytest.raises(
            ConfigurationError, match=r"`--work` must hold a checkpoint that can be read, got '.*\.npy'"
        ):
            load_planes(tmp_path, "test", 2, 64)


def test_a_file_of_scenes_becomes_a_cache(trained: RadioMapConfig, tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes.npz", 1, 2)
    write_scenes(tmp_path / "static.npz", 1, 2, static=True)
    scenes, static = read_conditions(tmp_path / "scenes.npz"), read_conditions(tmp_path / "static.npz")
    assert [scene_seed(name) for name in scenes.names] == [0, FIRST_TEST_SEED, FIRST_TEST_SEED + 1]
    np.testing.assert_allclose(scenes.values[1], conditions(make_scene(FIRST_TEST_SEED)), atol=1e-3)
    np.testing.assert_array_equal(static.values[:, 0], scenes.values[:, 0])
    assert not static.values[:, 1:].any()
    assert static.truth is None
    assert scenes.truth is not None
    np.testing.assert_allclose(scenes.truth[1] / 255, gray(received_power(make_scene(FIRST_TEST_SEED))), atol=2e-3)
    write_scenes(tmp_path / "two.npz", 1, 1, transmitters=2)
    two = read_conditions(tmp_path / "two.npz")
    assert two.names == ("scene 0", "scene 0 b", "scene 1000000", "scene 1000000 b")
    assert [scene_seed(name) for name in two.names] == [0, 0, FIRST_TEST_SEED, FIRST_TEST_SEED]
    assert other_transmitters(two.values).tolist() == [1, 0, 3, 2]
    moved = move_transmitter(make_scene(0), 0)
    assert two.truth is not None
    np.testing.assert_allclose(two.truth[1] / 255, gray(received_power(moved)), atol=2e-3)
    reuse = Reuse(ratio=0.5, static_prompts=("",), static_conditions=static, mode="switch", midpoints=tmp_path / "m")
    cache = generate_diffusers(
        tmp_path / "cache", trained.out, None, conditions=scenes, num_steps=2, guidance_scale=1.0, reuse=reuse
    )
    assert (cache.num_steps, cache.prompt(2)) == (1, f"scene {FIRST_TEST_SEED + 1}")
    cache.verify(deep=True)


def test_turned_maps_are_the_eight_symmetries(tmp_path: Path) -> None:
    images = torch.arange(2 * 9).reshape(1, 2, 3, 3).repeat(800, 1, 1, 1)
    draw = torch.Generator().manual_seed(0)
    found = [tuple(image.flatten().tolist()) for image in turned(images, draw)]
    square = images[0]
    expected = {
        tuple(torch.rot90(side, k, dims=(1, 2)).flatten().tolist())
        for side in (square, square.flip(2))
        for k in range(4)
    }
    assert set(found) == expected
    counts = [found.count(image) for image in expected]  # 100 each, the standard error is 9.4
    assert min(counts) > 60
    assert max(counts) < 140


def test_the_static_part_sees_the_buildings_alone(trained: RadioMapConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    data = Dataset(trained)
    vae = build_vae(trained, 1).eval()
    for part in (0.0, 1.0):
        stage = RadioMapUnetStage(tiny(trained.out.parent, static_part=part, unet_batch=8), data, vae, None)
        given: list[Any] = []
        predict = stage.predict
        monkeypatch.setattr(
            stage,
            "predict",
            lambda x, t, condition, given=given, predict=predict: given.append(condition) or predict(x, t, condition),
        )
        stage.loss()
        seen = torch.nn.functional.pixel_shuffle((given[0] + 1) / 2, 4)
        assert bool(seen[:, 0].any())
        assert bool(seen[:, 1:].any()) == (part == 0.0)


def test_loss_weight_of_hand_cases() -> None:
    """An error of the velocity is sqrt(SNR + 1) times one of x_0, one of the noise sqrt(SNR) times: the same loss."""
    snr = torch.tensor([100.0, 20.0, 4.0, 0.01])
    assert (velocity_loss_weight(snr, 20.0, 0.5) * (snr + 1)).tolist() == pytest.approx([20**0.5, 20**0.5, 2.0, 0.1])
    torch.testing.assert_close(
        velocity_loss_weight(snr, 5.0, 0.25) * (snr + 1), noise_loss_weight(snr, 5.0, 0.25) * snr
    )


def test_a_rescaled_vae_has_the_same_latents_and_pixels(trained: RadioMapConfig) -> None:
    torch.manual_seed(0)
    vae = build_vae(trained, 1).eval()
    images = Dataset.maps(Dataset(trained).held)
    standardize(vae, images, "cpu")
    with torch.no_grad():
        posterior = vae.encode(to_signal(images, "cpu")).latent_dist
        before = vae.decode(posterior.mode()).sample
        moments = [moment * vae.config.scaling_factor for moment in latent_moments(vae, images, "cpu")]
        rescale(vae, 0.08333)
        assert vae.config.scaling_factor == 0.08333
        for old, new in zip(moments, latent_moments(vae, images, "cpu"), strict=True):
            torch.testing.assert_close(new * 0.08333, old, rtol=1e-4, atol=1e-5)
        after = vae.decode(vae.encode(to_signal(images, "cpu")).latent_dist.mode()).sample
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)


def test_error_figures_of_hand_cases() -> None:
    truth = np.stack([np.full((12, 12), 0.5), np.full((12, 12), 1.0)]).astype(np.float32)
    estimate = truth - np.float32(0.1)
    figures = error_figures(truth, estimate)
    assert figures["nmse"] == pytest.approx(0.02 / 1.25, rel=1e-5)
    assert figures["map_nmse"] == pytest.approx((0.04 + 0.01) / 2, rel=1e-5)
    assert figures["rmse_db"] == pytest.approx(10.0, rel=1e-5)
    assert figures["psnr_db"] == pytest.approx(20.0, rel=1e-5)
    assert error_figures(truth, truth)["ssim"] == pytest.approx(1.0)


def test_assessment(trained: RadioMapConfig, tmp_path: Path) -> None:
    figures = assess(trained.out, trained.work, tmp_path / "sheet.png", scenes=8, steps=2)
    held = figures["sets"]["held-out"]
    assert held.keys() == {"full model", "regressor", "autoencoder", "static model"}
    assert figures["sets"]["S2, cars appear"].keys() == {"copying"}
    scenes = [make_scene(FIRST_TEST_SEED + k) for k in range(8)]
    sampler = LatentSampler(trained.out, num_steps=2, guidance_scale=1.0)
    assert np.isfinite([values["nmse"] for found in figures["sets"].values() for values in found.values()]).all()
    assert truths(scenes).shape == (8, 64, 64)
    assert sampler.condition_shape is not None
    assert (tmp_path / "sheet.png").stat().st_size > 1000
    metrics = json.loads((trained.out / "metrics.json").read_text())
    assert metrics["evaluation"] == json.loads(json.dumps(figures))
    card = (trained.out / "README.md").read_text()
    assert f"| held-out | full model | {held['full model']['nmse']:.4f} |" in card
    with pytest.raises(
        ConfigurationError, match=r"`--model` must be the folder of a model that python -m train\.radiomap"
    ):
        assess(tmp_path, trained.work, tmp_path / "sheet.png")


def test_the_bundled_model_maps_scenes_that_it_has_not_seen() -> None:
    folder = ROOT / "refine_env" / "models" / "radiomap"
    if not (folder / "model_index.json").is_file():
        pytest.skip("the bundled model is not in this checkout")
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 20e6
    sampler = LatentSampler("radiomap", num_steps=10, guidance_scale=1.0)
    assert (sampler.latent_shape, sampler.condition_shape) == ((4, 16, 16), (48, 16, 16))
    scenes = [make_scene(FIRST_TEST_SEED + 5000 + k) for k in range(4)]
    seen = np.stack([conditions(scene) for scene in scenes])
    latents, _ = sampler.sample([""] * 4, range(4), conditions=seen)
    maps = LatentDecoder("radiomap")(latents[:, 0])[..., 0]
    # Four maps of ten steps: the sets' figures are in metrics.json.
    assert error_figures(truths(scenes), maps)["nmse"] < 0.05
    sets = json.loads((folder / "metrics.json").read_text())["evaluation"]["sets"]
    for name in ("held-out", "S1, transmitter moved", "S3, buildings changed"):
        assert sets[name]["full model"]["nmse"] < 2 * sets[name]["regressor"]["nmse"]
        if "copying" in sets[name]:
            assert sets[name]["full model"]["nmse"] < sets[name]["copying"]["nmse"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 100}, r"`resolution` must be a multiple of 8, got 100\. Use 64 or 128"),
        ({"vae_scenes": 4}, r"`vae_scenes` must be at most `scenes`, 3, got 4"),
        ({"stages": "vae,all"}, r"`stages` must be of data, vae, decoder, unet, regressor, .* got 'vae,all'"),
        ({"unet_channels": "8,x"}, r"`unet_channels` must be positive integers with commas between, got '8,x'"),
    ],
)
def test_options_that_cannot_be_used(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        tiny(tmp_path, **changes)


def test_what_a_stage_depends_on(tmp_path: Path) -> None:
    """A finished VAE serves another U-Net; a finished U-Net is not trained again for another regressor."""
    one, other = tiny(tmp_path), tiny(tmp_path, regressor_lr=0.1, decoder_lr=0.1)
    assert one.trained_stage_with("unet") == other.trained_stage_with("unet")
    assert one.trained_stage_with("vae") == other.trained_stage_with("vae")
    assert one.trained_stage_with("decoder") != other.trained_stage_with("decoder")
    assert one.trained_stage_with("regressor") != other.trained_stage_with("regressor")
    other = tiny(tmp_path, unet_lr=0.1, static_part=0.5, scenes=5)
    assert one.trained_stage_with("vae") == other.trained_stage_with("vae")
    assert one.trained_stage_with("unet") != other.trained_stage_with("unet")
    other = tiny(tmp_path, unet_lr=0.1, vae_lr=0.1)
    assert one.trained_stage_with("regressor") == other.trained_stage_with("regressor")


@pytest.mark.parametrize(
    ("name", "option"), [("train.radiomap", "--static-part"), ("train.diffusion.radiomap.assess", "--scenes")]
)
def test_command_line_has_help_and_one_sentence_errors(name: str, option: str, tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", name, *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    shown = run("--help")
    assert shown.returncode == 0
    assert option in shown.stdout
    wrong = ("--stages", "none") if name == "train.radiomap" else ("--model", str(tmp_path))
    failed = run(*wrong)
    assert failed.returncode == 2
    assert "must be" in failed.stderr
    assert "Traceback" not in failed.stderr
