"""The training of the emoji model: a tiny run, resuming, its stages and parts, the command."""

from __future__ import annotations

import io
import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refine_env.errors import ConfigurationError, MissingExtraError
from tests.train.conftest import synthetic_glyphs, tiny
from train.diffusion import emoji
from train.diffusion.config import EXTRA, Config
from train.diffusion.emoji import Glyph
from train.diffusion.training import train
from train.options import require_extra

for module in EXTRA:
    pytest.importorskip(module, reason="the ldm extra is not installed")

from train.diffusion.data import load_data  # noqa: E402
from train.diffusion.networks import build_scheduler, build_unet, build_vae  # noqa: E402
from train.diffusion.pipeline import load_pipeline, sample  # noqa: E402
from train.diffusion.stage import load_checkpoint, save_checkpoint  # noqa: E402
from train.diffusion.tokenizer import build_tokenizer, byte_pair_merges  # noqa: E402
from train.diffusion.unet import UnetStage, noise_loss_weight, spread_timesteps  # noqa: E402
from train.diffusion.vae import augmented, latent_moments, standardize, to_pixels, to_signal  # noqa: E402

ROOT = Path(__file__).parents[3]

# Third-party warnings at import and load time; the project's own are still errors.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*lr_scheduler.step.*:UserWarning"
)


class Killed(Exception):
    pass


def weights(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def test_tiny_training_gives_a_pipeline_and_resumes_bit_for_bit(ldm, tmp_path: Path) -> None:
    glyphs = synthetic_glyphs()
    whole = tiny(tmp_path / "whole")
    seen: list[tuple[str, int]] = []
    folder = train(whole, glyphs, on_step=lambda stage, step: seen.append((stage, step)))
    assert seen == [(stage, step) for stage in ("vae", "unet") for step in (1, 2, 3, 4)]

    # Killed in each stage, at a checkpoint and after one: the same command goes on to the same weights.
    broken = tiny(tmp_path / "broken")
    for kill_at in (("vae", 2), ("vae", 3), ("unet", 2), ("unet", 3)):

        def kill(stage: str, step: int, kill_at: tuple[str, int] = kill_at) -> None:
            if (stage, step) == kill_at:
                raise Killed("at a chosen step")

        with pytest.raises(Killed, match="at a chosen step"):
            train(broken, glyphs, on_step=kill)
    resumed = train(broken, glyphs)
    assert len(weights(folder)) == 3
    assert weights(resumed) == weights(folder)

    # A finished run trains nothing.
    seen.clear()
    train(broken, glyphs, on_step=lambda stage, step: seen.append((stage, step)))
    assert seen == []

    # The seed is used.
    other = train(tiny(tmp_path / "other", seed=1), glyphs)
    assert weights(other) != weights(folder)

    pipeline = load_pipeline(folder)
    images, latents = sample(pipeline, ["red dot", "blue box"], guidance_scale=2.0, steps=2)
    assert (images.shape, images.dtype) == ((2, 3, 16, 16), np.uint8)
    assert (latents.shape, latents.dtype) == ((2, 4, 8, 8), np.float32)
    one_by_one, _ = sample(pipeline, ["red dot", "blue box"], guidance_scale=2.0, steps=2, batch=1)
    np.testing.assert_allclose(one_by_one.astype(int), images, atol=1)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["glyphs_train"], metrics["glyphs_held_out"]) == (9, 3)
    assert metrics["unet"]["images_seen"] == 16

    with pytest.raises(ConfigurationError, match=r"which has unet_lr 0\.001 \(now 0\.1\)\. Use the same options"):
        train(tiny(tmp_path / "broken", unet_lr=0.1), glyphs)
    with pytest.raises(ConfigurationError, match=r"which has data \w+ \(now \w+\)\. Use the same options"):
        train(broken, glyphs[:6])


def numbered_images(count: int) -> Any:
    """Return images (count, 3, 16, 16) with 256 different values in each channel, in another order in each."""
    import torch

    place = torch.arange(256).reshape(16, 16)
    return torch.stack([place, 255 - place, (place + 128) % 256]).to(torch.uint8).repeat(count, 1, 1, 1)


