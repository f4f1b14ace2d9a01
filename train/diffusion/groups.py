"""Unicode's groups of emoji (Smileys & Emotion, Animals & Nature, ...), and which of them a picture is nearest to.

The groups stand in ``emoji-test.txt`` of the Unicode emoji data (© Unicode, Inc., Unicode License V3), of which
Debian's package ``unicode-data`` holds a copy. The file is read where it is installed; it is no part of this
repository.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from refine_env.errors import ConfigurationError
from train.diffusion import emoji

EMOJI_TEST = emoji.PackagedFile(
    "emoji-test.txt",
    "unicode-data",
    "--emoji-test",
    (Path("/usr/share/unicode"), Path("/usr/local/share/unicode"), Path.home() / ".local/share/unicode"),
)
GROUP_LINE = "# group:"


@dataclass(frozen=True)
class Groups:
    """The groups by prompt, and by family for those variants that the file does not list."""

    by_prompt: dict[str, str]
    by_family: dict[str, str]

    def of(self, glyph: emoji.Glyph) -> str:
        """Return the group of a glyph, "" if it has none (flags of states and provinces, bare letters and digits)."""
        return self.by_prompt.get(glyph.prompt) or self.by_family.get(glyph.family, "")


def read_groups(path: Path) -> Groups:
    """Read ``emoji-test.txt``: lines "code points ; status # comment" below lines "# group: name".

    Raises:
        ValueError: if the file holds no groups.
    """
    by_prompt: dict[str, str] = {}
    by_family: dict[str, str] = {}
    group = ""
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.startswith(GROUP_LINE):
                group = line.removeprefix(GROUP_LINE).strip()
            elif group and line and not line.startswith("#"):
                codepoints = [int(word, 16) for word in line.split(";")[0].split()]
                by_prompt.setdefault(emoji.prompt_of(codepoints), group)
                by_family.setdefault(emoji.family_of(codepoints), group)
    except (ValueError, OverflowError):  # no text, or no numbers of characters
        by_prompt.clear()
    for names in (by_prompt, by_family):
        names.pop("", None)  # sequences with a character that has no name
    if not by_prompt:
        raise ConfigurationError(
            f"emoji_test must hold lines {GROUP_LINE!r}, got {path}. Use {EMOJI_TEST.name} of Unicode."
        )
    return Groups(by_prompt, by_family)


def match_rate(found: Sequence[str], wanted: Sequence[str]) -> float:
    """Return the part of the prompts whose found group is the wanted one; no group matches nothing."""
    return sum(bool(a) and a == b for a, b in zip(found, wanted, strict=True)) / max(1, len(wanted))


def chance(wanted: Sequence[str], offered: Sequence[str]) -> dict[str, float]:
    """Return what guessing matches: the expectation for a random candidate, and the best single group.

    Args:
        wanted: the groups of the prompts.
        offered: the groups of the candidates.
    """
    of_candidates, of_prompts = Counter(offered), Counter(group for group in wanted if group)
    count = max(1, len(wanted))
    return {
        "random_glyph": sum(of_candidates[group] * n for group, n in of_prompts.items()) / count / max(1, len(offered)),
        "best_single_group": max(of_prompts.values(), default=0) / count,
    }
