"""Evaluate a saved radio map model on held-out scenes: against the truth, a regressor, and copying.

``python -m train.diffusion.radiomap.assess`` samples the maps of held-out scenes (R = 0: the whole reverse process),
of the same scenes with their transmitter moved (S1), and with their buildings changed (S3). It writes

- the key ``evaluation`` of ``metrics.json`` and the model card (``README.md``), beside the model;
- the sheet of maps.

``python -m train.radiomap`` does the same after the training.

The normalized mean squared error is NMSE = Σ‖error‖² / Σ‖truth‖² of gray levels, over all maps of a set; 1 in gray is
100 dB.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from refine_env.commands import command, run
from refine_env.errors import ConfigurationError
from refine_env.evaluation import bootstrap_interval, write_atomically
from refine_env.metrics import psnr, ssim
from refine_env.radiomap import BLACK_DBM, WHITE_DBM, gray
from refine_env.trajectories import sample_seed
from train.diffusion.config import DeviceOption
from train.diffusion.propagation import received_power
from train.diffusion.radiomap.config import EXTRA, MODEL, SHEET
from train.diffusion.scenes import (
    FIRST_TEST_SEED,
    Scene,
    change_buildings,
    conditions,
    make_scene,
    move_transmitter,
    without_cars,
)
from train.options import require_extra, show_log

log = logging.getLogger("train.radiomap")

STEPS = 50
BATCH = 16
SCENES = 200
WORK = Path("runs/radiomap")

Maps = NDArray[np.float32]
"""Gray levels in [0, 1], (N, side, side)."""

SETS: Mapping[str, Callable[[Scene, int], Scene]] = {
    "held-out": lambda scene, seed: scene,
    "S1, transmitter moved": move_transmitter,
    "S2, cars appear": lambda scene, seed: scene,
    "S3, buildings changed": change_buildings,
}
"""The scene to be mapped, of a held-out one."""

UNCHANGED: Mapping[str, Callable[[Scene], Scene]] = {
    "S1, transmitter moved": lambda scene: scene,
    "S2, cars appear": without_cars,
    "S3, buildings changed": lambda scene: scene,
}
"""The scene whose map copying takes."""


def truths(scenes: list[Scene]) -> Maps:
    """The maps of scenes."""
    return np.stack([gray(received_power(scene)) for scene in scenes])


def error_figures(truth: Maps, estimate: Maps) -> dict[str, Any]:
    """NMSE over all maps, the mean of the maps' own with an interval of 95 %, RMSE, PSNR and SSIM."""
    squares = ((estimate.astype(np.float64) - truth) ** 2).sum(axis=(1, 2))
    power = (truth.astype(np.float64) ** 2).sum(axis=(1, 2))
    own = squares / power
    pictures = [np.repeat(maps[..., None], 3, axis=3).clip(0, 1) for maps in (truth, estimate)]
    return {
        "nmse": float(squares.sum() / power.sum()),
        "map_nmse": float(own.mean()),
        "map_nmse_interval": list(bootstrap_interval(own)),
        "rmse": float(np.sqrt(squares.sum() / truth.size)),
        "rmse_db": float(np.sqrt(squares.sum() / truth.size) * (WHITE_DBM - BLACK_DBM)),
        "psnr_db": float(psnr(*pictures).mean()),
        "ssim": float(ssim(*pictures).mean()),
    }


def load_regressor(folder: Path, device: str) -> Callable[[Maps], Maps] | None:
    """The regressor that the training left in its folder, as a function of conditions (N, 3, S, S); None without it."""
    if not (folder / "config.json").is_file():
        return None
    import torch
    from diffusers import UNet2DModel

    network = UNet2DModel.from_pretrained(folder).to(device).eval()

    def predict(seen: Maps) -> Maps:
        with torch.no_grad():
            parts = [
                network(torch.from_numpy(seen[k : k + BATCH]).to(device) * 2 - 1, 0).sample[:, 0].clamp(0, 1).cpu()
                for k in range(0, len(seen), BATCH)
            ]
        maps: Maps = torch.cat(parts).numpy()
        return maps

    return predict


