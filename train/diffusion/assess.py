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

import csv
import json
import logging
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from refine_env.commands import command, run
from refine_env.errors import ConfigurationError
from train import ldm
from train.diffusion import emoji
from train.diffusion.groups import Groups, chance, find_emoji_test, match_rate, nearest, read_groups

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from numpy.typing import NDArray

log = logging.getLogger("train.diffusion.assess")

GUIDANCE_SCALES = (1.0, 2.0, 4.0)
GUIDANCE_SCALE = 2.0  # of the default cache, hence of the table and the sheet
STEPS = 50
SPACES = ("pixels", "latents")
PARTS = {"train": "train", "held_out": "held-out"}
TABLE_COLUMNS = ("part", "prompt", "group", *(f"{what}_{space}" for space in SPACES for what in ("nearest", "group")))


@dataclass(frozen=True)
class Part:
    """The prompts of one part, as glyphs, and the glyphs that may be nearest to their samples."""

    glyphs: list[emoji.Glyph]
    candidates: list[emoji.Glyph]


def sources(font: Path | None, emoji_test: Path | None) -> tuple[list[emoji.Glyph], Groups]:
    """Return the glyphs of the font and Unicode's groups.

    Raises
    ------
    FileNotFoundError
        If one of the files is not there.
    """
    font, emoji_test = emoji.find_font(font), find_emoji_test(emoji_test)
    return emoji.read_glyphs(font), read_groups(emoji_test)


def read_parts(model: Path, prompts: Path, glyphs: Sequence[emoji.Glyph]) -> tuple[list[emoji.Glyph], dict[str, Part]]:
    """Return the glyphs that the model was trained on, and the prompts of both parts with their candidates.

    Of a train prompt all train glyphs are candidates, of a held-out one all glyphs.

    Raises
    ------
    ConfigurationError
        If a prompt is not one of the glyphs': the model belongs to another version of the font.
    """
    by_prompt = {glyph.prompt: glyph for glyph in glyphs}

    def read(path: Path) -> list[emoji.Glyph]:
        lines = path.read_text(encoding="utf-8").splitlines()
        for line in lines:
            if line not in by_prompt:
                raise ConfigurationError(
                    f"prompts must be those of the font's glyphs, got {line!r} in {path}. "
                    f"Use the version of {emoji.FONT_PACKAGE} that the model was trained on."
                )
        return [by_prompt[line] for line in lines]

    train, held = read(model / "prompts_train.txt"), read(model / "prompts_heldout.txt")
    known, chosen = {glyph.prompt for glyph in train}, read(prompts)
    return train, {
        "train": Part([glyph for glyph in chosen if glyph.prompt in known], train),
        "held_out": Part([glyph for glyph in chosen if glyph.prompt not in known], [*train, *held]),
    }


def embeddings(vae: AutoencoderKL, images: NDArray[np.uint8], device: str) -> NDArray[np.float32]:
    """Return the scaled mean latents of images, (N, 4, S, S): where x_0 lies for them."""
    import torch

    means = ldm.latent_moments(vae, torch.from_numpy(images), device)[0] * vae.config.scaling_factor
    return means.cpu().numpy()


def rounded(value: float) -> float:
    """Round to four decimal places, for the files."""
    return round(value, 4)


