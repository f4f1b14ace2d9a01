"""The training of the bundled emoji model: glyphs, prompts, split, a tiny run, resuming, the result."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from train import emoji
from train.emoji import Glyph

ROOT = Path(__file__).parents[2]
BUNDLED = ROOT / "refine_env/models/emoji"
EXTRA = ("torch", "diffusers", "transformers", "accelerate", "fontTools", "PIL")

# Third-party warnings at import and load time; the project's own are still errors.
pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*lr_scheduler.step.*:UserWarning"
)


@pytest.fixture(scope="module")
def font() -> Path:
    pytest.importorskip("fontTools", reason="the ldm extra is not installed")
    try:
        return emoji.find_font()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def font_glyphs(font: Path) -> list[Glyph]:
    return emoji.read_glyphs(font)


@pytest.fixture
def ldm():
    for module in EXTRA:
        pytest.importorskip(module, reason="the ldm extra is not installed")
    import torch

    from train import ldm

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield ldm
    torch.set_num_threads(threads)


def synthetic_glyphs() -> list[Glyph]:
    from PIL import Image

    glyphs = []
    for k, (color, shape) in enumerate(
        (c, s) for c in ("red", "green", "blue") for s in ("square", "bar", "dot", "box")
    ):
        image = Image.new("RGBA", (20, 16))
        image.paste(color, (2, 2, 6 + 3 * (k % 4), 12))
        file = io.BytesIO()
        image.save(file, format="PNG")
        glyphs.append(Glyph(f"{color} {shape}", f"{color} {shape}", file.getvalue()))
    return glyphs


def tiny(ldm, folder: Path, **changes):
    options = {
        "out": folder / "model",
        "work": folder / "work",
        "trajectory_prompts": folder / "trajectories.txt",
        "resolution": 16,
        "held_out": 0.25,
        "threads": 1,
        "bf16": False,
        "log_every": 2,
        "checkpoint_every": 2,
        "sheet_prompts": 1,
        "vae_channels": "8,16",
        "vae_steps": 4,
        "vae_batch": 4,
        "unet_channels": "8,16",
        "unet_heads": 2,
        "unet_steps": 4,
        "unet_batch": 4,
        "unet_warmup": 1,
        "text_width": 8,
        "text_layers": 1,
        "text_heads": 2,
        "text_length": 8,
    }
    return ldm.Config(**{**options, **changes})


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
    images, mean_square = ldm.sample(pipeline, ["red dot", "blue box"], guidance_scale=2.0, steps=2)
    assert images.shape == (2, 16, 16, 3)
    assert images.dtype == np.uint8
    assert mean_square > 0
    metrics = json.loads((folder / "metrics.json").read_text())
    assert (metrics["glyphs_train"], metrics["glyphs_held_out"]) == (9, 3)
    assert metrics["unet"]["images_seen"] == 16
    assert "Noto Color Emoji" in (folder / "README.md").read_text()
    assert (whole.work / "samples.png").stat().st_size > 0

    with pytest.raises(ldm.ConfigurationError, match=r"which has unet_lr 0\.0008 \(now 0\.1\)\. Use the same options"):
        ldm.train(tiny(ldm, tmp_path / "broken", unet_lr=0.1), glyphs)
    with pytest.raises(ldm.ConfigurationError, match=r"which has data \w+ \(now \w+\)\. Use the same options"):
        ldm.train(broken, glyphs[:6])


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


def test_resolution_64_has_latents_of_side_16(ldm) -> None:
    config = ldm.Config(resolution=64)
    assert config.latent_side == 16
    assert ldm.build_unet(config).config.sample_size == 16
    assert config.command() == "python -m train.ldm --resolution 64"


def test_missing_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from train import ldm

    monkeypatch.setitem(sys.modules, "fontTools", None)
    monkeypatch.setattr(ldm, "EXTRA", ("fontTools",))
    with pytest.raises(ldm.MissingExtraError, match=re.escape("Install the extra: pip install 'refine-env[ldm]'")):
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
    assert failed.returncode == 1
    assert "Install fonts-noto-color-emoji or correct --font." in failed.stderr
    assert "Traceback" not in failed.stderr


# --- The bundled model ----------------------------------------------------------------------------


@pytest.fixture
def bundled() -> Path:
    if not (BUNDLED / "model_index.json").is_file():
        pytest.skip("the bundled model is not in this checkout")
    return BUNDLED


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
    images, mean_square = ldm.sample(pipeline, ["rabbit face", "flag j p"], guidance_scale=2.0, steps=4)
    assert images.shape == (2, 4 * side, 4 * side, 3)
    assert 0.05 < mean_square < 5
