"""An episode as a file: forms, content, exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import typer

import agents
import refine_env
from agents import record, registry
from agents.record import main, record_episode, write_frames
from refine_env import CacheError, ConfigurationError

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def env_kwargs(gaussian_cache: Path) -> dict[str, Any]:
    return {"cache": str(gaussian_cache), "deadline": 12, "snr_db": 15.0}


@pytest.fixture(scope="module")
def frames(env_kwargs: dict[str, Any]) -> list[Any]:
    return record_episode("persistent-q3", seed=3, env_kwargs=env_kwargs)


def run(**arguments: Any) -> int:
    """The exit code of the command, called here."""
    defaults = {
        "agent": "random", "snr_db": 6.0, "seed": 0, "trajectory": None, "out": None, "slot": None, "fps": 4.0,
        "cache": "default", "split": "test", "coder": None, "deadline": 3, "decoder": "none",
    }  # fmt: skip
    try:
        main(**{**defaults, **arguments})
    except typer.Exit as error:
        return error.exit_code
    return 0


def test_the_frames_are_those_of_the_environment(env_kwargs: dict[str, Any], frames: list[Any]) -> None:
    env: Any = gym.make(refine_env.ENV_ID, split="test", render_mode="rgb_array", **env_kwargs)
    policy = agents.make("persistent-q3", env.unwrapped.config)
    policy.reset(1)
    observation, info = env.reset(seed=3)
    for frame in frames[:-1]:
        assert np.array_equal(env.render(), frame)
        observation, _, _, _, info = env.step(policy.select_action(observation, info))
    assert np.array_equal(env.render(), frames[-1])
    assert len(frames) == 13


def test_a_trajectory_is_replayed(env_kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    reset = refine_env.LatentRefinementEnv.reset

    def spy(self: Any, **kwargs: Any) -> Any:
        observation, info = reset(self, **kwargs)
        seen.append(info["trajectory"])
        return observation, info

    monkeypatch.setattr(refine_env.LatentRefinementEnv, "reset", spy)
    record_episode("final-only", seed=0, trajectory=2, env_kwargs={**env_kwargs, "deadline": 2})
    assert seen == [2]


def test_a_warning_is_one_sentence_too(
    gaussian_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the command line; for a user of the module it comes from the module of warnings."""
    registry._warn_of_neglected_errors.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        code = run(agent="dp", coder="forward", cache=str(gaussian_cache), out=[tmp_path / "a.png"])
    assert code == 0
    told = capsys.readouterr().err
    assert told.startswith("warning: dp plans as if there were no coding errors on the paper's coder")
    assert told.count("\n") == 1


def test_gif(frames: list[Any], tmp_path: Path) -> None:
    path = write_frames(frames, tmp_path / "episode.gif", fps=5.0)
    with Image.open(path) as animation:
        assert animation.n_frames == len(frames)
        assert animation.size == (frames[0].shape[1], frames[0].shape[0])
        assert animation.info["loop"] == 0
        durations = []
        for number, frame in enumerate(frames):
            animation.seek(number)
            durations.append(animation.info["duration"])
            shown = np.asarray(animation.convert("RGB")).astype(int)
            assert np.abs(shown - frame).mean() < 0.2
            assert shown[1, 1].tolist() == [255, 255, 255]
    assert durations == [200] * 12 + [2_200]
    assert path.stat().st_size < 2_000_000 / 60 * len(frames)


def test_mp4(frames: list[Any], tmp_path: Path) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    path = write_frames(frames, tmp_path / "episode.mp4", fps=5.0)
    read = [ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-i", str(path), "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    data = subprocess.run(read, capture_output=True, check=True, timeout=120).stdout
    shown = np.frombuffer(data, dtype=np.uint8).reshape(-1, *frames[0].shape)
    assert len(shown) == len(frames) + 10  # the last is held for two seconds
    _, seconds = ffmpeg.count_frames_and_secs(str(path))
    assert seconds == pytest.approx(len(shown) / 5.0, abs=0.01)
    for frame, seen in zip(frames, shown, strict=False):
        assert np.abs(seen.astype(int) - frame).mean() < 3.0


def test_png(frames: list[Any], tmp_path: Path) -> None:
    for slot, expected in ((None, frames[-1]), (1, frames[0]), (7, frames[6])):
        path = write_frames(frames, tmp_path / "frame.PNG", slot=slot)
        assert np.array_equal(np.asarray(Image.open(path)), expected)
    with pytest.raises(ConfigurationError, match="`slot` must be an integer in 1 … 13, got 14"):
        write_frames(frames, tmp_path / "frame.png", slot=14)


def test_folder(frames: list[Any], tmp_path: Path) -> None:
    out = tmp_path / "new" / "frames"
    write_frames(frames, out)
    names = sorted(path.name for path in out.iterdir())
    assert names == [f"slot-{number:02d}.png" for number in range(1, 14)]
    assert np.array_equal(np.asarray(Image.open(out / "slot-05.png")), frames[4])
    assert [path.name for path in out.parent.iterdir()] == ["frames"]
    with pytest.raises(ConfigurationError, match="`--out` must be a new or an empty folder"):
        write_frames(frames, out)
    (tmp_path / "empty").mkdir()
    assert len(list(write_frames(frames, tmp_path / "empty").iterdir())) == 13


def test_an_unknown_suffix_is_refused_before_the_episode_is_played(tmp_path: Path, capsys: Any) -> None:
    assert run(out=[tmp_path / "episode.avi"], cache="nowhere") == 2
    assert "`--out` must end in .gif, .mp4, .png, or in no suffix for a folder of pictures" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["encoding", "replacing"])
