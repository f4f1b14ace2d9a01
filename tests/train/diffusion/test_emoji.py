"""The glyphs, their prompts and their families."""

from __future__ import annotations

from dataclasses import replace
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
    with pytest.raises(FileNotFoundError, match=r"`--font` must be .* Install fonts-noto-color-emoji or correct it"):
        emoji.FONT.find(tmp_path / "none.ttf")


def test_missing_font_in_the_font_folders(tmp_path: Path) -> None:
    font = replace(emoji.FONT, folders=(tmp_path,))
    with pytest.raises(FileNotFoundError, match=r"apt install fonts-noto-color-emoji\) or name the file with --font"):
        font.find()