def evaluate(
    model: Path,
    prompts: Path,
    sheet: Path,
    glyphs: Sequence[emoji.Glyph],
    groups: Groups,
    device: str = "cpu",
    steps: int = STEPS,
) -> dict[str, Any]:
    """Evaluate a saved model; write its table, figures, card and sheet. Returns the figures.

    Parameters
    ----------
    model
        The model folder.
    prompts
        File of prompts, one a line, of train and held-out glyphs; sample k has the seed of sample k of a cache.
    sheet
        The picture of the samples.
    glyphs
        The font's glyphs.
    groups
        Their groups.
    device
        Torch device.
    steps
        Sampling steps.

    Raises
    ------
    ConfigurationError
        If a prompt is not one of the glyphs'.
    """
    import torch

    train, parts = read_parts(model, prompts, glyphs)
    known = {glyph.prompt for glyph in train}
    held = [glyph for glyph in parts["held_out"].candidates if glyph.prompt not in known]
    pipeline = ldm.load_pipeline(model, device)
    vae = pipeline.vae.eval()
    images = emoji.pixels([*train, *held], vae.config.sample_size)
    offered = {"pixels": images, "latents": embeddings(vae, images, device)}
    wanted = prompts.read_text(encoding="utf-8").splitlines()
    figures: dict[str, Any] = {
        "psnr_db": {
            "train": rounded(ldm.psnr_db(vae, torch.from_numpy(images[: len(train)]), device)),
            "held_out": rounded(ldm.psnr_db(vae, torch.from_numpy(images[len(train) :]), device)),
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
        pictures, latents = ldm.sample(pipeline, wanted, scale, steps)
        figures["mean_square"][str(scale)] = rounded(float((latents.astype(np.float64) ** 2).mean()))
        for kind in ("group_match", "family_match"):
            figures[kind][str(scale)] = {name: {} for name in parts}
        for name, part in parts.items():
            numbers = [wanted.index(glyph.prompt) for glyph in part.glyphs]
            table = [{"part": name, "prompt": glyph.prompt, "group": groups.of(glyph)} for glyph in part.glyphs]
            for space, samples in (("pixels", pictures), ("latents", latents)):
                found = [part.candidates[k] for k in nearest(samples[numbers], offered[space][: len(part.candidates)])]
                for kind, of in (("group_match", groups.of), ("family_match", lambda glyph: glyph.family)):
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
                for kind in ("group_match", "family_match")
                for name, rates in figures[kind][str(scale)].items()
                for space, rate in rates.items()
            ),
        )
    with (model / "groups.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, TABLE_COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    metrics = json.loads((model / "metrics.json").read_text(encoding="utf-8"))
    metrics["evaluation"] = figures
    (model / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
    (model / "README.md").write_text(model_card(metrics), encoding="utf-8")
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


def wrapped(text: str, fits: Any) -> list[str]:
    """Break a text at blanks into lines that fit; a word that does not fit has a line to itself."""
    lines: list[str] = []
    for word in text.split():
        if lines and fits(f"{lines[-1]} {word}"):
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


# --- The model card -------------------------------------------------------------------------------


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
    return CARD.format(
        resolution=metrics["resolution"],
        side=metrics["latent_side"],
        elements=ldm.LATENT_CHANNELS * metrics["latent_side"] ** 2,
        glyphs=metrics["glyphs"],
        families=metrics["families"],
        train=metrics["glyphs_train"],
        held=metrics["glyphs_held_out"],
        parameters=", ".join(f"{name} {count / 1e6:.2f} M" for name, count in metrics["parameters"].items()),
        psnr=measured["psnr_db"]["held_out"],
        train_psnr=measured["psnr_db"]["train"],
        train_mse=metrics["unet"]["train_noise_mse"],
        held_mse=metrics["unet"]["held_noise_mse"],
        best_mse=best["held_noise_mse"],
        best_step=int(best["step"]),
        vae_images=metrics["vae"]["images_seen"],
        unet_images=metrics["unet"]["images_seen"],
        vae_minutes=metrics["vae"]["seconds"] / 60,
        unet_minutes=metrics["unet"]["seconds"] / 60,
        train_prompts=measured["prompts"]["train"],
        held_prompts=measured["prompts"]["held_out"],
        used=measured["guidance_scale"],
        steps=measured["steps"],
        rows="\n".join(rows),
        **{
            f"{part}_{key}": percent(value)
            for part, rates in measured["chance"].items()
            for key, value in rates.items()
        },
        command=metrics["command"],
        remarks="".join(f"\n{textwrap.fill(remark, 100)}\n" for remark in metrics.get("remarks", [])),
    )


CARD = """\
---
license: mit
library_name: diffusers
pipeline_tag: text-to-image
---
# Emoji: a small latent diffusion model

A text-to-image latent diffusion model, trained from scratch on emoji glyphs:
{resolution}×{resolution} pixels, latents 4×{side}×{side} (M = {elements}). It is an ordinary
`StableDiffusionPipeline` (fp16 safetensors) with Stable Diffusion v1-5's noise schedule and DDPM's
posterior variance, small enough to be part of the package and to be sampled on a CPU.

```python
import torch
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("refine_env/models/emoji", torch_dtype=torch.float32)
image = pipeline("mouse face", guidance_scale=2.0).images[0]
```

Use `torch_dtype=torch.float32` on a CPU.

## Data and licenses

- Data: the {glyphs} color bitmaps of **Noto Color Emoji** (© Google, SIL Open Font License 1.1;
  Debian's package `fonts-noto-color-emoji`), ligature sequences included, over white. The prompts
  are the characters' Unicode names in lower case; the parts of a ZWJ sequence are joined by blanks,
  and a flag is "flag" and its letters ("flag j p"). A flag that several regions fly goes by the
  letters of the one whose own it is.
- Held out: {held} of the glyphs, by family (all skin tones, genders and directions of one emoji
  together, {families} families); {train} are trained on. The prompts are in `prompts_train.txt` and
  `prompts_heldout.txt`.
- The groups below are those of Unicode's `emoji-test.txt` (© Unicode, Inc., Unicode License V3;
  Debian's package `unicode-data`).
- Weights: trained by this project, under its MIT license. Neither the font nor Unicode's file is
  included.

## Figures

| | |
| --- | --- |
| parameters | {parameters} |
| VAE, PSNR | held out {psnr:.1f} dB, train {train_psnr:.1f} dB |
| noise prediction error, train | {train_mse:.4f} |
| noise prediction error, held out | {held_mse:.4f} (lowest {best_mse:.4f}, at step {best_step}) |
| images seen | VAE {vae_images:,}, U-Net {unet_images:,} |
| training time | VAE {vae_minutes:.0f} min, U-Net {unet_minutes:.0f} min, on one CPU core |

What the samples show: {train_prompts} train and {held_prompts} held-out prompts (those of the default
cache, with its seeds), {steps} steps. For every sample the nearest glyph is looked for, among the
train glyphs for a train prompt and among all for a held-out one; given is how often it is of the
prompt's Unicode group, and how often of its very family. The last column is E‖x_0‖²/M of the
samples; the training latents have 1.

| guidance | group, train: pixels | latents | held out: pixels | latents | family, train | held out | E‖x_0‖²/M |
| --- | --- | --- | --- | --- | --- | --- | --- |
{rows}

By chance the group is right for {train_random_glyph} of the train prompts and {held_out_random_glyph} of
the held-out ones with a random glyph, and for {train_best_single_group} and
{held_out_best_single_group} with the best single group for all. The default cache uses guidance
{used:g}; `groups.csv` has its prompts one by one, `docs/figures/emoji-samples.png` its pictures. The
rest is in `metrics.json`.

## Limits

- It knows emoji alone, and only in the words of their Unicode names.
- It is fitted to the train glyphs: their prompts give those glyphs again, softer. Held-out prompts
  give something of the same style, at times of a related subject or color, mostly not the thing
  itself (a family held out has no glyph to be learned from); their noise prediction error rises late
  in the training while that of the train prompts still falls.
- Letters in signs and details of flags are blurred. Skin tones and genders, for which a family
  shares one weight in the training, are less reliable than the kind of thing.
- It is made as a source of real diffusion trajectories for experiments, not as a picture generator.

## Retrain

In a checkout of the repository, with the font and Unicode's file installed. Killed and started again,
the command goes on where it was; the second one repeats the evaluation alone.

```
apt install fonts-noto-color-emoji unicode-data
pip install 'refine-env[ldm]'
{command}
python -m train.diffusion.assess
```
{remarks}"""


@command
def main(
    model: Annotated[Path, typer.Option(help="The model folder.")] = Path("refine_env/models/emoji"),
    prompts: Annotated[Path, typer.Option(help="File of prompts, one a line.")] = Path(
        "cached_trajectories/default.prompts.txt"
    ),
    sheet: Annotated[Path, typer.Option(help="File for the sheet of samples.")] = Path(
        "docs/figures/emoji-samples.png"
    ),
    font: Annotated[
        Path | None, typer.Option(help="NotoColorEmoji.ttf with bitmaps; looked for in the font folders if not given.")
    ] = None,
    emoji_test: Annotated[
        Path | None, typer.Option(help="Unicode's emoji-test.txt; looked for in the usual folders if not given.")
    ] = None,
    device: Annotated[str, typer.Option(help="Torch device: cpu, cuda, ...")] = "cpu",
) -> None:
    """Evaluate a saved emoji model: sample, find the nearest glyphs, write table, figures, card and sheet."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    ldm.require_extra()
    glyphs, groups = sources(font, emoji_test)
    evaluate(model, prompts, sheet, glyphs, groups, device)


if __name__ == "__main__":
    run(main)