@pytest.mark.parametrize("suffix", ["gif", "mp4", "png"])
def test_what_fails_leaves_the_old_file(
    frames: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, where: str
) -> None:
    def fail(*arguments: Any) -> bytes:
        raise OSError("the disk is full")

    path = tmp_path / f"episode.{suffix}"
    path.write_bytes(b"old")
    if where == "encoding":
        monkeypatch.setattr(record, f"_encode_{suffix}", fail)
    else:
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="the disk is full"):
        write_frames(frames, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan")])
def test_bad_rates_of_frames(frames: list[Any], tmp_path: Path, fps: float) -> None:
    with pytest.raises(ConfigurationError, match="`fps` must be"):
        write_frames(frames, tmp_path / "episode.gif", fps=fps)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"agent": "nobody"}, 2),
        ({"seed": -1}, 2),
        ({"trajectory": 99}, 2),
        ({"coder": "nearest"}, 2),
        ({"cache": "nowhere"}, 3),
        ({}, 0),
    ],
    ids=str,
)
def test_exit_codes(gaussian_cache: Path, tmp_path: Path, arguments: dict[str, Any], code: int, capsys: Any) -> None:
    out = tmp_path / "a.png"
    assert run(out=[out], **{"cache": str(gaussian_cache), **arguments}) == code
    assert out.exists() == (code == 0)
    assert ("error: " in capsys.readouterr().err) == (code != 0)


def test_unwritable(gaussian_cache: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert run(out=[tmp_path / "file" / "a.png"], cache=str(gaussian_cache)) == 3


@pytest.mark.parametrize(
    ("suffix", "module"), [("gif", "PIL"), ("png", "PIL"), ("mp4", "imageio_ffmpeg"), ("gif", "matplotlib")]
)
def test_without_the_extra(
    gaussian_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, module: str, capsys: Any
) -> None:
    if module == "PIL":  # matplotlib itself needs it: block what is imported here alone
        import_extra = record.import_extra
        monkeypatch.setitem(sys.modules, "absent", None)
        monkeypatch.setattr(
            record,
            "import_extra",
            lambda name, extra: import_extra("absent" if name.startswith("PIL") else name, extra),
        )
    else:
        monkeypatch.setitem(sys.modules, module, None)
    assert run(out=[tmp_path / f"a.{suffix}"], cache=str(gaussian_cache)) == 4
    assert "refine-env[render]" in capsys.readouterr().err


def test_several_files_at_once(gaussian_cache: Path, tmp_path: Path, capsys: Any) -> None:
    outs = [tmp_path / "a.gif", tmp_path / "b.png"]
    assert run(out=outs, cache=str(gaussian_cache), slot=2) == 0
    assert all(out.is_file() for out in outs)
    assert capsys.readouterr().out.count("wrote ") == 2


def test_the_command(gaussian_cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.gif"
    arguments = ["--agent", "final-only", "--deadline", "3", "--cache", str(gaussian_cache), "--out", str(out)]
    result = subprocess.run(
        [sys.executable, "-W", "error", "-m", "agents.record", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"wrote {out}\n"
    assert out.read_bytes()[:3] == b"GIF"


def test_the_same_seed_gives_the_same_bytes(env_kwargs: dict[str, Any], frames: list[Any], tmp_path: Path) -> None:
    again = record_episode("persistent-q3", seed=3, env_kwargs=env_kwargs)
    other = record_episode("persistent-q3", seed=4, env_kwargs=env_kwargs)
    a, b, c = (
        write_frames(taken, tmp_path / f"{name}.gif").read_bytes()
        for name, taken in (("a", frames), ("b", again), ("c", other))
    )
    assert a == b
    assert a != c


def test_a_missing_cache() -> None:
    with pytest.raises(CacheError, match="nowhere"):
        record_episode("random", seed=0, env_kwargs={"cache": "nowhere"})
