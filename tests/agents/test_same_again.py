"""The command that a report prints gives the same tables to the byte, whatever options the run had."""

from __future__ import annotations

import hashlib
import inspect
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from agents import evaluate
from agents.report import command_of, read_run
from refine_env import TrajectoryCache
from refine_env.metrics import psnr
from refine_env.trajectories.denoising import LinearDenoiser, measure_decoder, record_decoder

BASE = {
    "agent_names": "lookahead-closed-loop,persistent-q3",
    "snr_db": "12",
    "episodes": "3",
    "cache": "CACHE",
}
OTHER = {
    "agent_names": "persistent-q8,lookahead-closed-loop",
    "snr_db": "-1.5,0.1,18",
    "episodes": "4",
    "seed": "7",
    "cache": "OTHER",
    "split": "all",
    "bit_depths": "3,6,8,16",
    "deadline": "57",
    "latency_quantile": "1e-12",
    "payload": "posterior_mean",
    "moments": "measured",
    "device_decoder": "denoise",
    "anytime": "yes",
    "target_mse": "0.05",
    "warm_start": "30,shared",
    "name_bits": "4000",
    "images": "yes",
    "metrics": "psnr",
    "image_episodes": "1",
    "lpips_weights": "a file.pth",
    "model": "another",
    "device": "meta",
}
"""Of every option that changes tables a value that does."""
WITHOUT_EFFECT = {
    "out": "where the tables are written",
    "workers": "the tables do not depend on it",
    "figures": "drawn from the tables",
    "html": "written from the tables",
    "study": "the others have no report",
    "reuse_ratios": "of a study",
}
OF_IMAGES = ("metrics", "image_episodes", "lpips_weights", "model", "device")
OF_MIDPOINTS = ("warm_start", "name_bits")
TOGETHER = [[name for name in OTHER if name not in excluded] for excluded in (OF_MIDPOINTS, ("payload",))]
"""All options at once; estimates cannot start from a midpoint."""
APP = typer.Typer()
APP.command()(evaluate.main)


class Decoder:
    """Stands in for a model: other models, and other devices, give other images."""

    def __init__(self, cache: TrajectoryCache, model: str | None = None, *, device: str = "cpu") -> None:
        self.model_id, self.revision = model or "of the cache", "1"
        self.contrast = 1 + hashlib.sha256(f"{self.model_id} {device}".encode()).digest()[0] / 64

    def __call__(self, latents: Any) -> Any:
        values = np.tanh(self.contrast * np.asarray(latents, dtype=np.float32)[:, :3]) / 2 + 0.5
        return values.transpose(0, 2, 3, 1)


class Denoiser(LinearDenoiser):
    """Stands in for a network: other models, and other devices, denoise differently."""

    def __init__(self, cache: TrajectoryCache, model: str | None = None, *, device: str = "cpu") -> None:
        super().__init__()
        self.strength = 1.0 + hashlib.sha256(f"{model} {device}".encode()).digest()[0] / 1024

    def __call__(self, samples: Any, noise_to_signal: Any, prompts: Any) -> Any:
        return super().__call__(samples, self.strength * np.asarray(noise_to_signal), prompts)


def open_metrics(names: tuple[str, ...], weights: Path | None = None, *, device: str = "cpu", **_: Any) -> Any:
    """PSNR, and for LPIPS what depends on the weights."""
    return {name: psnr if name != "lpips" else lambda a, b: psnr(a, b) / len(str(weights)) for name in names}, []


def as_words(options: dict[str, str]) -> list[str]:
    flags = {"agent_names": "--agents"}
    words: list[str] = []
    for name, value in options.items():
        words.append(flags.get(name, "--" + name.replace("_", "-")))
        words += [] if name in ("anytime", "images") else [value]
    return words


def tables(words: list[str], out: Path) -> dict[str, bytes]:
    result = CliRunner().invoke(APP, [*words, "--no-figures", "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return {name: (out / name).read_bytes() for name in ("episodes.csv", "summary.csv")}


@pytest.fixture
def places(gaussian_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    from refine_env.trajectories import generate_gaussian

    monkeypatch.setattr(evaluate, "open_decoder", Decoder)
    monkeypatch.setattr(evaluate, "open_metrics", open_metrics)
    monkeypatch.setattr(evaluate, "open_denoiser", Denoiser)
    other = tmp_path / "another cache"
    generate_gaussian(other, num_trajectories=8, latent_shape=(4, 4, 4), num_steps=50, seed=1)
    places = {"CACHE": shutil.copytree(gaussian_cache, tmp_path / "cache"), "OTHER": other}
    for folder in places.values():
        cache = TrajectoryCache.open(folder)
        record_decoder(cache, measure_decoder(cache, LinearDenoiser()))
    return {name: str(folder) for name, folder in places.items()}


def test_the_decoder_s_model_and_device_are_repeated(places: dict[str, str], tmp_path: Path) -> None:
    """Without images, too."""
    options = {**BASE, "snr_db": "-3", "device_decoder": "denoise", "cache": places["CACHE"]}
    first = tables(as_words({**options, "model": "another", "device": "meta"}), tmp_path / "first")
    assert first != tables(as_words(options), tmp_path / "base")
    run = read_run(tmp_path / "first")
    assert run is not None
    assert tables(shlex.split(command_of(run))[3:], tmp_path / "again") == first


@pytest.mark.parametrize("changed", [[], *([name] for name in OTHER), *TOGETHER], ids="+".join)
def test_the_printed_command_repeats_the_tables(changed: list[str], places: dict[str, str], tmp_path: Path) -> None:
    base = {**BASE, "images": "yes"} if set(changed) & set(OF_IMAGES) else BASE
    if changed == ["name_bits"]:
        base = {**base, "warm_start": OTHER["warm_start"]}
    options = {**base, **{name: OTHER[name] for name in changed}}
    options["cache"] = places[options["cache"]]
    first = tables(as_words(options), tmp_path / "first")
    if changed:
        assert first != tables(as_words({**base, "cache": places["CACHE"]}), tmp_path / "base")
    run = read_run(tmp_path / "first")
    assert run is not None
    program, *words = shlex.split(command_of(run))[2:]
    assert program == "agents.evaluate"
    assert tables(words, tmp_path / "again") == first


def test_no_option_is_forgotten() -> None:
    assert {*OTHER, *WITHOUT_EFFECT} == set(inspect.signature(evaluate.main).parameters)
