"""The gallery of the glyphs that a model was trained on: made again, and as it is in the repository."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from refine_env.metrics import GlyphTask, gallery_path
from tests.train.conftest import synthetic_glyphs
from train.diffusion import gallery
from train.diffusion.emoji import Glyph, pixels
from train.diffusion.groups import Groups


def test_every_glyph_is_recognized_in_its_own_picture(tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    glyphs = synthetic_glyphs()
    groups = Groups({glyphs[0].prompt: "First"}, {})
    for name in ("a.npz", "b.npz"):
        gallery.write_gallery(tmp_path / name, glyphs, groups, 32, 16)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    task = GlyphTask(tmp_path / "a.npz")
    assert task.prompts == [glyph.prompt for glyph in glyphs]
    assert task.groups == ["First", *[""] * (len(glyphs) - 1)]
    images = pixels(glyphs, 32).transpose(0, 2, 3, 1)
    assert task.recognize(images).tolist() == list(range(len(glyphs)))


def test_the_command_refuses_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("fontTools")

    def refused(**options: Any) -> str:
        with pytest.raises(typer.Exit, match="2"):
            gallery.main(model=tmp_path, **options)
        return capsys.readouterr().err

    assert "`--model` must be the folder of a model that python -m train.ldm trained" in refused()
    (tmp_path / "metrics.json").write_text(json.dumps({"resolution": 64}))
    for side in (0, 24, 128):
        assert f"`--side` must divide the side of the model's images, 64, got {side}" in refused(side=side)


def test_bundled_gallery_is_that_of_the_train_glyphs(bundled: Path) -> None:
    path = gallery_path(bundled)
    assert path.stat().st_size <= 1_500_000
    task = GlyphTask(path)
    assert task.prompts == (bundled / "prompts_train.txt").read_text(encoding="utf-8").splitlines()
    assert task.thumbnails.shape == (3729, 16, 16, 3)
    assert len(set(task.groups) - {""}) == 10  # Unicode's nine, and the components of others
    with np.load(path, allow_pickle=False) as file:
        assert "SIL Open Font License 1.1" in str(file["origin"])


def test_bundled_gallery_shows_the_font(bundled: Path, font_glyphs: list[Glyph]) -> None:
    if json.loads((bundled / "metrics.json").read_text())["glyphs"] != len(font_glyphs):
        pytest.skip("the model was trained on another version of the font")
    task = GlyphTask(gallery_path(bundled))
    shown = {prompt: number for number, prompt in enumerate(task.prompts)}
    chosen = [glyph for glyph in font_glyphs if glyph.prompt in shown][::40]
    found = task.recognize(pixels(chosen, 64).transpose(0, 2, 3, 1))
    # A few flags and people are equal at this size.
    assert np.mean([task.prompts[k] == glyph.prompt for k, glyph in zip(found, chosen, strict=True)]) > 0.98
