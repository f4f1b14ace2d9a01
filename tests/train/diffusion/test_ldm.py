"""The training of the bundled emoji model: glyphs, prompts, split, a tiny run, resuming, the result."""

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

from refine_env.errors import MissingExtraError
from tests.train.conftest import EXTRA, synthetic_glyphs, tiny
from train.diffusion import emoji
from train.diffusion.emoji import Glyph

ROOT = Path(__file__).parents[2]

# Third-party warnings at import and load time; the project's own are still errors.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*lr_scheduler.step.*:UserWarning"
)


# --- Prompts and families -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codepoints", "prompt", "family"),
    [
        ([0x1F430], "rabbit face", "rabbit face"),
        ([0x2764, 0xFE0F], "heavy black heart", "heavy black heart"),
        ([0x1F468, 0x200D, 0x1F33E], "man ear of rice", "adult ear of rice"),
        (
            [0x1F469, 0x1F3FD, 0x200D, 0x1F33E],
            "woman emoji modifier fitzpatrick type-4 ear of rice",
            "adult ear of rice",
        ),
        (
            [0x1F3C3, 0x1F3FB, 0x200D, 0x2640, 0xFE0F],
            "runner emoji modifier fitzpatrick type-1-2 female sign",
            "runner",
        ),
        ([0x1F3C3, 0x200D, 0x27A1], "runner black rightwards arrow", "runner"),
        (
            [0x1F642, 0x200D, 0x2194, 0xFE0F],
            "slightly smiling face left right arrow",
            "slightly smiling face left right arrow",
        ),
        ([0x1F1EF, 0x1F1F5], "flag j p", "flag j p"),
        ([0x1F3F4, 0xE0067, 0xE0062, 0xE0065, 0xE006E, 0xE0067, 0xE007F], "flag g b e n g", "flag g b e n g"),
        ([0x1F3F4, 0xE007F], "", ""),
        ([0x1F468, 0x200D, 0x1F469, 0x200D, 0x1F467], "man woman girl", "group of parents and children"),
        ([0x1F475, 0x1F3FF], "older woman emoji modifier fitzpatrick type-6", "older person"),
        ([0x1F3FB], "emoji modifier fitzpatrick type-1-2", "skin tone"),
        ([0x1FACE], "moose", "moose"),
        ([0xFE4E5], "", ""),
    ],
)
def test_prompt_and_family_of_hand_cases(codepoints: list[int], prompt: str, family: str) -> None:
    assert emoji.prompt_of(codepoints) == prompt
    assert emoji.family_of(codepoints) == family


def test_names_of_unicode_15_agree_with_a_newer_character_database() -> None:
    import unicodedata

    known = {c: unicodedata.name(chr(c), "").lower() for c in emoji.NAMES_15}
    assert all(name in ("", emoji.NAMES_15[c]) for c, name in known.items())


def test_font_gives_the_glyphs(font_glyphs: list[Glyph]) -> None:
    prompts = [glyph.prompt for glyph in font_glyphs]
    assert len(prompts) >= 3800
    assert len(set(prompts)) == len(prompts)
    assert all(prompt == prompt.lower().strip() and "  " not in prompt for prompt in prompts)
    assert {"rabbit face", "flag j p", "woman ear of rice", "waving white flag rainbow"} <= set(prompts)
    # The font lists every ZWJ sequence backwards too: no prompt may come from there.
    assert "ear of rice woman" not in prompts


def test_heads_shaking_and_nodding_are_in_logical_order(font_glyphs: list[Glyph]) -> None:
    prompts = {glyph.prompt for glyph in font_glyphs}
    for arrow in ("left right arrow", "up down arrow"):
        assert f"slightly smiling face {arrow}" in prompts
        assert f"{arrow} slightly smiling face" not in prompts


def test_a_shared_flag_goes_by_the_region_whose_own_it_is(font_glyphs: list[Glyph]) -> None:
    prompts = {glyph.prompt for glyph in font_glyphs}
    own = ("a u", "e s", "f r", "i o", "n o", "u s")
    assert {f"flag {letters}" for letters in own} <= prompts
    assert not {f"flag {' '.join(letters)}" for letters in emoji.FLAGLESS_REGIONS} & prompts


