"""The gallery of the glyphs that a model was trained on: small pictures, their names and their Unicode groups.

``python -m train.diffusion.gallery`` writes it beside the model, where :class:`refine_env.metrics.GlyphTask` looks for
it: an ``.npz`` file without pickled objects, with

- ``thumbnails``: uint8 (K, side, side, 3), over white, shrunk as a decoded image is before it is compared;
- ``prompts`` and ``groups``: the glyphs' names and Unicode's groups, empty where a glyph has none;
- ``origin``: where they come from, and under which licenses.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from refine_env.commands import command, run
from refine_env.errors import ConfigurationError
from refine_env.evaluation import write_atomically
from refine_env.metrics import gallery_path, shrink
from train.diffusion import emoji
from train.diffusion.assess import read_prompts, sources
from train.diffusion.config import MODEL, FontOption, GroupsOption
from train.diffusion.groups import Groups
from train.options import require_extra, show_log

log = logging.getLogger("train.diffusion.gallery")

EXTRA = ("fontTools", "PIL")
"""Packages of the ``ldm`` extra without which no glyph is read."""

ORIGIN = (
    "Thumbnails: bitmaps of Noto Color Emoji, © Google, SIL Open Font License 1.1. "
    "Groups: Unicode's emoji-test.txt, © Unicode, Inc., Unicode License V3."
)


def write_gallery(path: Path, glyphs: Sequence[emoji.Glyph], groups: Groups, resolution: int, side: int) -> None:
    """Write the gallery of some glyphs, atomically; the same glyphs give the same bytes.

    Args:
        path: the ``.npz`` file.
        glyphs: the glyphs.
        groups: Unicode's groups.
        resolution: side of the images that the model was trained on, in pixels.
        side: that of the thumbnails, which divides it.

    Raises:
        ConfigurationError: if it does not.
    """
    images = emoji.pixels(glyphs, resolution).transpose(0, 2, 3, 1)
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        allow_pickle=False,
        thumbnails=np.rint(shrink(images, side)).astype(np.uint8),
        prompts=np.array([glyph.prompt for glyph in glyphs]),
        groups=np.array([groups.of(glyph) for glyph in glyphs]),
        origin=np.array(ORIGIN),
    )
    write_atomically(path, buffer.getvalue())


@command
def main(
    model: Annotated[Path, typer.Option(help="The model folder.")] = MODEL,
    out: Annotated[Path | None, typer.Option(help="File to write.", show_default="MODEL-glyphs.npz")] = None,
    side: Annotated[int, typer.Option(help="Side of the thumbnails in pixels; divides that of the images.")] = 16,
    font: FontOption = None,
    emoji_test: GroupsOption = None,
) -> None:
    """Write the gallery of the glyphs that a model was trained on, which `--metrics task` compares images with."""
    show_log()
    require_extra("ldm", EXTRA)
    try:
        resolution = int(json.loads((model / "metrics.json").read_text(encoding="utf-8"))["resolution"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigurationError(
            f"`--model` must be the folder of a model that python -m train.ldm trained, got {str(model)!r}. "
            "Give its folder."
        ) from None
    if not 1 <= side <= resolution or resolution % side:
        raise ConfigurationError(
            f"`--side` must divide the side of the model's images, {resolution}, got {side}. Give for example 16."
        )
    glyphs, groups = sources(font, emoji_test)
    trained = read_prompts(model / "prompts_train.txt", glyphs)
    path = gallery_path(model) if out is None else out
    write_gallery(path, trained, groups, resolution, side)
    log.info("wrote %s: %d glyphs, %d bytes", path, len(trained), path.stat().st_size)


if __name__ == "__main__":
    run(main)
