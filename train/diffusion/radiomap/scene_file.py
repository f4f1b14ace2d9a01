"""Write the conditions of scenes to a file that ``refine-env generate diffusers --conditions`` takes.

``python -m train.diffusion.radiomap.scene_file --train 32 --test 32 --out scenes.npz`` writes those of the first scenes
of both splits, with their true maps. Their names, which become the prompts, hold the seeds: "scene 1000000" is
``make_scene(1000000)``, and "scene 1000000 b" the same with its transmitter moved.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from refine_env._files import replacing
from refine_env.commands import command, run
from refine_env.radiomap import gray
from refine_env.trajectories.conditions import TRUTH
from train.diffusion.propagation import received_power
from train.diffusion.radiomap.config import first_seed
from train.diffusion.scenes import Scene, conditions, make_scene, move_transmitter

__all__ = ["scene_seed", "write_scenes"]


def write_scenes(
    path: Path, train: int, test: int, *, side: int = 64, static: bool = False, transmitters: int = 1
) -> None:
    """Write the conditions of scenes, the train split's first: float16, in which buildings and cars are exact.

    The true maps stand beside them, gray levels as bytes, except where the buildings alone are told.

    Args:
        path: the `.npz` file.
        train: scenes of the train split.
        test: scenes of the test split.
        side: of the scenes in pixels.
        static: tell the buildings alone.
        transmitters: of every scene, 1 or 2, one map each; those of a scene follow each other.
    """
    seeds = [first_seed("train") + k for k in range(train)] + [first_seed("test") + k for k in range(test)]
    scenes: dict[str, Scene] = {}
    for seed in seeds:
        scene = scenes[f"scene {seed}"] = make_scene(seed, side=side)
        if transmitters > 1:
            scenes[f"scene {seed} b"] = move_transmitter(scene, seed)
    arrays: dict[str, Any] = {
        "conditions": np.stack([conditions(scene, static=static) for scene in scenes.values()]).astype(np.float16),
        "names": np.array(list(scenes)),
    }
    if not static:
        maps = np.stack([gray(received_power(scene)) for scene in scenes.values()])
        arrays[TRUTH] = np.rint(maps * 255.0).astype(np.uint8)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)


def scene_seed(name: str) -> int:
    """The seed of the scene that a trajectory's prompt names.

    Raises:
        ValueError: if it names none.
    """
    return int(name.removeprefix("scene ").removesuffix(" b"))


@command
def main(
    out: Annotated[Path, typer.Option(help="The .npz file.")],
    train: Annotated[int, typer.Option(help="Scenes of the train split.", min=1, max=10**6)] = 32,
    test: Annotated[int, typer.Option(help="Scenes of the test split.", min=0, max=10**6)] = 32,
    side: Annotated[int, typer.Option(help="Side of the scenes in pixels.")] = 64,
    static: Annotated[bool, typer.Option("--static", help="Tell the buildings alone, for the static model.")] = False,
    transmitters: Annotated[int, typer.Option(help="Transmitters of every scene, one map each.", min=1, max=2)] = 1,
) -> None:
    """Write the conditions of scenes to a file, with their true maps."""
    write_scenes(out, train, test, side=side, static=static, transmitters=transmitters)


if __name__ == "__main__":
    run(main)