def test_augmented_images_are_mirrored_shifted_and_recolored(ldm) -> None:
    import torch

    images = numbered_images(600)
    changed = augmented(images, torch.Generator().manual_seed(0))
    assert torch.equal(changed, augmented(images, torch.Generator().manual_seed(0)))
    assert not torch.equal(changed, augmented(images, torch.Generator().manual_seed(1)))

    # Every result is one of the 2 x 5 x 5 mirrored and shifted pictures, with its channels in one of 6 orders.
    counts = {"mirrored": 0, "recolored": 0}
    shifts = set()
    steps = torch.arange(16)
    pictures = {}
    for mirrored in (False, True):
        for down in range(-2, 3):
            for right in range(-2, 3):
                source = images[0].flip(-1) if mirrored else images[0]
                shifted = source[:, (steps + down).clamp(0, 15)][:, :, (steps + right).clamp(0, 15)]
                for order in itertools.permutations(range(3)):
                    key = shifted[list(order)].numpy().tobytes()
                    pictures[key] = (mirrored, (down, right), order != (0, 1, 2))
    for picture in changed:
        mirrored, shift, recolored = pictures[picture.numpy().tobytes()]
        counts["mirrored"] += mirrored
        counts["recolored"] += recolored
        shifts.add(shift)
    # 600 draws: standard errors 0.020 of the half, 0.017 of the 5/24 (a sixth of the drawn orders changes nothing).
    assert counts["mirrored"] / 600 == pytest.approx(0.5, abs=0.08)
    assert counts["recolored"] / 600 == pytest.approx(5 / 24, abs=0.07)
    assert len(shifts) == 25


def test_augmentation_can_be_left_out(ldm, tmp_path: Path) -> None:
    glyphs = synthetic_glyphs()
    folders = [
        train(tiny(tmp_path / str(augment), vae_augment=augment, unet_steps=1), glyphs) for augment in (True, False)
    ]
    assert weights(folders[0] / "vae") != weights(folders[1] / "vae")
    assert Config(vae_augment=False).command() == "python -m train.ldm --no-vae-augment"


