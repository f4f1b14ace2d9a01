"""The glyph data set: the bitmaps of Noto Color Emoji, each under a prompt made of its characters' names.

Terms: a *glyph* is one bitmap with its prompt; a *family* is the set of glyphs that show one emoji in its
variants of skin tone, gender and direction. Families, not glyphs, are held out, so that a held-out prompt is
really new.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.cluster.hierarchy import DisjointSet

from refine_env.errors import ConfigurationError

if TYPE_CHECKING:
    from numpy.typing import NDArray

ZERO_WIDTH_JOINER = 0x200D
VARIATION_SELECTORS = frozenset({0xFE0E, 0xFE0F})
REGIONAL_INDICATORS = range(0x1F1E6, 0x1F200)
TAGS = range(0xE0020, 0xE0080)
CANCEL_TAG = 0xE007F
BLACK_FLAG = 0x1F3F4
SKIN_TONES = range(0x1F3FB, 0x1F400)
GENDER_SIGNS = frozenset({0x2640, 0x2642})
RIGHT_ARROW = 0x27A1  # after a ZWJ it turns a person to the right
ADULTS = frozenset({0x1F468, 0x1F469, 0x1F9D1})
CHILDREN = frozenset({0x1F466, 0x1F467, 0x1F9D2})
BABIES = frozenset({0x1F476, 0x1F37C})
HEART, KISS, HANDSHAKE = 0x2764, 0x1F48B, 0x1F91D

# Regions without a flag of their own, by their letters: they fly that of the region they belong to, whose letters
# then name the bitmap that they share.
FLAGLESS_REGIONS = frozenset({"bv", "cp", "dg", "ea", "hm", "mf", "sj", "um"})

# The characters that stand first in those ZWJ sequences that do not begin with a person.
LEADING = frozenset(
    {
        0x1F3F3,
        BLACK_FLAG,
        0x1F415,
        0x1F408,
        0x1F43B,
        0x1F426,
        0x1F441,
        HEART,
        0x1F636,
        0x1F62E,
        0x1F635,
        0x1F642,
        0x1FAF1,
    }
)

# Emoji that differ in gender or age alone but have characters of their own: each with the family it is in.
TWINS: dict[int, str] = {
    **dict.fromkeys((0x1F474, 0x1F475, 0x1F9D3), "older person"),
    **dict.fromkeys((0x1F478, 0x1F934, 0x1FAC5), "royalty"),
    **dict.fromkeys((0x1F385, 0x1F936), "christmas"),
    **dict.fromkeys((0x1F483, 0x1F57A), "dancer"),
    **dict.fromkeys((0x1F46A,), "group of parents and children"),
    **dict.fromkeys((0x1F46B, 0x1F46C, 0x1F46D), "couple holding hands"),
    **dict.fromkeys((0x1F48F,), "couple kissing"),
    **dict.fromkeys((0x1F491,), "couple with heart"),
}

# Names of Unicode 15.0, newer than some interpreters' tables: the prompts must not depend on the interpreter.
NAMES_15: dict[int, str] = {
    0x1F6DC: "wireless",
    0x1FA75: "light blue heart",
    0x1FA76: "grey heart",
    0x1FA77: "pink heart",
    0x1FA87: "maracas",
    0x1FA88: "flute",
    0x1FAAD: "folding hand fan",
    0x1FAAE: "hair pick",
    0x1FAAF: "khanda",
    0x1FABB: "hyacinth",
    0x1FABC: "jellyfish",
    0x1FABD: "wing",
    0x1FABF: "goose",
    0x1FACE: "moose",
    0x1FACF: "donkey",
    0x1FADA: "ginger root",
    0x1FADB: "pea pod",
    0x1FAE8: "shaking face",
    0x1FAF7: "leftwards pushing hand",
    0x1FAF8: "rightwards pushing hand",
}


@dataclass(frozen=True)
class Glyph:
    """One image of the data set: its prompt, its family and its encoded bitmap (PNG, alpha allowed)."""

    prompt: str
    family: str
    png: bytes


@dataclass(frozen=True)
class PackagedFile:
    """A file that a package of Debian installs.

    Attributes:
        name: the file's name.
        package: the package.
        option: the option that names the file where it is not installed.
        folders: the usual folders, of the system and of the user, in or below which it lies.
    """

    name: str
    package: str
    option: str
    folders: tuple[Path, ...]

    def find(self, given: Path | None = None) -> Path:
        """Return the file ``given``, else the first one of that name under the folders.

        Raises:
            FileNotFoundError: if there is no such file; the message names the package and the option.
        """
        if given is not None:
            if given.is_file():
                return given
            raise FileNotFoundError(
                f"`{self.option}` must be an existing file, got {given}. Install {self.package} or correct it."
            )
        for folder in self.folders:
            for path in sorted(folder.rglob(self.name)) if folder.is_dir() else ():
                return path
        raise FileNotFoundError(
            f"{self.name} was not found in {', '.join(map(str, self.folders))}. "
            f"Install the package {self.package} (apt install {self.package}) or name the file with {self.option}."
        )


FONT = PackagedFile(
    "NotoColorEmoji.ttf",
    "fonts-noto-color-emoji",
    "--font",
    (
        Path("/usr/share/fonts"),
        Path("/usr/local/share/fonts"),
        Path.home() / ".local/share/fonts",
        Path.home() / ".fonts",
    ),
)


def _name(codepoint: int) -> str:
    """Return the lower-case Unicode name of a character, "" where it has none (private use, too new)."""
    return NAMES_15.get(codepoint) or unicodedata.name(chr(codepoint), "").lower()


def _without_format(codepoints: Sequence[int]) -> list[int]:
    return [c for c in codepoints if c != ZERO_WIDTH_JOINER and c not in VARIATION_SELECTORS]


def prompt_of(codepoints: Sequence[int]) -> str:
    """Return the prompt of a character sequence, "" if a character in it has no name.

    The names are joined by blanks, in lower case. A flag is "flag" and its letters: regional indicators J P
    give "flag j p", and the tag sequence of England gives "flag g b e n g".
    """
    visible = _without_format(codepoints)
    if len(visible) == 2 and all(c in REGIONAL_INDICATORS for c in visible):
        return "flag " + " ".join(chr(ord("a") + c - REGIONAL_INDICATORS.start) for c in visible)
    if any(c in TAGS for c in visible):
        letters = [chr(c - 0xE0000) for c in visible if c in TAGS and c != CANCEL_TAG]
        return " ".join(["flag", *letters]) if letters else ""
    names = [_name(c) for c in visible]
    return " ".join(names) if names and all(names) else ""


def family_of(codepoints: Sequence[int]) -> str:
    """Return the family of a character sequence: what is left without skin tone, gender and direction."""
    visible = _without_format(codepoints)
    if len(visible) == 1 and visible[0] in SKIN_TONES:
        return "skin tone"
    bare = [c for c in visible if c not in SKIN_TONES]
    if len(bare) > 1:
        bare = [c for c in bare if c not in GENDER_SIGNS]
    if len(bare) > 1 and bare[-1] == RIGHT_ARROW:
        bare = bare[:-1]
    people = [c for c in bare if c in ADULTS]
    if people:
        if KISS in bare:
            return "couple kissing"
        if HEART in bare:
            return "couple with heart"
        if HANDSHAKE in bare:
            return "couple holding hands"
        if len(bare) > 1 and all(c in ADULTS | CHILDREN for c in bare):
            return "group of parents and children"
        bare = [0x1F9D1 if c in ADULTS else c for c in bare]
        if bare == [0x1F9D1, 0x1F384]:
            return "christmas"
    elif bare and bare[0] in CHILDREN:
        bare[0] = 0x1F9D2
    if len(bare) == 1 and bare[0] in TWINS:
        return TWINS[bare[0]]
    return prompt_of(bare)


def _reading_order(codepoints: Sequence[int]) -> tuple[int, ...]:
    """Sort key of the sequences that lead to one glyph: the smallest is in logical order.

    The font also lists each ZWJ sequence backwards, for right-to-left text. A flag that several regions fly is
    named by the one whose own it is.
    """
    first = codepoints[0]
    stray_tones = sum(a == ZERO_WIDTH_JOINER and b in SKIN_TONES for a, b in itertools.pairwise(codepoints))
    if first in ADULTS:
        rank = 0
    elif first in GENDER_SIGNS or first in CHILDREN or first == RIGHT_ARROW:
        rank = 3
    else:
        rank = 1 if first in LEADING else 2
    borrowed = prompt_of(codepoints).removeprefix("flag ").replace(" ", "") in FLAGLESS_REGIONS
    # Of two people the woman stands first in a couple, the man in a group with children.
    couple = HEART in codepoints or HANDSHAKE in codepoints
    second_choice = first == 0x1F468 if couple else first == 0x1F469
    children_first = sum(i for i, c in enumerate(codepoints) if c == 0x1F466)  # sequences list the girl before the boy
    return (stray_tones, int(borrowed), rank, int(second_choice), -children_first, *codepoints)


def _character_sequences(font: Any) -> dict[str, list[tuple[int, ...]]]:
    """Return every character sequence that leads to a glyph name: from cmap and from the GSUB ligatures."""
    sequences: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    codepoint_of: dict[str, int] = {}
    for codepoint, name in font.getBestCmap().items():
        codepoint_of.setdefault(name, codepoint)
        sequences[name].append((codepoint,))
    for lookup in font["GSUB"].table.LookupList.Lookup:
        for subtable in lookup.SubTable:
            ligatures = getattr(getattr(subtable, "ExtSubTable", subtable), "ligatures", {})
            for first, entries in ligatures.items():
                for entry in entries:
                    names = [first, *entry.Component]
                    if all(name in codepoint_of for name in names):
                        sequences[entry.LigGlyph].append(tuple(codepoint_of[name] for name in names))
    return sequences


def read_glyphs(font: Path) -> list[Glyph]:
    """Read the color bitmaps (CBDT) of a font; sorted by prompt, prompts unique.

    Families whose bitmaps are equal byte for byte (some flags) become one family. Private-use characters are
    left out: they repeat glyphs that have a sequence of their own.

    Raises:
        ConfigurationError: if it is no font, or one without bitmap strike.
    """
    from fontTools.ttLib import TTFont, TTLibError

    unusable = ConfigurationError(
        f"font must hold color bitmaps (a CBDT table), got {font}. Use {FONT.name} of {FONT.package}."
    )
    try:
        file = TTFont(font, lazy=True)
    except TTLibError:
        raise unusable from None
    with file as opened:
        if "CBDT" not in opened or "GSUB" not in opened:
            raise unusable
        sequences = _character_sequences(opened)
        bitmaps = {name: bytes(bitmap.imageData) for name, bitmap in opened["CBDT"].strikeData[0].items()}
    found: dict[str, Glyph] = {}
    for name, png in bitmaps.items():
        named = [s for s in sequences.get(name, ()) if prompt_of(s)]
        if not named:
            continue
        codepoints = min(named, key=_reading_order)
        prompt = prompt_of(codepoints)
        found.setdefault(prompt, Glyph(prompt, family_of(codepoints), png))
    return sorted(_join_equal(found.values()), key=lambda glyph: glyph.prompt)


def _join_equal(glyphs: Iterable[Glyph]) -> Iterator[Glyph]:
    """Yield the glyphs with the families of equal bitmaps joined under the alphabetically first name."""
    glyphs = list(glyphs)
    joined = DisjointSet({glyph.family for glyph in glyphs})
    by_bitmap: dict[bytes, str] = {}
    for glyph in glyphs:
        joined.merge(glyph.family, by_bitmap.setdefault(glyph.png, glyph.family))
    for glyph in glyphs:
        yield replace(glyph, family=min(joined.subset(glyph.family)))


def _draw(seed: int, text: str) -> bytes:
    """Return a seeded pseudo-random sort key of a text: the same in every process and on every machine."""
    return hashlib.sha256(f"{seed}|{text}".encode()).digest()


def split(glyphs: Sequence[Glyph], fraction: float, seed: int) -> tuple[list[Glyph], list[Glyph]]:
    """Split into train and held-out glyphs by family; at most ``fraction`` of the glyphs are held out.

    Families are taken in a seeded pseudo-random order; one that would pass the target is passed over.

    Raises:
        ValueError: if ``fraction`` is not in [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"fraction must be at least 0 and below 1, got {fraction}. Use for example 0.05.")
    size: dict[str, int] = defaultdict(int)
    for glyph in glyphs:
        size[glyph.family] += 1
    target = int(fraction * len(glyphs))
    held: set[str] = set()
    count = 0
    for family in sorted(size, key=lambda name: _draw(seed, name)):
        if count + size[family] <= target:
            held.add(family)
            count += size[family]
    return [g for g in glyphs if g.family not in held], [g for g in glyphs if g.family in held]


