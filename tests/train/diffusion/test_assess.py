"""The evaluation of the emoji model: Unicode's groups, nearest glyphs, figures, table, sheet, card."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from refine_env.errors import ConfigurationError
from refine_env.metrics import nearest
from tests.train.conftest import synthetic_glyphs, tiny
from train.diffusion import assess, emoji, groups
from train.diffusion.emoji import Glyph
from train.diffusion.groups import Groups
from train.diffusion.training import train

ROOT = Path(__file__).parents[3]

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*lr_scheduler.step.*:UserWarning"
)

EMOJI_TEST = """\
# emoji-test.txt
# Version: 15.0

# group: Animals & Nature

# subgroup: animal-mammal
1F430                                                  ; fully-qualified     # 🐰 E0.6 rabbit face
# Animals & Nature subtotal: 1

# group: People & Body

# subgroup: person-role
1F469 200D 1F33E                                       ; fully-qualified     # 👩‍🌾 E4.0 woman farmer
1F3C3                                                  ; fully-qualified     # 🏃 E0.6 person running
FE4E5                                                  ; fully-qualified     # a character without a name

# group: Flags
1F1EF 1F1F5                                            ; fully-qualified     # 🇯🇵 E0.6 flag: Japan

#EOF
"""


def glyph(codepoints: list[int]) -> Glyph:
    return Glyph(emoji.prompt_of(codepoints), emoji.family_of(codepoints), b"")


@pytest.fixture
def emoji_test(tmp_path: Path) -> Path:
    path = tmp_path / "emoji-test.txt"
    path.write_text(EMOJI_TEST, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def installed_groups() -> Groups:
    try:
        return groups.read_groups(groups.EMOJI_TEST.find())
    except FileNotFoundError as error:
        pytest.skip(str(error))


# --- Groups ---------------------------------------------------------------------------------------


def test_groups_of_a_hand_made_file(emoji_test: Path) -> None:
    found = groups.read_groups(emoji_test)
    assert set(found.by_prompt) == {"rabbit face", "woman ear of rice", "runner", "flag j p"}
    assert found.of(glyph([0x1F430])) == "Animals & Nature"
    assert found.of(glyph([0x1F1EF, 0x1F1F5])) == "Flags"
    # Variants that the file does not list go by their family: a man farmer, a runner to the right.
    assert found.of(glyph([0x1F468, 0x200D, 0x1F33E])) == "People & Body"
    assert found.of(glyph([0x1F3C3, 0x200D, 0x27A1])) == "People & Body"
    assert found.of(glyph([0x1F1E6])) == ""


def test_installed_groups_hold_the_prompts_of_the_trajectories(installed_groups: Groups, font_glyphs) -> None:
    by_prompt = {glyph.prompt: glyph for glyph in font_glyphs}
    prompts = (ROOT / "cached_trajectories/default.prompts.txt").read_text(encoding="utf-8").splitlines()
    assert all(installed_groups.of(by_prompt[prompt]) for prompt in prompts)
    assert installed_groups.of(by_prompt["mouse face"]) == "Animals & Nature"


def test_missing_emoji_test_is_one_sentence_with_the_package(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"`--emoji-test` must .* got .*none\.txt\. Install unicode-data or"):
        groups.EMOJI_TEST.find(tmp_path / "none.txt")
    with pytest.raises(FileNotFoundError, match=r"apt install unicode-data\) or name the file with --emoji-test"):
        replace(groups.EMOJI_TEST, folders=(tmp_path,)).find()


def test_emoji_test_is_found_below_its_folder(emoji_test: Path) -> None:
    packaged = replace(groups.EMOJI_TEST, folders=(emoji_test.parent / "none", emoji_test.parent.parent))
    assert packaged.find().name == "emoji-test.txt"
    assert packaged.find(emoji_test) == emoji_test


def test_a_file_without_groups_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "emoji-test.txt"
    path.write_text("1F430 ; fully-qualified\n", encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"emoji_test must hold lines '# group:', got .*Use emoji-test\.txt of Unicode"
    ):
        groups.read_groups(path)


# --- Nearest glyphs, rates, chance ----------------------------------------------------------------


def test_nearest_of_a_hand_case_and_of_noisy_copies() -> None:
    candidates = np.array([[0, 0], [10, 0], [0, 10]], dtype=np.uint8)
    assert nearest(np.array([[1, 2], [9, 3], [2, 200]], dtype=np.uint8), candidates).tolist() == [0, 1, 2]
    rng = np.random.default_rng(0)
    many = rng.standard_normal((50, 4, 3, 3)).astype(np.float32)
    order = rng.permutation(50)
    noisy = many[order] + 0.1 * rng.standard_normal((50, 4, 3, 3)).astype(np.float32)
    assert nearest(noisy, many).tolist() == order.tolist()


def test_match_rate_counts_no_group_as_no_match() -> None:
    assert groups.match_rate(["a", "b", "", ""], ["a", "a", "", "b"]) == 0.25
    assert groups.match_rate([], []) == 0.0


def test_chance_of_a_hand_case() -> None:
    # Prompts: 2 a, 1 b; candidates: 1 a, 2 b, 1 without a group. Random: (2 · 1/4 + 1 · 2/4) / 3.
    guessed = groups.chance(["a", "a", "b"], ["a", "b", "b", ""])
    assert guessed == {"random_glyph": pytest.approx(1 / 3), "best_single_group": pytest.approx(2 / 3)}


def test_chance_is_what_random_candidates_match() -> None:
    rng = np.random.default_rng(1)
    offered = ["a"] * 60 + ["b"] * 30 + [""] * 10
    wanted = ["a", "b", "b", "c"]
    drawn = [groups.match_rate([offered[k] for k in rng.integers(100, size=4)], wanted) for _ in range(4000)]
    # The standard error of a mean of 4000 is 0.004.
    assert np.mean(drawn) == pytest.approx(groups.chance(wanted, offered)["random_glyph"], abs=0.02)


# --- The evaluation of a model --------------------------------------------------------------------


@pytest.fixture
def tiny_model(ldm, tmp_path: Path) -> tuple[Path, Path]:
    config = tiny(tmp_path)
    return train(config, synthetic_glyphs()), config.trajectory_prompts


def test_evaluation_of_a_tiny_model(ldm, tiny_model: tuple[Path, Path], tmp_path: Path) -> None:
    from PIL import Image

    model, prompts = tiny_model
    by_color = Groups({glyph.prompt: glyph.prompt.split()[0] for glyph in synthetic_glyphs()}, {})
    sheet = tmp_path / "figures/sheet.png"
    figures = assess.assess(model, prompts, sheet, synthetic_glyphs(), by_color, steps=2)
    assert figures["prompts"] == {"train": 9, "held_out": 3}
    assert set(figures["group_match"]) == {"1.0", "2.0", "4.0"}

    metrics = json.loads((model / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["evaluation"] == figures
    assert metrics["unet"]["images_seen"] == 16

    with (model / "groups.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["prompt"] for row in rows] == prompts.read_text(encoding="utf-8").splitlines()
    assert all(row["group"] == row["prompt"].split()[0] for row in rows)
    train = {row["prompt"] for row in rows if row["part"] == "train"}
    assert {row["nearest_pixels"] for row in rows if row["part"] == "train"} <= train
    for part, rates in figures["group_match"]["2.0"].items():
        for space, rate in rates.items():
            chosen = [row for row in rows if row["part"] == part]
            hits = [row[f"group_{space}"] == row["group"] for row in chosen]
            assert rate == pytest.approx(np.mean(hits), abs=1e-4)
            assert all(row[f"group_{space}"] == row[f"nearest_{space}"].split()[0] for row in chosen)

    card = (model / "README.md").read_text(encoding="utf-8")
    assert card == assess.model_card(metrics)
    assert all(name in card for name in ("Noto Color Emoji", "Unicode License V3", "4×8×8 (M = 256)"))
    with Image.open(sheet) as picture:
        assert picture.width == 2 * assess.SHEET_MARGIN + 8 * assess.SHEET_CELL[0]

    # The figures say what the model does: the same again, and others for another model.
    assert assess.assess(model, prompts, sheet, synthetic_glyphs(), by_color, steps=2) == figures


def test_the_glyphs_themselves_match_in_full(
    ldm, tiny_model: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, prompts = tiny_model
    by_prompt = {glyph.prompt: glyph for glyph in synthetic_glyphs()}

    def perfect(pipeline, wanted, scale, steps):
        images = emoji.pixels([by_prompt[prompt] for prompt in wanted], 16)
        return images, assess.embeddings(pipeline.vae, images, "cpu")

    monkeypatch.setattr("train.diffusion.pipeline.sample", perfect)
    each = Groups({prompt: prompt for prompt in by_prompt}, {})
    figures = assess.assess(model, prompts, tmp_path / "sheet.png", synthetic_glyphs(), each, steps=2)
    for kind in ("group_match", "family_match"):
        for rates in figures[kind]["2.0"].values():
            assert rates == {"pixels": 1.0, "latents": 1.0}


def test_prompts_of_another_font_are_refused(ldm, tiny_model: tuple[Path, Path], tmp_path: Path) -> None:
    model, prompts = tiny_model
    with pytest.raises(ConfigurationError, match=r"got '\w+ \w+' in .*prompts_train\.txt\. Use the version of fonts-"):
        assess.assess(model, prompts, tmp_path / "sheet.png", synthetic_glyphs()[:2], Groups({}, {}))


def test_lines_are_broken_at_blanks() -> None:
    pytest.importorskip("torch", reason="the ldm extra is not installed")

    def fits(text: str) -> bool:
        return len(text) <= 8

    assert assess.wrapped("a cat and an extraordinary dog", fits) == ["a cat", "and an", "extraordinary", "dog"]
    assert assess.wrapped("", fits) == []


# --- The bundled model ----------------------------------------------------------------------------


@pytest.fixture
def measured(bundled: Path) -> dict:
    return json.loads((bundled / "metrics.json").read_text(encoding="utf-8"))


def test_bundled_model_has_64_pixels_and_1024_latents(bundled: Path) -> None:
    unet = json.loads((bundled / "unet/config.json").read_text())
    vae = json.loads((bundled / "vae/config.json").read_text())
    assert (vae["sample_size"], vae["latent_channels"], unet["sample_size"]) == (64, 4, 16)


def test_bundled_model_reaches_its_figures(measured: dict) -> None:
    evaluation = measured["evaluation"]
    assert evaluation["psnr_db"]["held_out"] >= 24
    used = str(evaluation["guidance_scale"])
    assert min(evaluation["group_match"][used]["train"].values()) >= 0.6
    # Far above chance; the held-out prompts are above that of a random glyph at least.
    for part in ("train", "held_out"):
        assert min(evaluation["group_match"][used][part].values()) > evaluation["chance"][part]["random_glyph"]


def test_bundled_card_and_table_are_those_of_the_figures(bundled: Path, measured: dict) -> None:
    assert (bundled / "README.md").read_text(encoding="utf-8") == assess.model_card(measured)
    with (bundled / "groups.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    prompts = (ROOT / "cached_trajectories/default.prompts.txt").read_text(encoding="utf-8").splitlines()
    assert [row["prompt"] for row in rows] == prompts
    for part, rates in measured["evaluation"]["group_match"]["2.0"].items():
        for space, rate in rates.items():
            hits = [row[f"group_{space}"] == row["group"] for row in rows if row["part"] == part]
            assert rate == pytest.approx(np.mean(hits), abs=1e-4)


def test_docs_state_the_figures_that_were_measured(measured: dict) -> None:
    page = (ROOT / "docs/emoji-model.md").read_text(encoding="utf-8")
    evaluation, unet = measured["evaluation"], measured["unet"]
    best = min(measured["history"]["unet"], key=lambda figures: figures["held_noise_mse"])
    groups_, families = (evaluation[kind]["2.0"] for kind in ("group_match", "family_match"))

    def row(label: str, figure) -> str:
        return f"| {label} | {' | '.join(f'{100 * figure(part):.0f} %' for part in ('train', 'held_out'))} |"

    psnr = evaluation["psnr_db"]
    expected = [
        f"| PSNR of the VAE | {psnr['train']:.1f} dB | {psnr['held_out']:.1f} dB |",
        (
            f"| noise prediction error | {unet['train_noise_mse']:.3f} | {unet['held_noise_mse']:.3f} "
            f"(lowest {best['held_noise_mse']:.3f}, at step {best['step']}) |"
        ),
        row("sample nearest to a glyph of the prompt's group, pixels", lambda part: groups_[part]["pixels"]),
        row("the same in latents", lambda part: groups_[part]["latents"]),
        row("chance: a random glyph", lambda part: evaluation["chance"][part]["random_glyph"]),
        row(
            "chance: the best single group for all prompts",
            lambda part: evaluation["chance"][part]["best_single_group"],
        ),
        row("sample nearest to a glyph of the prompt's family, latents", lambda part: families[part]["latents"]),
        f"{measured['vae']['images_seen']:,} images",
        f"{measured['unet']['images_seen']:,} samples",
    ]
    assert [line for line in expected if line not in page] == []


def test_bundled_vae_reconstructs_held_out_glyphs_as_measured(
    ldm, bundled: Path, measured: dict, font_glyphs: list[Glyph]
) -> None:
    import torch

    from train.diffusion.pipeline import load_pipeline
    from train.diffusion.vae import psnr_db

    if measured["glyphs"] != len(font_glyphs):
        pytest.skip("the model was trained on another version of the font")
    _, held = emoji.split(font_glyphs, 0.05, measured["seeds"]["split_seed"])
    vae = load_pipeline(bundled).vae
    psnr = psnr_db(vae, torch.from_numpy(emoji.pixels(held, vae.config.sample_size)), "cpu")
    assert psnr == pytest.approx(measured["evaluation"]["psnr_db"]["held_out"], abs=0.02)


def test_bundled_cache_shows_what_the_table_says(ldm, bundled: Path, measured: dict, font_glyphs: list[Glyph]) -> None:
    """The evaluation samples with the seeds of the default cache: the same pictures, the same nearest glyphs."""
    from refine_env import TrajectoryCache
    from train.diffusion.pipeline import load_pipeline

    if measured["glyphs"] != len(font_glyphs):
        pytest.skip("the model was trained on another version of the font")
    with (bundled / "groups.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    by_prompt = {glyph.prompt: glyph for glyph in font_glyphs}
    named = sorted({row["nearest_latents"] for row in rows})
    vae = load_pipeline(bundled).vae
    images = emoji.pixels([by_prompt[prompt] for prompt in named], vae.config.sample_size)
    offered = assess.embeddings(vae, images, "cpu")
    cache = TrajectoryCache.open("default")
    x_0 = np.stack([np.asarray(cache.latents(k)[0], dtype=np.float32) for k in range(len(cache))])
    found = [named[k] for k in nearest(x_0.reshape(len(x_0), -1), offered)]
    same = np.mean([found[k] == row["nearest_latents"] for k, row in enumerate(rows)])
    assert same >= 0.98  # float16 latents may tip a close call