def test_pixels_and_signal_are_inverse(ldm) -> None:
    import torch

    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_pixels(to_signal(values, "cpu")), values.float())
    assert to_pixels(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_timesteps_of_a_batch_are_spread_by_their_shares(ldm) -> None:
    import torch

    even = torch.full((1000,), 1 / 1000)
    drawn = [spread_timesteps(even, 40, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    for t in drawn:
        assert (t // 25).sort().values.tolist() == list(range(40))
    # Each of them has the distribution of the shares: 4000 first ones, the largest standard error is 0.008.
    share = torch.tensor([0.1, 0.0, 0.6, 0.3])
    draw = torch.Generator().manual_seed(2)
    first = torch.stack([spread_timesteps(share, 3, draw)[0] for _ in range(4000)])
    found = [float((first == t).float().mean()) for t in range(4)]
    assert found == pytest.approx(share.tolist(), abs=0.04)
    assert found[1] == 0.0


def test_loss_weight_of_hand_cases(ldm) -> None:
    import torch

    snr = torch.tensor([20.0, 4.0, 0.25, 0.01])
    # Min-SNR: min(SNR, 5) / SNR.
    assert noise_loss_weight(snr, 5.0, 1.0).tolist() == pytest.approx([0.25, 1.0, 1.0, 1.0])
    # Power 1/2: the error of x_0 weighs as the root of the bounded SNR.
    assert (noise_loss_weight(snr, 4.0, 0.5) * snr).tolist() == pytest.approx([2.0, 2.0, 0.5, 0.1])
    # No bound and power 0: the plain error of x_0.
    assert (noise_loss_weight(snr, 0.0, 0.0) * snr).tolist() == pytest.approx([1.0] * 4)
    # No bound and power 1: the plain error of the noise.
    assert noise_loss_weight(snr, 0.0, 1.0).tolist() == pytest.approx([1.0] * 4)


def unet_stage(ldm, config, glyphs: list[Glyph]) -> Any:
    data = load_data(config, glyphs)
    tokenizer = build_tokenizer([glyph.prompt for glyph in data.train], config)
    return UnetStage(config, data, build_vae(config).eval(), tokenizer, None)


def test_shares_and_weights_of_timesteps_make_the_loss_weight(ldm, tmp_path: Path) -> None:
    import torch
    from diffusers.training_utils import compute_snr

    stage = unet_stage(ldm, tiny(tmp_path), synthetic_glyphs())
    snr = compute_snr(build_scheduler(), torch.arange(1000))
    assert float(stage.timestep_share.sum()) == pytest.approx(1, abs=1e-5)
    expected = noise_loss_weight(snr, 5.0, 0.25)
    torch.testing.assert_close(stage.timestep_share * 1000 * stage.loss_weight, expected, rtol=1e-4, atol=0)


def test_signs_and_variants_are_drawn_less(ldm, tmp_path: Path) -> None:
    glyphs = synthetic_glyphs()
    named = [
        replace(glyph, prompt=prompt, family=family)
        for glyph, prompt, family in zip(
            glyphs,
            ("goat", "cook", "cook pale", "cook brown", "flag j p", "plus sign"),
            ("goat", "cook", "cook", "cook", "flag j p", "plus sign"),
            strict=False,
        )
    ]
    stage = unet_stage(ldm, tiny(tmp_path, held_out=0.0, prompt_signs=0.25), named)
    by_prompt = dict(
        zip([glyph.prompt for glyph in emoji.split(named, 0.0, 0)[0]], stage.draw_weight.tolist(), strict=True)
    )
    assert by_prompt == pytest.approx(
        {"goat": 1, "cook": 1 / 3, "cook pale": 1 / 3, "cook brown": 1 / 3, "flag j p": 0.25, "plus sign": 0.25}
    )


def test_attention_is_at_the_coarsest_level_alone(ldm) -> None:
    unet = build_unet(Config()).config
    assert unet.down_block_types == ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D")
    assert unet.up_block_types == ("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D")
    assert build_vae(Config()).encoder.mid_block.attentions[0] is None
    assert build_vae(Config(vae_attention=True)).encoder.mid_block.attentions[0] is not None


def test_killed_while_a_checkpoint_is_written_keeps_the_old_one(
    ldm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    path = tmp_path / "stage.pt"
    save_checkpoint(path, {"options": {}, "step": 1})

    def half_written(state: object, file: io.BufferedWriter) -> None:
        file.write(b"half")
        raise Killed("at a chosen step")

    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(Killed, match="at a chosen step"):
        save_checkpoint(path, {"options": {}, "step": 2})
    assert load_checkpoint(path, {}, "cpu")["step"] == 1


def test_a_damaged_checkpoint_is_one_sentence(ldm, tmp_path: Path) -> None:
    import torch

    config = tiny(tmp_path)
    train(config, synthetic_glyphs())
    path = config.work / "unet.pt"
    whole = path.read_bytes()
    message = r"`--work` must hold a checkpoint that can be read, got '.*unet\.pt' \(.+\)\. Delete it to begin anew"
    for damaged in (whole[: len(whole) // 2], b"", b"no checkpoint"):
        path.write_bytes(damaged)
        with pytest.raises(ConfigurationError, match=message):
            train(config, synthetic_glyphs())
    path.write_bytes(whole)
    save_checkpoint(path, {"options": torch.load(path, weights_only=True)["options"]})  # as of another version
    with pytest.raises(ConfigurationError, match=message):
        train(config, synthetic_glyphs())


def test_standardized_latents_decode_to_the_same_pixels(ldm, tmp_path: Path) -> None:
    import torch

    config = tiny(tmp_path)
    torch.manual_seed(0)
    vae = build_vae(config).eval()
    images = torch.from_numpy(emoji.pixels(synthetic_glyphs(), 16))
    signal = to_signal(images, "cpu")
    with torch.no_grad():
        before = vae.decode(vae.encode(signal).latent_dist.mode()).sample
        standardize(vae, images, "cpu")
        after = vae.decode(vae.encode(signal).latent_dist.mode()).sample
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    mean, std = latent_moments(vae, images, "cpu")
    torch.testing.assert_close(mean.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    mean_square = float((mean**2 + std**2).mean()) * vae.config.scaling_factor**2
    assert mean_square == pytest.approx(1, abs=1e-4)


def test_tokenizer_writes_any_ascii_prompt(ldm, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(["red square", "blue square"], tiny(tmp_path, text_length=32))
    ids = tokenizer("flag q z type-7").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.eos_token_id) == 1
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = type(tokenizer).from_pretrained(tmp_path / "tokenizer", local_files_only=True)
    assert loaded("flag q z type-7").input_ids == ids


def test_tokenizer_is_the_same_in_every_process(ldm, tmp_path: Path) -> None:
    # The tokenizers library's trainer is not: a resumed run would go on with other token ids.
    code = (
        "import json; from train.diffusion.config import Config; from train.diffusion.tokenizer import build_tokenizer;"
        "tokenizer = build_tokenizer(['red square', 'flag n o', 'blue square'], Config());"
        "print(json.dumps(tokenizer.get_vocab(), sort_keys=True))"
    )
    vocabularies = {
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    here = build_tokenizer(["blue square", "red square", "flag n o"], Config())
    vocabularies.add(json.dumps(here.get_vocab(), sort_keys=True) + "\n")
    assert len(vocabularies) == 1


def test_byte_pair_merges_of_a_hand_case(ldm) -> None:
    # Pairs: a-b 3 + 2 = 5, then ab-c</w> 3 and ab-g</w> 2; e-f</w> occurs once and stays apart.
    words = {"abc": 3, "abg": 2, "ef": 1}
    assert byte_pair_merges(words, 10) == [("a", "b"), ("ab", "c</w>"), ("ab", "g</w>")]
    assert byte_pair_merges(words, 1) == [("a", "b")]
    assert byte_pair_merges({"aaa": 2}, 10) == [("a", "a"), ("aa", "a</w>")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 30}, r"`resolution` must be a multiple of 4, got 30\. Use 32 or 64"),
        ({"vae_channels": "8,x"}, r"`vae_channels` must be positive integers with commas between, got '8,x'"),
    ],
)
def test_options_that_cannot_be_used(ldm, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        train(tiny(tmp_path, **changes), synthetic_glyphs())


def test_resolution_is_four_times_the_latents_side(ldm) -> None:
    assert (Config().resolution, Config().latent_side) == (64, 16)
    config = Config(resolution=32)
    assert config.latent_side == 8
    assert build_unet(config).config.sample_size == 8
    assert config.command() == "python -m train.ldm --resolution 32"


def test_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fontTools", None)
    with pytest.raises(MissingExtraError, match=re.escape("Install the extra: pip install 'refine-env[ldm]'")):
        require_extra("ldm", ("fontTools",))


@pytest.mark.parametrize(
    ("name", "option", "file", "package"),
    [
        ("train.ldm", "--resolution", "--font", "fonts-noto-color-emoji"),
        ("train.diffusion.assess", "--prompts", "--emoji-test", "unicode-data"),
    ],
)
def test_command_line_has_help_and_one_sentence_errors(
    name: str, option: str, file: str, package: str, tmp_path: Path
) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", name, *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    shown = run("--help")
    assert shown.returncode == 0
    assert option in shown.stdout
    font = tmp_path / "font.ttf"
    font.touch()
    failed = run("--font", str(font), file, str(tmp_path / "none"))  # of a repeated option the last one counts
    assert failed.returncode == 3
    assert f"`{file}` must be an existing file" in failed.stderr
    assert f"Install {package} or correct it." in failed.stderr
    assert "Traceback" not in failed.stderr


def test_missing_groups_are_said_before_the_training(tmp_path: Path, font: Path) -> None:
    for module in EXTRA:
        pytest.importorskip(module, reason="the ldm extra is not installed")
    options = ["--emoji-test", str(tmp_path / "none.txt"), "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    failed = subprocess.run(
        [sys.executable, "-m", "train.ldm", *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert failed.returncode == 3
    assert "`--emoji-test` must be an existing file" in failed.stderr
    assert "Install unicode-data or correct it." in failed.stderr
    assert list(tmp_path.iterdir()) == []