def diverse_prompts(glyphs: Sequence[Glyph], count: int, seed: int, most_flags: int = 2) -> list[str]:
    """Choose ``count`` prompts that show different things, fewer if there are fewer glyphs.

    One glyph a family (the shortest prompt: no skin tone, no gender), pictures before signs and letters, at
    most ``most_flags`` flags; what is missing is filled up with further glyphs.
    """
    first: dict[str, str] = {}
    for glyph in sorted(glyphs, key=lambda g: (len(g.prompt), g.prompt)):
        first.setdefault(glyph.family, glyph.prompt)
    order = sorted(first.values(), key=lambda prompt: _draw(seed, prompt))
    flags = [p for p in order if p.startswith("flag ")]
    signs = [p for p in order if not p.startswith("flag ") and _is_sign(p)]
    pictures = [p for p in order if not p.startswith("flag ") and not _is_sign(p)]
    chosen = (pictures + flags[:most_flags] + signs)[:count] if len(pictures) < count else pictures[:count]
    rest = sorted((g.prompt for g in glyphs if g.prompt not in set(chosen)), key=lambda prompt: _draw(seed, prompt))
    return sorted(chosen + rest[: count - len(chosen)], key=lambda prompt: _draw(seed, prompt))


# Words of glyphs that are writing or plain geometry rather than pictures.
SIGN_WORDS = frozenset(
    """
        ab aquarius aries arrow arrows arrowhead arrowheads asterisk astrological bar button cancer
    capricorn circle     circled clock cross currency dash digit exclamation fleur-de-lis gemini
    ideograph indicator information     input keycap khanda large latin leo letter libra loop mark
    medium menorah minus mode multiplication negative     number octagonal ophiuchus percent pisces
    plus point pointed question recycling repeat sagittarius scorpius     sign small sparkle squared
    square symbol taurus tone triangle triangular type-1-2 virgo wheel wireless yin
    """.split()  # noqa: SIM905
)


def _is_sign(prompt: str) -> bool:
    return not SIGN_WORDS.isdisjoint(prompt.split())


def is_picture(prompt: str) -> bool:
    """Return whether a prompt shows something other than a flag, writing or plain geometry."""
    return not prompt.startswith("flag ") and not _is_sign(prompt)


def pixels(glyphs: Sequence[Glyph], resolution: int) -> NDArray[np.uint8]:
    """Return the glyphs over white, centered in a square: uint8 array (N, 3, resolution, resolution)."""
    from PIL import Image

    images = np.empty((len(glyphs), 3, resolution, resolution), dtype=np.uint8)
    for k, glyph in enumerate(glyphs):
        with Image.open(io.BytesIO(glyph.png)) as opened:
            bitmap = opened.convert("RGBA")
        side = max(bitmap.size)
        canvas = Image.new("RGBA", (side, side), "white")
        canvas.alpha_composite(bitmap, ((side - bitmap.width) // 2, (side - bitmap.height) // 2))
        small = canvas.convert("RGB").resize((resolution, resolution), Image.Resampling.LANCZOS)
        images[k] = np.asarray(small).transpose(2, 0, 1)
    return images
