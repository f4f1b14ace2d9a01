"""Evaluate a saved emoji model: what its samples show, in figures, in a table and in a sheet of pictures.

``python -m train.diffusion.assess`` samples the prompts of the cached trajectories (train and held-out ones), looks for
the glyph nearest to every sample, in pixels and in the VAE's latents, and asks whether it is of the prompt's
Unicode group. It writes

- ``groups.csv`` beside the model: one row a prompt, at the guidance scale of the default cache;
- the key ``evaluation`` of ``metrics.json`` and the model card (``README.md``), beside the model;
- the sheet of samples.

``python -m train.ldm`` does the same after the training.
"""

from __future__ import annotations

import json
import logging
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from refine_env.commands import command, run
from refine_env.errors import ConfigurationError
from refine_env.evaluation import write_atomically, write_table
from refine_env.metrics import nearest
from train.diffusion import emoji
from train.diffusion.config import (
    EXTRA,
    LATENT_CHANNELS,
    MODEL,
    PROMPTS,
    SHEET,
    DeviceOption,
    FontOption,
    GroupsOption,
    SheetOption,
)
from train.diffusion.groups import EMOJI_TEST, Groups, chance, match_rate, read_groups
from train.options import require_extra, show_log

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from numpy.typing import NDArray

log = logging.getLogger("train.diffusion.assess")

GUIDANCE_SCALES = (1.0, 2.0, 4.0)
GUIDANCE_SCALE = 2.0  # of the default cache, hence of the table and the sheet
STEPS = 50
SPACES = ("pixels", "latents")
PARTS = {"train": "train", "held_out": "held-out"}
TABLE_COLUMNS = dict.fromkeys(
    ("part", "prompt", "group", *(f"{what}_{space}" for space in SPACES for what in ("nearest", "group"))), str
)


@dataclass(frozen=True)
class Part:
    """The prompts of one part, as glyphs, and the glyphs that may be nearest to their samples."""

    glyphs: list[emoji.Glyph]
    candidates: list[emoji.Glyph]


def sources(font: Path | None, emoji_test: Path | None) -> tuple[list[emoji.Glyph], Groups]:
    """Return the glyphs of the font and Unicode's groups.

    Raises:
        FileNotFoundError: if one of the files is not there.
    """
    font, emoji_test = emoji.FONT.find(font), EMOJI_TEST.find(emoji_test)
    return emoji.read_glyphs(font), read_groups(emoji_test)


def read_prompts(path: Path, glyphs: Sequence[emoji.Glyph]) -> list[emoji.Glyph]:
    """Return the glyphs whose prompts a file lists, one a line.

    Raises:
        ConfigurationError: if a prompt is not one of the glyphs': the model belongs to another version of the font.
    """
    by_prompt = {glyph.prompt: glyph for glyph in glyphs}
    lines = path.read_text(encoding="utf-8").splitlines()
    for line in lines:
        if line not in by_prompt:
            raise ConfigurationError(
                f"prompts must be those of the font's glyphs, got {line!r} in {path}. "
                f"Use the version of {emoji.FONT.package} that the model was trained on."
            )
    return [by_prompt[line] for line in lines]


def read_parts(model: Path, prompts: Path, glyphs: Sequence[emoji.Glyph]) -> tuple[list[emoji.Glyph], dict[str, Part]]:
    """Return the glyphs that the model was trained on, and the prompts of both parts with their candidates.

    Of a train prompt all train glyphs are candidates, of a held-out one all glyphs.

    Raises:
        ConfigurationError: see :func:`read_prompts`.
    """
    train, held = (read_prompts(model / f"prompts_{part}.txt", glyphs) for part in ("train", "heldout"))
    known, chosen = {glyph.prompt for glyph in train}, read_prompts(prompts, glyphs)
    return train, {
        "train": Part([glyph for glyph in chosen if glyph.prompt in known], train),
        "held_out": Part([glyph for glyph in chosen if glyph.prompt not in known], [*train, *held]),
    }


def embeddings(vae: AutoencoderKL, images: NDArray[np.uint8], device: str) -> NDArray[np.float32]:
    """Return the scaled mean latents of images, (N, 4, S, S): where x_0 lies for them."""
    import torch

    from train.diffusion.vae import latent_moments

    means = latent_moments(vae, torch.from_numpy(images), device)[0] * vae.config.scaling_factor
    latents: NDArray[np.float32] = means.cpu().numpy()
    return latents


def rounded(value: float) -> float:
    """Round to four decimal places, for the files."""
    return round(value, 4)