def test_reading_order_of_shared_flags() -> None:
    def flag(letters: str) -> tuple[int, ...]:
        return tuple(emoji.REGIONAL_INDICATORS.start + ord(letter) - ord("a") for letter in letters)

    for own, others in {"fr": ("cp", "mf"), "us": ("um",), "no": ("bv", "sj"), "es": ("ea",), "au": ("hm",)}.items():
        sequences = [flag(letters) for letters in (*others, own)]
        assert emoji.prompt_of(min(sequences, key=emoji._reading_order)) == f"flag {' '.join(own)}"


def test_pixels_are_the_glyph_over_white(font_glyphs: list[Glyph]) -> None:
    red = next(glyph for glyph in font_glyphs if glyph.prompt == "large red circle")
    (image,) = emoji.pixels([red], 32)
    assert image.shape == (3, 32, 32)
    np.testing.assert_array_equal(image[:, 0, 0], 255)
    assert image[0, 16, 16] > 180
    assert max(image[1:, 16, 16]) < 90


def test_equal_bitmaps_are_one_family(font_glyphs: list[Glyph]) -> None:
    bitmaps: dict[bytes, str] = {}
    assert all(bitmaps.setdefault(glyph.png, glyph.family) == glyph.family for glyph in font_glyphs)


def test_whole_families_are_held_out(font_glyphs: list[Glyph]) -> None:
    train, held = emoji.split(font_glyphs, 0.05, seed=0)
    assert len(train) + len(held) == len(font_glyphs)
    assert 0.045 * len(font_glyphs) < len(held) <= 0.05 * len(font_glyphs)
    assert not {glyph.family for glyph in train} & {glyph.family for glyph in held}
    assert not {glyph.prompt for glyph in train} & {glyph.prompt for glyph in held}
    assert emoji.split(font_glyphs, 0.05, seed=0) == (train, held)
    assert emoji.split(font_glyphs, 0.05, seed=1) != (train, held)


def test_split_takes_families_in_any_order_of_the_glyphs() -> None:
    glyphs = [Glyph(f"thing {k}", f"family {k // 2}", b"") for k in range(40)]
    train, held = emoji.split(glyphs, 0.25, seed=3)
    backwards = emoji.split(glyphs[::-1], 0.25, seed=3)
    assert {g.prompt for g in held} == {g.prompt for g in backwards[1]}
    assert len(held) == 10
    assert len(train) == 30


def test_split_refuses_a_fraction_that_leaves_nothing() -> None:
    with pytest.raises(ValueError, match=r"fraction must be at least 0 and below 1, got 1"):
        emoji.split([], 1, seed=0)


def test_diverse_prompts_are_of_different_families_and_few_flags() -> None:
    glyphs = [Glyph(f"animal {k}{tone}", f"animal {k}", b"") for k in range(5) for tone in ("", " dark", " light")]
    glyphs += [Glyph(f"flag a {letter}", f"flag a {letter}", b"") for letter in "abcdefgh"]
    chosen = emoji.diverse_prompts(glyphs, 7, seed=0)
    assert {prompt for prompt in chosen if not prompt.startswith("flag")} == {f"animal {k}" for k in range(5)}
    assert sum(prompt.startswith("flag") for prompt in chosen) == 2
    assert len(set(emoji.diverse_prompts(glyphs, 20, seed=0))) == 20


def test_missing_font_is_one_sentence_with_the_package(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"Install fonts-noto-color-emoji or correct --font"):
        emoji.find_font(tmp_path / "none.ttf")


def test_missing_font_in_the_font_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emoji, "FONT_FOLDERS", (tmp_path,))
    with pytest.raises(FileNotFoundError, match=r"apt install fonts-noto-color-emoji\) or name the file with --font"):
        emoji.find_font()


