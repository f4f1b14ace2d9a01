"""An episode as pictures, an animation or a video: ``python -m agents.record``."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import numpy as np
import typer
from numpy.typing import NDArray
from scipy.spatial import KDTree

import agents
from refine_env import ENV_ID, ConfigurationError, LatentRefinementEnv
from refine_env._validation import check_integer, check_positive
from refine_env.commands import CacheOption, SnrOption, SplitOption, command, run
from refine_env.errors import import_extra
from refine_env.evaluation import play_episode, write_atomically

__all__ = ["main", "record_episode", "write_frames"]

Frame = NDArray[np.uint8]

EXTRA = "render"
SUFFIXES = (".gif", ".mp4", ".png")
"""An animation, a video, one frame; a name without suffix is a folder, of all frames."""

DEFAULT_OUT = Path("episode.gif")
DEFAULT_FPS = float(LatentRefinementEnv.metadata["render_fps"])
_LAST_FRAME_SECONDS = 2.0
_COLORS, _EXACT_COLORS = 255, 64  # of 256, so that one is free to mark what a frame leaves as it is
_CODE = np.array([1 << 16, 1 << 8, 1], dtype=np.uint32)


def record_episode(
    agent: str, *, seed: int, trajectory: int | None = None, env_kwargs: dict[str, Any] | None = None
) -> list[Frame]:
    """The frames of one episode.

    Args:
        agent: name of the policy.
        seed: of the episode, as in a table of episodes.
        trajectory: index in the cache of the trajectory to replay; else it is drawn.
        env_kwargs: environment arguments; the policy's own ``agents.env_kwargs`` are below them.

    Returns:
        T_d + 1 frames, uint8 (H, W, 3): one a slot, and what the deadline found.

    Raises:
        ConfigurationError: if an argument is out of range.
        CacheError: if the cache, or a model that was named, is missing or damaged.
        MissingExtraError: if what draws frames is not installed.
    """
    check_integer("seed", seed, 0, advice="Give a non-negative seed, for example 0.")
    kwargs = {"split": "test", **agents.env_kwargs(agent), **(env_kwargs or {})}
    env = gym.make(ENV_ID, render_mode="rgb_array", **kwargs)
    policy = agents.make(agent, env.get_wrapper_attr("config"))
    options = None if trajectory is None else {"trajectory": trajectory}
    frames: list[Any] = [env.render() for _ in play_episode(env, policy, seed=seed, options=options)]
    env.close()
    return frames


def check_out(out: Path) -> Path:
    """``out`` if it says what to write; raises ConfigurationError otherwise."""
    if out.suffix.lower() not in ("", *SUFFIXES):
        raise ConfigurationError(
            f"`--out` must end in {', '.join(SUFFIXES)}, or in no suffix for a folder of pictures, got {str(out)!r}. "
            "Give for example episode.gif."
        )
    if not out.suffix and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigurationError(
            f"`--out` must be a new or an empty folder, got {str(out)!r}. Empty it, or give another."
        )
    return out


def write_frames(frames: Sequence[Frame], out: Path, *, fps: float = DEFAULT_FPS, slot: int | None = None) -> Path:
    """Write frames in the form that the suffix says: .gif, .mp4, .png (one frame), or none (a folder of all).

    A reader, or a crash, sees the old file or the new one, never a part.

    Args:
        frames: uint8 (H, W, 3) each, in order, H and W even.
        out: the file or folder.
        fps: frames a second; the last is held for two seconds.
        slot: which frame, 1-based, where just one is written; default the last.

    Returns:
        What was written.

    Raises:
        ConfigurationError: if the suffix is another, the folder is in use, or there is no such slot.
        MissingExtraError: if what encodes them is not installed.
        OSError: if the file cannot be written.
    """
    check_out(out)
    check_positive("fps", fps, advice="Give frames a second, for example 4.")
    if slot is not None:
        check_integer("slot", slot, 1, len(frames), advice="The last one is what the deadline found.")
    suffix = out.suffix.lower()
    if suffix == ".gif":
        write_atomically(out, _encode_gif(frames, fps))
    elif suffix == ".mp4":
        write_atomically(out, _encode_mp4(frames, fps))
    elif suffix == ".png":
        write_atomically(out, _encode_png(frames[-1 if slot is None else slot - 1]))
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=out.name, ignore_cleanup_errors=True) as folder:
            filled = Path(folder) / "frames"
            filled.mkdir()
            digits = len(str(len(frames)))
            for number, frame in enumerate(frames, start=1):
                (filled / f"slot-{number:0{digits}d}.png").write_bytes(_encode_png(frame))
            if out.exists():
                out.rmdir()
            filled.replace(out)
    return out


def _encode_png(frame: Frame) -> bytes:
    buffer = io.BytesIO()
    import_extra("PIL.Image", EXTRA).fromarray(frame).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _encode_gif(frames: Sequence[Frame], fps: float) -> bytes:
    """All frames in the colors of one palette, so that only what changes is stored."""
    image = import_extra("PIL.Image", EXTRA)
    codes = [frame.astype(np.uint32) @ _CODE for frame in frames]
    palette, index = _palette(image, codes)
    pictures = []
    for code in codes:
        picture = image.fromarray(index[code])
        picture.putpalette(palette.tobytes())
        pictures.append(picture)
    duration = max(20, 10 * round(100 / fps))  # centiseconds are what the format counts in
    durations = [duration] * (len(frames) - 1) + [duration + round(1000 * _LAST_FRAME_SECONDS)]
    buffer = io.BytesIO()
    pictures[0].save(
        buffer, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0, optimize=True
    )
    return buffer.getvalue()


def _palette(image: Any, codes: Sequence[NDArray[np.uint32]]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The colors for pictures: the most frequent as they are, the others by their spread.

    A palette that weighs by area alone moves the white of the page and dulls the small decoded images.

    Args:
        image: Pillow's module.
        codes: pictures, 65536 red + 256 green + blue.

    Returns:
        The colors, uint8 (n, 3), and for every code in the pictures the number of the nearest of them, uint8 (2^24,).
    """
    found = [np.unique(code, return_counts=True) for code in codes]
    colors, where = np.unique(np.concatenate([values for values, _ in found]), return_inverse=True)
    counts = np.bincount(where, np.concatenate([count for _, count in found]))
    triples = np.stack([colors >> 16, colors >> 8 & 255, colors & 255], axis=1).astype(np.uint8)
    order = np.argsort(-counts, kind="stable")
    palette, others = triples[order[:_EXACT_COLORS]], triples[order[_EXACT_COLORS:]]
    if len(others) > 0:
        spread = image.fromarray(others[None]).quantize(
            _COLORS - len(palette), method=image.Quantize.MAXCOVERAGE, kmeans=4
        )
        palette = np.concatenate([palette, np.array(spread.getpalette(), dtype=np.uint8).reshape(-1, 3)])
    index = np.zeros(1 << 24, dtype=np.uint8)
    index[colors] = KDTree(palette.astype(np.float64)).query(triples.astype(np.float64))[1]
    return palette, index