def assess(
    model: Path,
    prompts: Path,
    sheet: Path,
    glyphs: Sequence[emoji.Glyph],
    groups: Groups,
    device: str = "cpu",
    steps: int = STEPS,
) -> dict[str, Any]:
    """Evaluate a saved model; write its table, figures, card and sheet. Returns the figures.

    Args:
        model: the model folder.
        prompts: file of prompts, one a line, of train and held-out glyphs; sample k has the seed of sample k of a
            cache.
        sheet: the picture of the samples.
        glyphs: the font's glyphs.
        groups: their groups.
        device: torch device.
        steps: sampling steps.

    Raises:
        ConfigurationError: if a prompt is not one of the glyphs'.
    """
    import torch

    from train.diffusion.pipeline import load_pipeline, sample
    from train.diffusion.vae import psnr_db

    train, parts = read_parts(model, prompts, glyphs)
    known = {glyph.prompt for glyph in train}
    held = [glyph for glyph in parts["held_out"].candidates if glyph.prompt not in known]
    pipeline = load_pipeline(model, device)
    vae = pipeline.vae.eval()
    images = emoji.pixels([*train, *held], vae.config.sample_size)
    offered: dict[str, NDArray[Any]] = {"pixels": images, "latents": embeddings(vae, images, device)}
    property_of: dict[str, Callable[[emoji.Glyph], str]] = {
        "group_match": groups.of,
        "family_match": lambda glyph: glyph.family,
    }
    wanted = prompts.read_text(encoding="utf-8").splitlines()
    figures: dict[str, Any] = {
        "psnr_db": {
            "train": rounded(psnr_db(vae, torch.from_numpy(images[: len(train)]), device)),
            "held_out": rounded(psnr_db(vae, torch.from_numpy(images[len(train) :]), device)),
        },
        "guidance_scale": GUIDANCE_SCALE,
        "steps": steps,
        "prompts": {name: len(part.glyphs) for name, part in parts.items()},
        "chance": {
            name: {
                key: rounded(value)
                for key, value in chance(
                    [groups.of(glyph) for glyph in part.glyphs], [groups.of(glyph) for glyph in part.candidates]
                ).items()
            }
            for name, part in parts.items()
        },
        "group_match": {},
        "family_match": {},
        "mean_square": {},
    }
    rows: list[dict[str, str]] = []
    for scale in GUIDANCE_SCALES:
        pictures, latents = sample(pipeline, wanted, scale, steps)
        figures["mean_square"][str(scale)] = rounded(float((latents.astype(np.float64) ** 2).mean()))
        for kind in property_of:
            figures[kind][str(scale)] = {name: {} for name in parts}
        for name, part in parts.items():
            numbers = [wanted.index(glyph.prompt) for glyph in part.glyphs]
            table = [{"part": name, "prompt": glyph.prompt, "group": groups.of(glyph)} for glyph in part.glyphs]
            sampled: dict[str, NDArray[Any]] = {"pixels": pictures, "latents": latents}
            for space in SPACES:
                offered_here = offered[space][: len(part.candidates)]
                found = [part.candidates[k] for k in nearest(sampled[space][numbers], offered_here)]
                for kind, of in property_of.items():
                    figures[kind][str(scale)][name][space] = rounded(
                        match_rate([of(glyph) for glyph in found], [of(glyph) for glyph in part.glyphs])
                    )
                for row, glyph in zip(table, found, strict=True):
                    row |= {f"nearest_{space}": glyph.prompt, f"group_{space}": groups.of(glyph)}
            if scale == GUIDANCE_SCALE:
                rows += table
        if scale == GUIDANCE_SCALE:
            blocks = {
                name: [(glyph.prompt, pictures[wanted.index(glyph.prompt)]) for glyph in part.glyphs]
                for name, part in parts.items()
            }
            draw_sheet(sheet, blocks, f"guidance {scale:g}, {steps} steps")
        log.info(
            "guidance %g: %s",
            scale,
            ", ".join(
                f"{name} {kind} {space} {rate:.3f}"
                for kind in property_of
                for name, rates in figures[kind][str(scale)].items()
                for space, rate in rates.items()
            ),
        )
    write_table(model / "groups.csv", rows, TABLE_COLUMNS)
    metrics = json.loads((model / "metrics.json").read_text(encoding="utf-8"))
    metrics["evaluation"] = figures
    write_atomically(model / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    write_atomically(model / "README.md", model_card(metrics))
    return figures


# --- The sheet ------------------------------------------------------------------------------------

SHEET_COLUMNS = 8
SHEET_PICTURE = 96
SHEET_CELL = (124, 150)  # width and height, the lines of the prompt included
SHEET_MARGIN = 16
SHEET_HEADING = 40
INK, FAINT = "#1a1a1a", "#666666"


def draw_sheet(path: Path, blocks: dict[str, list[tuple[str, NDArray[np.uint8]]]], settings: str) -> None:
    """Draw each sample over its prompt, a block a part."""
    from PIL import Image, ImageDraw, ImageFont

    title, heading, small = (ImageFont.load_default(size) for size in (24, 18, 13))
    width = 2 * SHEET_MARGIN + SHEET_COLUMNS * SHEET_CELL[0]
    rows = sum(-(-len(samples) // SHEET_COLUMNS) for samples in blocks.values())
    height = 2 * SHEET_MARGIN + SHEET_HEADING * (1 + len(blocks)) + rows * SHEET_CELL[1]
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    draw.text((SHEET_MARGIN, SHEET_MARGIN), "Samples of the bundled emoji model", INK, title)
    draw.text((width - SHEET_MARGIN, SHEET_MARGIN + 8), settings, FAINT, small, anchor="ra")
    top = SHEET_MARGIN + SHEET_HEADING
    for name, samples in blocks.items():
        shown = f"{PARTS[name].capitalize()} prompts: glyphs the model "
        shown += "was trained on" if name == "train" else "has never seen"
        draw.line((SHEET_MARGIN, top, width - SHEET_MARGIN, top), FAINT)
        draw.text((SHEET_MARGIN, top + 8), shown, INK, heading)
        top += SHEET_HEADING
        for k, (prompt, pixels) in enumerate(samples):
            left = SHEET_MARGIN + k % SHEET_COLUMNS * SHEET_CELL[0]
            upper = top + k // SHEET_COLUMNS * SHEET_CELL[1]
            picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
            picture = picture.resize((SHEET_PICTURE, SHEET_PICTURE), Image.Resampling.BICUBIC)
            image.paste(picture, (left + (SHEET_CELL[0] - SHEET_PICTURE) // 2, upper))
            lines = wrapped(prompt, lambda text: small.getlength(text) <= SHEET_CELL[0] - 8)
            draw.multiline_text(
                (left + SHEET_CELL[0] // 2, upper + SHEET_PICTURE + 4),
                "\n".join(lines[:3]),
                INK,
                small,
                anchor="ma",
                align="center",
                spacing=2,
            )
        top += -(-len(samples) // SHEET_COLUMNS) * SHEET_CELL[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    image.quantize(256).save(path, optimize=True)  # a quarter of the bytes, and no visible difference


def wrapped(text: str, fits: Callable[[str], bool]) -> list[str]:
    """Break a text at blanks into lines that fit; a word that does not fit has a line to itself."""
    lines: list[str] = []
    for word in text.split():
        if lines and fits(f"{lines[-1]} {word}"):
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


# --- The model card -------------------------------------------------------------------------------


CARD = Path(__file__).with_name("model_card.md")
"""The model card (Markdown), with places for what was measured."""


def percent(value: float) -> str:
    """Return a rate as a whole percentage."""
    return f"{100 * value:.0f} %"


def model_card(metrics: dict[str, Any]) -> str:
    """Return the model card (Markdown) of the contents of ``metrics.json``, evaluation included."""
    measured = metrics["evaluation"]
    best = min(metrics["history"]["unet"], key=lambda figures: figures["held_noise_mse"])
    rows = [
        f"| {float(scale):g} | "
        + " | ".join(percent(rates[part][space]) for part in PARTS for space in SPACES)
        + " | "
        + " | ".join(percent(measured["family_match"][scale][part]["pixels"]) for part in PARTS)
        + f" | {measured['mean_square'][scale]:.2f} |"
        for scale, rates in measured["group_match"].items()
    ]
    return CARD.read_text(encoding="utf-8").format(
        metrics=metrics,
        measured=measured,
        best=best,
        elements=LATENT_CHANNELS * metrics["latent_side"] ** 2,
        parameters=", ".join(f"{name} {count / 1e6:.2f} M" for name, count in metrics["parameters"].items()),
        vae_minutes=metrics["vae"]["seconds"] / 60,
        unet_minutes=metrics["unet"]["seconds"] / 60,
        rows="\n".join(rows),
        chance={
            part: {key: percent(value) for key, value in rates.items()} for part, rates in measured["chance"].items()
        },
        remarks="".join(f"\n{textwrap.fill(remark, 100)}\n" for remark in metrics.get("remarks", [])),
    )


@command
def main(
    model: Annotated[Path, typer.Option(help="The model folder.")] = MODEL,
    prompts: Annotated[Path, typer.Option(help="File of prompts, one a line.")] = PROMPTS,
    sheet: SheetOption = SHEET,
    font: FontOption = None,
    emoji_test: GroupsOption = None,
    device: DeviceOption = "cpu",
) -> None:
    """Evaluate a saved emoji model: sample, find the nearest glyphs, write table, figures, card and sheet."""
    show_log()
    require_extra("ldm", EXTRA)
    glyphs, groups = sources(font, emoji_test)
    assess(model, prompts, sheet, glyphs, groups, device)


if __name__ == "__main__":
    run(main)