# --- Training -------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def weights(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def test_tiny_training_gives_a_pipeline_and_resumes_bit_for_bit(ldm, tmp_path: Path) -> None:
    glyphs = synthetic_glyphs()
    whole = tiny(ldm, tmp_path / "whole")
    seen: list[tuple[str, int]] = []
    folder = ldm.train(whole, glyphs, on_step=lambda stage, step: seen.append((stage, step)))
    assert seen == [(stage, step) for stage in ("vae", "unet") for step in (1, 2, 3, 4)]

    # Killed in each stage, at a checkpoint and after one: the same command goes on to the same weights.
    broken = tiny(ldm, tmp_path / "broken")
    for kill_at in (("vae", 2), ("vae", 3), ("unet", 2), ("unet", 3)):

        def kill(stage: str, step: int, kill_at: tuple[str, int] = kill_at) -> None:
            if (stage, step) == kill_at:
                raise Killed("at a chosen step")

        with pytest.raises(Killed, match="at a chosen step"):
            ldm.train(broken, glyphs, on_step=kill)
    resumed = ldm.train(broken, glyphs)
    assert len(weights(folder)) == 3
    assert weights(resumed) == weights(folder)

    # A finished run trains nothing.
    seen.clear()
    ldm.train(broken, glyphs, on_step=lambda stage, step: seen.append((stage, step)))
    assert seen == []

    # The seed is used.
    other = ldm.train(tiny(ldm, tmp_path / "other", seed=1), glyphs)
    assert weights(other) != weights(folder)

    pipeline = ldm.load_pipeline(folder)
    images, latents = ldm.sample(pipeline, ["red dot", "blue box"], guidance_scale=2.0, steps=2)
    assert (images.shape, images.dtype) == ((2, 3, 16, 16), np.uint8)
    assert (latents.shape, latents.dtype) == ((2, 4, 8, 8), np.float32)
    one_by_one, _ = ldm.sample(pipeline, ["red dot", "blue box"], guidance_scale=2.0, steps=2, batch=1)
    np.testing.assert_allclose(one_by_one.astype(int), images, atol=1)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["glyphs_train"], metrics["glyphs_held_out"]) == (9, 3)
    assert metrics["unet"]["images_seen"] == 16

    with pytest.raises(ldm.ConfigurationError, match=r"which has unet_lr 0\.001 \(now 0\.1\)\. Use the same options"):
        ldm.train(tiny(ldm, tmp_path / "broken", unet_lr=0.1), glyphs)
    with pytest.raises(ldm.ConfigurationError, match=r"which has data \w+ \(now \w+\)\. Use the same options"):
        ldm.train(broken, glyphs[:6])


def numbered_images(count: int) -> Any:
    """Return images (count, 3, 16, 16) with 256 different values in each channel, in another order in each."""
    import torch

    place = torch.arange(256).reshape(16, 16)
    return torch.stack([place, 255 - place, (place + 128) % 256]).to(torch.uint8).repeat(count, 1, 1, 1)


def test_augmented_images_are_mirrored_shifted_and_recolored(ldm) -> None:
    import torch

    images = numbered_images(600)
    changed = ldm.augmented(images, torch.Generator().manual_seed(0))
    assert torch.equal(changed, ldm.augmented(images, torch.Generator().manual_seed(0)))
    assert not torch.equal(changed, ldm.augmented(images, torch.Generator().manual_seed(1)))

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
        ldm.train(tiny(ldm, tmp_path / str(augment), vae_augment=augment, unet_steps=1), glyphs)
        for augment in (True, False)
    ]
    assert weights(folders[0] / "vae") != weights(folders[1] / "vae")
    assert ldm.Config(vae_augment=False).command() == "python -m train.ldm --no-vae-augment"


