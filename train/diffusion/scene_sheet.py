"""The sheet of scenes: what the model is told of eight of them, over the received power that it is to draw."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

from agents.figures.canvas import new_figure
from refine_env.commands import command, run
from refine_env.evaluation import write_atomically
from refine_env.radiomap import BLACK_DBM, WHITE_DBM
from train.diffusion.propagation import received_power
from train.diffusion.scene import Scene
from train.diffusion.scenes import FIRST_TEST_SEED, make_scene
from train.options import show_log

log = logging.getLogger("train.diffusion.scene_sheet")

COLUMNS, ROWS = 4, 2
GROUND, BUILDING, CAR, STAR = (0.94, 0.93, 0.9), (0.42, 0.4, 0.4), (0.84, 0.37, 0.0), "#0072B2"


def draw_plan(scene: Scene) -> NDArray[np.float64]:
    """A scene's ground, buildings and cars in colors, float64 of shape (S, S, 3)."""
    plan = np.tile(GROUND, (scene.side, scene.side, 1))
    plan[scene.buildings], plan[scene.cars] = BUILDING, CAR
    return plan


def draw_sheet(path: Path, scenes: list[Scene]) -> None:
    """Draw scenes and their received power, with a color bar in dBm; the same scenes give the same bytes.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    figure, panels = new_figure(2.1 * COLUMNS + 0.9, 4.25 * ROWS, 2 * ROWS, COLUMNS, squeeze=False)
    for panel in panels.flat:
        panel.set_axis_off()
    for k, scene in enumerate(scenes):
        row, column = 2 * (k // COLUMNS), k % COLUMNS
        extent = (0, scene.side, scene.side, 0)
        panels[row, column].imshow(draw_plan(scene), extent=extent, interpolation="nearest")
        panels[row, column].plot(*scene.transmitter, marker="*", markersize=11, color=STAR, markeredgecolor="white")
        power = np.ma.masked_array(received_power(scene), mask=scene.buildings)
        panels[row + 1, column].set_axis_on()
        panels[row + 1, column].set(xticks=[], yticks=[], facecolor=BUILDING)
        shown = panels[row + 1, column].imshow(
            power, extent=extent, interpolation="nearest", cmap="viridis", vmin=BLACK_DBM, vmax=WHITE_DBM
        )
    figure.colorbar(shown, ax=panels, shrink=0.6, aspect=40, pad=0.02, label="received power [dBm]")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


@command
def main(
    out: Annotated[Path, typer.Option(help="File to write.")] = Path("docs/figures/radiomap-scenes.png"),
    first_seed: Annotated[int, typer.Option(help="Seed of the first of the eight scenes.", min=0)] = FIRST_TEST_SEED,
    side: Annotated[int, typer.Option(help="Side of the scenes in metres: 64, 128 or 256.")] = 64,
) -> None:
    """Draw eight scenes and the received power in each."""
    show_log()
    draw_sheet(out, [make_scene(first_seed + k, side) for k in range(COLUMNS * ROWS)])
    log.info("wrote %s", out)


if __name__ == "__main__":
    run(main)
