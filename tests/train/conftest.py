"""Shared by the tests of the training: the font, a data set of drawn shapes, options that train in a second."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest

from train.diffusion import emoji
from train.diffusion.config import EXTRA, Config
from train.diffusion.emoji import Glyph

BUNDLED = Path(__file__).parents[2] / "refine_env/models/emoji"


@pytest.fixture(scope="session")
def font() -> Path:
    pytest.importorskip("fontTools", reason="the ldm extra is not installed")
    try:
        return emoji.FONT.find()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def font_glyphs(font: Path) -> list[Glyph]:
    return emoji.read_glyphs(font)


@pytest.fixture
def ldm() -> Iterator[None]:
    """The ldm extra is installed, and torch works with one thread."""
    for module in EXTRA:
        pytest.importorskip(module, reason="the ldm extra is not installed")
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
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


def tiny(folder: Path, **changes) -> Config:
    options = {
        "out": folder / "model",
        "work": folder / "work",
        "trajectory_prompts": folder / "trajectories.txt",
        "sheet": folder / "sheet.png",
        "resolution": 16,
        "held_out": 0.25,
        "threads": 1,
        "bf16": False,
        "log_every": 2,
        "checkpoint_every": 2,
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
    return Config(**{**options, **changes})


@pytest.fixture
def bundled() -> Path:
    if not (BUNDLED / "model_index.json").is_file():
        pytest.skip("the bundled model is not in this checkout")
    return BUNDLED
