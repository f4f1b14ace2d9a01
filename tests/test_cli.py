from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import refine_env
from refine_env import TrajectoryCache, cli
from refine_env.trajectories.midpoints import MidpointStore
from tests.trajectories.test_midpoints import KEY
from tests.trajectories.test_midpoints import make as make_midpoint

SMALL = ["-n", "4", "--latent-shape", "1,2,3", "--num-steps", "5", "--shard-size", "2"]


def run(*arguments: object) -> int:
    """The exit code of `refine-env` with these arguments."""
    with pytest.raises(SystemExit, match=r"^\d+$") as end:
        cli.main([str(argument) for argument in arguments])
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.fixture
def folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert run("generate", "gaussian", *SMALL, "--out", tmp_path / "cache") == 0
    capsys.readouterr()
    return tmp_path / "cache"


def error(capsys: pytest.CaptureFixture[str]) -> str:
    """What is on stderr, which is one sentence, on one line."""
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line]
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    return lines[0]


class TestGenerate:
    def test_gaussian(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "cache"
        assert run("generate", "gaussian", *SMALL, "--out", out, "--seed", 3, "--num-train", 3, "--note", "CC0") == 0
        captured = capsys.readouterr()
        cache = TrajectoryCache.open(out)
        assert captured.out == f"4 trajectories in {out} (manifest SHA-256 {cache.sha256}).\n"
        assert "sampling 100%" in captured.err
        assert "checking 100%" in captured.err
        assert (len(cache), cache.num_steps, cache.latent_shape) == (4, 5, (1, 2, 3))
        assert len(cache.manifest.shards) == 2
        assert len(cache.indices("train")) == 3
        assert (cache.manifest.recipe.seed, cache.manifest.recipe.note) == (3, "CC0")

    def test_quiet(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("generate", "gaussian", *SMALL, "--out", tmp_path / "cache", "--quiet") == 0
        captured = capsys.readouterr()
        assert captured.out == captured.err == ""

    def test_forward_process(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        origin = TrajectoryCache.open(folder)
        np.save(tmp_path / "x.npy", np.stack([origin.latents(index)[0] for index in range(4)]))
        (tmp_path / "prompts.txt").write_text("one\n\n two \nthree\nfour\n")
        arguments = ("--num-steps", 5, "--prompts", tmp_path / "prompts.txt", "-q")
        assert run("generate", "forward-process", "-c", tmp_path / "x.npy", "-o", tmp_path / "a", *arguments) == 0
        assert run("generate", "forward-process", "-c", folder, "-o", tmp_path / "b", *arguments) == 0
        first, second = TrajectoryCache.open(tmp_path / "a"), TrajectoryCache.open(tmp_path / "b")
        for index, prompt in enumerate(["one", "two", "three", "four"]):
            assert first.prompt(index) == prompt
            np.testing.assert_array_equal(first.latents(index), second.latents(index))
            np.testing.assert_array_equal(first.latents(index)[0], origin.latents(index)[0])
        assert capsys.readouterr().err == ""

    def test_diffusers_gets_every_option(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        calls: list[tuple[Any, ...]] = []

        def generate(*args: Any, progress: Any, **kwargs: Any) -> TrajectoryCache:
            calls.append((args, kwargs))
            return TrajectoryCache.open(folder)

        monkeypatch.setattr(cli, "generate_diffusers", generate)
        (tmp_path / "prompts.txt").write_text("\ufeffa cat\nein Bär\n", encoding="utf-8")
        options = {
            "num_steps": 7,
            "scheduler": "ddim",
            "guidance_scale": 2.5,
            "seed": 4,
            "batch_size": 3,
            "device": "cuda:0,cuda:1",
            "dtype": "float16",
            "revision": "main",
            "workers": 2,
            "engine": "dask",
            "address": "tcp://head:8786",
            "num_train": 1,
            "shard_size": 6,
            "note": "CC BY 4.0",
        }
        reuse = {
            "reuse_ratio": 0.5,
            "reuse_mode": "two-stage",
            "static_prompts": tmp_path / "prompts.txt",
            "static_conditions": tmp_path / "static.npy",
            "stage_one_model": "c/d",
            "mean_runs": 3,
            "midpoints": tmp_path / "store",
            "midpoints_limit": 7,
        }
        np.save(tmp_path / "conditions.npy", np.full((2, 1, 2, 2), 0.5, np.float16))
        np.save(tmp_path / "static.npy", np.full((1, 1, 2, 2), 0.25, np.float16))
        values = {**options, **reuse, "conditions": tmp_path / "conditions.npy"}
        flags = [str(part) for name, value in values.items() for part in (f"--{name.replace('_', '-')}", value)]
        arguments = ["--model", "a/b", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "new", *flags]
        assert run("generate", "diffusers", *arguments, "--overwrite", "--with-full") == 0
        ((out, model, prompts), kwargs) = calls.pop()
        assert (out, model, list(prompts)) == (tmp_path / "new", "a/b", ["a cat", "ein Bär"])
        given = vars(kwargs.pop("reuse"))
        assert list(given.pop("static_prompts")) == ["a cat", "ein Bär"]
        assert [len(seen) for seen in (kwargs.pop("conditions"), given.pop("static_conditions"))] == [2, 1]
        assert given == {
            "ratio": 0.5, "mode": "two-stage", "stage_one_model": "c/d", "mean_runs": 3,
            "midpoints": tmp_path / "store", "max_bytes": 7, "with_full": True,
        }  # fmt: skip
        assert kwargs == {**options, "device": ("cuda:0", "cuda:1"), "overwrite": True}
        assert run("generate", "diffusers", *arguments[:6]) == 0
        kwargs = calls.pop()[1]
        assert (kwargs["reuse"], kwargs["conditions"]) == (None, None)

    def test_goes_on_and_does_not_replace(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        before = TrajectoryCache.open(folder).sha256
        assert run("generate", "gaussian", *SMALL, "--out", folder, "-q") == 0
        assert run("generate", "gaussian", *SMALL, "--out", folder, "-q", "--seed", 1) == 3
        assert "must not be replaced unasked" in error(capsys)
        assert TrajectoryCache.open(folder).sha256 == before
        assert run("generate", "gaussian", *SMALL, "--out", folder, "-q", "--seed", 1, "--overwrite") == 0
        assert TrajectoryCache.open(folder).sha256 != before

    def test_interrupted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def interrupt(*args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(cli, "generate_gaussian", interrupt)
        assert run("generate", "gaussian", "--out", tmp_path / "cache") == 130
        assert error(capsys).startswith("error: interrupted. Run the same command again")

    @pytest.mark.parametrize(
        ("arguments", "code", "message"),
        [
            (["gaussian", "--latent-shape", "4,x"], 2, "`--latent-shape` must be integers C,H,W, got '4,x'"),
            (["gaussian", "-n", "0"], 2, "`num_trajectories` must be an integer in 1 … 10000000, got 0"),
            (["forward-process", "-c", "nowhere"], 3, "must be the name or the folder of a trajectory cache"),
            (["forward-process", "-c", "nowhere.npy"], 2, "`clean_latents` must be a readable .npy"),
            (["diffusers", "-m", "a/b", "-p", "nowhere.txt"], 2, "`prompts` must be a readable UTF-8 text file"),
            (["diffusers", "-m", "a/b", "-p", "empty.txt"], 2, "`prompts` must hold at least one prompt"),
            (["diffusers", "-m", "a/b", "-p", "latin.txt"], 2, "(not UTF-8 text)"),
            pytest.param(
                ["diffusers", "-m", "./a", "-p", "good.txt"],
                4,
                "`model` must be a hub id, a local folder, 'emoji' or 'radiomap'",
                marks=pytest.mark.extras,
            ),
        ],
    )
    def test_bad_input(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
        arguments: list[str],
        code: int,
        message: str,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "empty.txt").write_text("\n \n")
        (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9\n")
        (tmp_path / "good.txt").write_text("a cat\n")
        assert run("generate", *arguments, "--out", tmp_path / "cache") == code
        assert message in error(capsys)
        assert not (tmp_path / "cache").exists()

    def test_extra_is_not_installed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        (tmp_path / "prompts.txt").write_text("a cat\n")
        arguments = ["--model", "a/b", "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "cache"]
        assert run("generate", "diffusers", *arguments) == 4
        assert "pip install 'refine-env[generate]'" in error(capsys)


class TestInfo:
    def test_table(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("info", folder) == 0
        out = capsys.readouterr().out
        for text in ("gaussian", "all 4, train 2, test 2", "1×2×3", "linear-mmse", "E‖x_t‖²/M", "ᾱ_t"):
            assert text in out
        assert "guidance" not in out

    def test_json(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("info", folder, "--json") == 0
        summary = json.loads(capsys.readouterr().out)
        cache = TrajectoryCache.open(folder)
        assert summary["sha256"] == cache.sha256
        assert summary["trajectories"] == {"all": 4, "train": 2, "test": 2}
        assert (summary["num_steps"], summary["latent_dim"], summary["latent_shape"]) == (5, 6, [1, 2, 3])
        assert summary["bytes"] == sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        steps = [row["t"] for row in summary["by_step"]]
        assert steps == sorted(set(steps))
        assert (steps[0], steps[-1]) == (0, 5)
        for row in summary["by_step"]:
            assert row["alpha_bar"] == cache.schedule.alpha_bar[row["t"]]
            assert row["mean_square"] == cache.mean_square[row["t"]]
            assert row["mmse"] == cache.mmse[row["t"]]

    def test_missing_and_damaged(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("info", folder.parent / "nowhere") == 3
        assert "must be the name or the folder of a trajectory cache" in error(capsys)
        next(folder.glob("*.safetensors")).unlink()
        assert run("info", folder) == 3
        assert "must exist, got no such file" in error(capsys)
        (folder / "manifest.json").write_text("{}")
        assert run("info", folder) == 3
        assert "`format`" in error(capsys)


class TestVerify:
    def test_whole(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("verify", folder) == 0
        captured = capsys.readouterr()
        assert captured.out.startswith(f"2 of 2 shards of {folder} are whole")
        assert "verifying 100%" in captured.err

    @pytest.mark.parametrize("kind", ["bit", "truncated", "missing"])
    def test_damaged(self, folder: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
        first, second = sorted(folder.glob("*.safetensors"))
        content = bytearray(second.read_bytes())
        content[-1] ^= 1
        if kind == "missing":
            second.unlink()
        else:
            second.write_bytes(content if kind == "bit" else content[:-1])
        assert run("verify", folder, "--quiet") == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert second.name in captured.err
        assert first.name not in captured.err
        assert f"{folder} is damaged in 1 place." in captured.err

    def test_missing(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert run("verify", tmp_path) == 3
        assert "must be the name or the folder" in error(capsys)


def test_midpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = MidpointStore(tmp_path / "store")
    for seed in (1, 2):
        store.write(make_midpoint(replace(KEY, seed=seed)))
    size = sum(store.sizes().values())
    assert run("midpoints", "info", "--midpoints", store.folder) == 0
    assert capsys.readouterr().out == f"2 midpoints of {size:,} bytes in {store.folder}.\n"
    assert run("midpoints", "verify", "--midpoints", store.folder) == 0
    assert capsys.readouterr().out == f"All 2 midpoints in {store.folder} are whole.\n"
    file = next(iter(store.sizes()))
    file.write_bytes(file.read_bytes()[:-1])
    assert run("midpoints", "verify", "--midpoints", store.folder, "--quiet") == 1
    assert f"{file} is damaged (its hash" in capsys.readouterr().err
    assert run("midpoints", "clear", "--midpoints", store.folder) == 0
    assert capsys.readouterr().out == f"2 midpoints deleted in {store.folder}.\n"
    assert run("midpoints", "info", "--midpoints", file) == 0  # nothing is there
    file.touch()
    assert run("midpoints", "info", "--midpoints", file) == 2


def test_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "gaussian") == 2
    assert run("nonsense") == 2
    capsys.readouterr()
    assert run("--help") == 0
    assert "Exit codes: 0 done; 1" in " ".join(capsys.readouterr().out.split())
    for command in ("gaussian", "forward-process", "diffusers"):
        assert run("generate", command, "--help") == 0
        assert "Exit codes" in capsys.readouterr().out


def test_as_a_process_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from refine_env.cli import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    assert not {'torch', 'diffusers', 'transformers', 'matplotlib'} & set(sys.modules)\n"
    )
    arguments = ["generate", "gaussian", *SMALL, "--out", str(tmp_path / "cache")]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(
        [sys.executable, "-m", "refine_env.cli", "info", str(tmp_path / "nowhere")],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(refine_env.__file__).parent.parent,
    )
    assert done.returncode == 3
    assert done.stderr.startswith("error: `cache` must be")
    assert done.stderr.count("\n") == 1