def test_pixels_and_signal_are_inverse(ldm) -> None:
    import torch

    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(ldm.to_pixels(ldm.to_signal(values, "cpu")), values.float())
    assert ldm.to_pixels(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_timesteps_of_a_batch_are_spread_by_their_shares(ldm) -> None:
    import torch

    even = torch.full((1000,), 1 / 1000)
    drawn = [ldm.spread_timesteps(even, 40, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    for t in drawn:
        assert (t // 25).sort().values.tolist() == list(range(40))
    # Each of them has the distribution of the shares: 4000 first ones, the largest standard error is 0.008.
    share = torch.tensor([0.1, 0.0, 0.6, 0.3])
    draw = torch.Generator().manual_seed(2)
    first = torch.stack([ldm.spread_timesteps(share, 3, draw)[0] for _ in range(4000)])
    found = [float((first == t).float().mean()) for t in range(4)]
    assert found == pytest.approx(share.tolist(), abs=0.04)
    assert found[1] == 0.0


def test_loss_weight_of_hand_cases(ldm) -> None:
    import torch

    snr = torch.tensor([20.0, 4.0, 0.25, 0.01])
    # Min-SNR: min(SNR, 5) / SNR.
    assert ldm.noise_loss_weight(snr, 5.0, 1.0).tolist() == pytest.approx([0.25, 1.0, 1.0, 1.0])
    # Power 1/2: the error of x_0 weighs as the root of the bounded SNR.
    assert (ldm.noise_loss_weight(snr, 4.0, 0.5) * snr).tolist() == pytest.approx([2.0, 2.0, 0.5, 0.1])
    # No bound and power 0: the plain error of x_0.
    assert (ldm.noise_loss_weight(snr, 0.0, 0.0) * snr).tolist() == pytest.approx([1.0] * 4)
    # No bound and power 1: the plain error of the noise.
    assert ldm.noise_loss_weight(snr, 0.0, 1.0).tolist() == pytest.approx([1.0] * 4)


def unet_stage(ldm, config, glyphs: list[Glyph]) -> Any:
    data = ldm.load_data(config, glyphs)
    tokenizer = ldm.build_tokenizer([glyph.prompt for glyph in data.train], config)
    return ldm.UnetStage(config, data, ldm.build_vae(config).eval(), tokenizer, None)


def test_shares_and_weights_of_timesteps_make_the_loss_weight(ldm, tmp_path: Path) -> None:
    import torch
    from diffusers.training_utils import compute_snr

    stage = unet_stage(ldm, tiny(ldm, tmp_path), synthetic_glyphs())
    snr = compute_snr(ldm.build_scheduler(), torch.arange(1000))
    assert float(stage.timestep_share.sum()) == pytest.approx(1, abs=1e-5)
    expected = ldm.noise_loss_weight(snr, 5.0, 0.25)
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
    stage = unet_stage(ldm, tiny(ldm, tmp_path, held_out=0.0, prompt_signs=0.25), named)
    by_prompt = dict(
        zip([glyph.prompt for glyph in emoji.split(named, 0.0, 0)[0]], stage.draw_weight.tolist(), strict=True)
    )
    assert by_prompt == pytest.approx(
        {"goat": 1, "cook": 1 / 3, "cook pale": 1 / 3, "cook brown": 1 / 3, "flag j p": 0.25, "plus sign": 0.25}
    )


def test_attention_is_at_the_coarsest_level_alone(ldm) -> None:
    unet = ldm.build_unet(ldm.Config()).config
    assert unet.down_block_types == ("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D")
    assert unet.up_block_types == ("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D")
    assert ldm.build_vae(ldm.Config()).encoder.mid_block.attentions[0] is None
    assert ldm.build_vae(ldm.Config(vae_attention=True)).encoder.mid_block.attentions[0] is not None


def test_killed_while_a_checkpoint_is_written_keeps_the_old_one(
    ldm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    path = tmp_path / "stage.pt"
    ldm.save_checkpoint(path, {"options": {}, "step": 1})

    def half_written(state: object, file: io.BufferedWriter) -> None:
        file.write(b"half")
        raise Killed("at a chosen step")

    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(Killed, match="at a chosen step"):
        ldm.save_checkpoint(path, {"options": {}, "step": 2})
    assert ldm.load_checkpoint(path, {}, "cpu")["step"] == 1


def test_standardized_latents_decode_to_the_same_pixels(ldm, tmp_path: Path) -> None:
    import torch

    config = tiny(ldm, tmp_path)
    torch.manual_seed(0)
    vae = ldm.build_vae(config).eval()
    images = torch.from_numpy(emoji.pixels(synthetic_glyphs(), 16))
    signal = ldm.to_signal(images, "cpu")
    with torch.no_grad():
        before = vae.decode(vae.encode(signal).latent_dist.mode()).sample
        ldm.standardize(vae, images, "cpu")
        after = vae.decode(vae.encode(signal).latent_dist.mode()).sample
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)
    mean, std = ldm.latent_moments(vae, images, "cpu")
    torch.testing.assert_close(mean.mean(dim=(0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    mean_square = float((mean**2 + std**2).mean()) * vae.config.scaling_factor**2
    assert mean_square == pytest.approx(1, abs=1e-4)


def test_tokenizer_writes_any_ascii_prompt(ldm, tmp_path: Path) -> None:
    tokenizer = ldm.build_tokenizer(["red square", "blue square"], tiny(ldm, tmp_path, text_length=32))
    ids = tokenizer("flag q z type-7").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.eos_token_id) == 1
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = type(tokenizer).from_pretrained(tmp_path / "tokenizer", local_files_only=True)
    assert loaded("flag q z type-7").input_ids == ids


def test_tokenizer_is_the_same_in_every_process(ldm, tmp_path: Path) -> None:
    # The tokenizers library's trainer is not: a resumed run would go on with other token ids.
    code = (
        "import json; from train import ldm;"
        "tokenizer = ldm.build_tokenizer(['red square', 'flag n o', 'blue square'], ldm.Config());"
        "print(json.dumps(tokenizer.get_vocab(), sort_keys=True))"
    )
    vocabularies = {
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    }
    here = ldm.build_tokenizer(["blue square", "red square", "flag n o"], ldm.Config())
    vocabularies.add(json.dumps(here.get_vocab(), sort_keys=True) + "\n")
    assert len(vocabularies) == 1


def test_byte_pair_merges_of_a_hand_case(ldm) -> None:
    # Pairs: a-b 3 + 2 = 5, then ab-c</w> 3 and ab-g</w> 2; e-f</w> occurs once and stays apart.
    words = {"abc": 3, "abg": 2, "ef": 1}
    assert ldm.byte_pair_merges(words, 10) == [("a", "b"), ("ab", "c</w>"), ("ab", "g</w>")]
    assert ldm.byte_pair_merges(words, 1) == [("a", "b")]
    assert ldm.byte_pair_merges({"aaa": 2}, 10) == [("a", "a"), ("aa", "a</w>")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 30}, r"resolution must be a multiple of 4, got 30\. Use 32 or 64"),
        ({"vae_channels": "8,x"}, r"channels must be positive integers with commas between, got '8,x'"),
    ],
)
def test_options_that_cannot_be_used(ldm, tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ldm.ConfigurationError, match=message):
        ldm.train(tiny(ldm, tmp_path, **changes), synthetic_glyphs())


def test_resolution_is_four_times_the_latents_side(ldm) -> None:
    assert (ldm.Config().resolution, ldm.Config().latent_side) == (64, 16)
    config = ldm.Config(resolution=32)
    assert config.latent_side == 8
    assert ldm.build_unet(config).config.sample_size == 8
    assert config.command() == "python -m train.ldm --resolution 32"


def test_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from train import ldm

    monkeypatch.setitem(sys.modules, "fontTools", None)
    monkeypatch.setattr(ldm, "EXTRA", ("fontTools",))
    with pytest.raises(MissingExtraError, match=re.escape("Install the extra: pip install 'refine-env[ldm]'")):
        ldm.require_extra()


def test_command_line_has_help_and_one_sentence_errors(tmp_path: Path) -> None:
    for module in EXTRA:
        pytest.importorskip(module, reason="the ldm extra is not installed")
    command = [sys.executable, "-m", "train.ldm"]
    shown = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--resolution" in shown.stdout
    failed = subprocess.run(
        [*command, "--font", str(tmp_path / "none.ttf")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert failed.returncode == 3
    assert "Install fonts-noto-color-emoji or correct --font." in failed.stderr
    assert "Traceback" not in failed.stderr


def test_missing_groups_are_said_before_the_training(tmp_path: Path, font: Path) -> None:
    for module in EXTRA:
        pytest.importorskip(module, reason="the ldm extra is not installed")
    options = ["--emoji-test", str(tmp_path / "none.txt"), "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    failed = subprocess.run(
        [sys.executable, "-m", "train.ldm", *options], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert failed.returncode == 3
    assert "Install unicode-data or correct --emoji-test." in failed.stderr
    assert list(tmp_path.iterdir()) == []


# --- The bundled model ----------------------------------------------------------------------------


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
    pipeline = ldm.load_pipeline(bundled)
    assert pipeline.safety_checker is None
    side = pipeline.unet.config.sample_size
    assert pipeline.vae.config.sample_size == 4 * side
    images, latents = ldm.sample(pipeline, ["mouse face", "flag j p"], guidance_scale=2.0, steps=4)
    assert images.shape == (2, 3, 4 * side, 4 * side)
    assert 0.05 < float((latents**2).mean()) < 5