def _encode_mp4(frames: Sequence[Frame], fps: float) -> bytes:
    """H.264 in the pixel format that every player knows."""
    ffmpeg = import_extra("imageio_ffmpeg", EXTRA)
    height, width = frames[0].shape[:2]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "episode.mp4"
        video = ffmpeg.write_frames(
            str(file),
            (width, height),
            fps=fps,
            quality=8,
            macro_block_size=2,  # it would be scaled to a multiple of 16 otherwise
            ffmpeg_log_level="error",
            output_params=["-movflags", "+faststart"],
        )
        video.send(None)
        for frame in [*frames, *[frames[-1]] * round(fps * _LAST_FRAME_SECONDS)]:
            video.send(np.ascontiguousarray(frame))
        video.close()
        return file.read_bytes()


@command
def main(
    agent: Annotated[str, typer.Option(help="The policy.")] = "lookahead",
    snr_db: SnrOption = 6.0,
    seed: Annotated[int, typer.Option(help="Seed of the episode, as in episodes.csv.")] = 0,
    trajectory: Annotated[
        int | None, typer.Option(help="Index of the trajectory to replay.", show_default="drawn")
    ] = None,
    out: Annotated[
        list[Path] | None,
        typer.Option(
            help=".gif, .mp4, .png (one frame) or a folder for all frames; may be repeated.",
            show_default=str(DEFAULT_OUT),
        ),
    ] = None,
    slot: Annotated[int | None, typer.Option(help="Slot of the one frame in a .png.", show_default="last")] = None,
    fps: Annotated[float, typer.Option(help="Frames a second.")] = DEFAULT_FPS,
    cache: CacheOption = "default",
    split: SplitOption = "test",
    coder: Annotated[str | None, typer.Option(help="Refinement coder.", show_default="the policy's")] = None,
    deadline: Annotated[int | None, typer.Option(help="Deadline in slots.", show_default="the paper's")] = None,
    decoder: Annotated[
        str, typer.Option(help="Decoder of the images: auto, none, or a model's folder or hub id.")
    ] = "auto",
) -> None:
    """Play an episode and write it as an animation, a video or pictures.

    Exit codes: 0 done, 2 an argument is wrong, 3 a cache or model is missing or damaged, or the output cannot be
    written, 4 what draws or encodes frames is not installed.
    """
    outs = out or [DEFAULT_OUT]
    chosen = {"coder": coder, "deadline": deadline}
    env_kwargs = {
        "snr_db": snr_db,
        "cache": cache,
        "split": split,
        "render_decoder": decoder,
        **{name: value for name, value in chosen.items() if value is not None},
    }
    for path in outs:
        check_out(path)
    frames = record_episode(agent, seed=seed, trajectory=trajectory, env_kwargs=env_kwargs)
    for path in outs:
        written = write_frames(frames, path, fps=fps, slot=slot)
        typer.echo(f"wrote {written}")


if __name__ == "__main__":
    run(main)