def assess(
    model: Path,
    work: Path,
    sheet: Path,
    *,
    scenes: int = SCENES,
    steps: int = STEPS,
    side: int | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Evaluate a saved model; write its figures, card and sheet. Returns the figures.

    Args:
        model: the model folder.
        work: the training's folder, where the regressor is.
        sheet: the picture of the maps.
        scenes: number of held-out scenes.
        steps: T.
        side: of the scenes in pixels; default the model's.
        device: torch device.

    Raises:
        ConfigurationError: if the folder holds no such model.
    """
    import torch

    from refine_env.trajectories.pipeline import LatentDecoder, LatentSampler

    if not (model / "metrics.json").is_file():
        raise ConfigurationError(
            f"`--model` must be the folder of a model that python -m train.radiomap trained, got {str(model)!r}. Train "
            "it, or correct the path."
        )
    metrics = json.loads((model / "metrics.json").read_text(encoding="utf-8"))
    side = metrics["resolution"] if side is None else side
    sampler = LatentSampler(model, num_steps=steps, guidance_scale=1.0, device=device)
    decoder = LatentDecoder(model, device=device)
    regressor = load_regressor(work / "regressor", device)

    def decode(latents: NDArray[Any]) -> Maps:
        return np.concatenate([decoder(latents[k : k + BATCH])[..., 0] for k in range(0, len(latents), BATCH)])

    def sample(seen: Maps) -> Maps:
        latents = []
        for first in range(0, len(seen), BATCH):
            part = seen[first : first + BATCH]
            seeds = [sample_seed(0, first + k) for k in range(len(part))]
            latents.append(sampler.sample([""] * len(part), seeds, conditions=part)[0][:, 0])
        return decode(np.concatenate(latents))

    def reconstruct(maps: Maps) -> Maps:
        vae = decoder._vae
        with torch.no_grad():
            signal = torch.from_numpy(maps[:, None] * 2 - 1).to(device)
            parts = [signal[first : first + BATCH] for first in range(0, len(signal), BATCH)]
            latents = torch.cat([vae.encode(part).latent_dist.mode() for part in parts])
        return decode((latents * vae.config.scaling_factor).float().cpu().numpy())

    seeds = range(FIRST_TEST_SEED, FIRST_TEST_SEED + scenes)
    base = [make_scene(seed, side=side) for seed in seeds]
    figures: dict[str, Any] = {"scenes": scenes, "steps": steps, "sets": {}}
    rows: list[list[Maps]] = []
    for name, change in SETS.items():
        targets = [change(scene, seed) for scene, seed in zip(base, seeds, strict=True)]
        truth = truths(targets)
        seen = np.stack([conditions(scene) for scene in targets])
        found: dict[str, Maps] = {}
        if name in UNCHANGED:
            found["copying"] = truths([UNCHANGED[name](scene) for scene in base])
        if name != "S2, cars appear":  # those scenes are the held-out ones, seen without cars before
            found["full model"] = sample(seen)
            if regressor is not None:
                found["regressor"] = regressor(seen)
        if name == "held-out":
            found["autoencoder"] = reconstruct(truth)
            found["static model"] = sample(np.stack([conditions(scene, static=True) for scene in targets]))
            rows = [
                [seen[k, 0] * 0.5 + seen[k, 1] * 0.75, truth[k], *(found[who][k] for who in found)] for k in range(8)
            ]
            headings = ["buildings, cars", "truth", *found]
        figures["sets"][name] = {who: error_figures(truth, maps) for who, maps in found.items()}
        for who, values in figures["sets"][name].items():
            log.info("%s, %s: NMSE %.5f, PSNR %.2f dB, SSIM %.4f", name, who, *(values[k] for k in _LOGGED))
    draw_sheet(sheet, rows, headings, f"held-out scenes, {steps} steps")
    metrics["evaluation"] = figures
    write_atomically(model / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    write_atomically(model / "README.md", model_card(metrics))
    return figures


_LOGGED = ("nmse", "psnr_db", "ssim")


# --- The sheet ------------------------------------------------------------------------------------


def draw_sheet(path: Path, rows: list[list[Maps]], headings: list[str], title: str) -> None:
    """Draw a row of maps for each scene in dBm, and the full model's error in dB, with their scales.

    Args:
        path: the picture.
        rows: condition, truth and estimates, gray levels (side, side) each, as the headings say.
        headings: of the columns.
        title: of the sheet.
    """
    from matplotlib.figure import Figure

    span = WHITE_DBM - BLACK_DBM
    shown = headings.index("full model")
    columns = len(headings) + 1
    figure = Figure(figsize=(1.55 * columns + 0.9, 1.55 * len(rows) + 0.9), layout="constrained")
    figure.suptitle(f"Radio maps of the bundled model: {title}")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for number, row in enumerate(rows):
        pictures = [*row, (row[shown] - row[1]) * span]
        for axis, name, picture in zip(axes[number], [*headings, "full − truth"], pictures, strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            if number == 0:
                axis.set_title(name, fontsize=9)
            if name == headings[0]:
                axis.imshow(picture, cmap="gray_r", vmin=0, vmax=1)
            elif name == "full − truth":
                error = axis.imshow(picture, cmap="RdBu_r", vmin=-30, vmax=30)
            else:
                power = axis.imshow(BLACK_DBM + picture * span, cmap="viridis", vmin=BLACK_DBM, vmax=WHITE_DBM)
    figure.colorbar(power, ax=axes[: len(rows) // 2 + 1, :], label="received power [dBm]", fraction=0.02)
    figure.colorbar(error, ax=axes[len(rows) // 2 + 1 :, :], label="error [dB]", fraction=0.02)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


# --- The model card -------------------------------------------------------------------------------

CARD = Path(__file__).with_name("model_card.md")
"""The model card (Markdown), with places for what was measured."""


def model_card(metrics: dict[str, Any]) -> str:
    """Return the model card (Markdown) of the contents of ``metrics.json``, evaluation included."""
    rows = [
        f"| {name} | {who} | {values['nmse']:.4f} | {values['map_nmse']:.4f} | {values['rmse_db']:.1f} | "
        f"{values['psnr_db']:.1f} | {values['ssim']:.3f} |"
        for name, found in metrics["evaluation"]["sets"].items()
        for who, values in found.items()
    ]
    times = ", ".join(
        f"{label} {metrics[stage]['images_seen']:,} maps, {metrics[stage]['seconds'] / 60:.0f} min"
        for stage, label in (("vae", "VAE"), ("unet", "U-Net"), ("regressor", "regressor"))
        if stage in metrics
    )
    return CARD.read_text(encoding="utf-8").format(
        metrics=metrics,
        evaluation=metrics["evaluation"],
        maps=3 * metrics["scenes_train"],
        parameters=", ".join(f"{name} {count / 1e6:.2f} M" for name, count in metrics["parameters"].items()),
        times=times,
        rows="\n".join(rows),
    )


@command
def main(
    model: Annotated[Path, typer.Option(help="The model folder.")] = MODEL,
    work: Annotated[Path, typer.Option(help="Folder of the training, where the regressor is.")] = WORK,
    sheet: Annotated[Path, typer.Option(help="File for the sheet of maps.")] = SHEET,
    scenes: Annotated[int, typer.Option(help="Held-out scenes.", min=8, max=10**5)] = SCENES,
    steps: Annotated[int, typer.Option(help="Sampling steps T.", min=1, max=1000)] = STEPS,
    device: DeviceOption = "cpu",
) -> None:
    """Evaluate a saved radio map model on held-out scenes; write its figures, card and sheet."""
    show_log()
    require_extra("ldm", EXTRA)
    assess(model, work, sheet, scenes=scenes, steps=steps, device=device)


if __name__ == "__main__":
    run(main)
