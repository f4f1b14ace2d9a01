"""Write the conditions of scenes to a file that ``refine-env generate diffusers --conditions`` takes.

``python -m train.diffusion.radiomap.scene_file --train 32 --test 32 --out scenes.npz`` writes those of the first scenes
of both splits. Their names, which become the prompts, hold the seeds: "scene 1000000" is ``make_scene(1000000)``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from refine_env._files import replacing
from refine_env.commands import command, run
from train.diffusion.radiomap.config import first_seed
from train.diffusion.scenes import conditions, make_scene

__all__ = ["scene_seed", "write_scenes"]


def write_scenes(path: Path, train: int, test: int, *, side: int = 64, static: bool = False) -> None:
    """Write the conditions of scenes, the train split's first: float16, in which buildings and cars are exact.

    Args:
        path: the `.npz` file.
        train: scenes of the train split.
        test: scenes of the test split.
        side: of the scenes in pixels.
        static: tell the buildings alone.
    """
    seeds = [first_seed("train") + k for k in range(train)] + [first_seed("test") + k for k in range(test)]
    values = np.stack([conditions(make_scene(seed, side=side), static=static) for seed in seeds]).astype(np.float16)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, conditions=values, names=[f"scene {seed}" for seed in seeds])


def scene_seed(name: str) -> int:
    """The seed of the scene that a trajectory's prompt names.

    Raises:
        ValueError: if it names none.
    """
    return int(name.removeprefix("scene "))


@command
def main(
    out: Annotated[Path, typer.Option(help="The .npz file.")],
    train: Annotated[int, typer.Option(help="Scenes of the train split.", min=1, max=10**6)] = 32,
    test: Annotated[int, typer.Option(help="Scenes of the test split.", min=0, max=10**6)] = 32,
    side: Annotated[int, typer.Option(help="Side of the scenes in pixels.")] = 64,
    static: Annotated[bool, typer.Option("--static", help="Tell the buildings alone, for the static model.")] = False,
) -> None:
    """Write the conditions of scenes to a file."""
    write_scenes(out, train, test, side=side, static=static)


if __name__ == "__main__":
    run(main)
