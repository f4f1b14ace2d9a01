"""What midpoint reuse costs and saves where a street scene changes: S1 transmitter moved, S2 cars appear, S3 buildings.

``python -m train.diffusion.radiomap.experiments`` samples the maps of changed held-out scenes from midpoints of

- ``vanilla``: the old scene's own run, under all of the old scene's conditions;
- ``two-stage``: a run that was told the old scene's buildings alone. In S3, too: a stored midpoint was made before the
  buildings changed.

The network is the same, and so is each scene's seed: reuse and the full run differ by what the steps before the
midpoint were told, and by nothing else. One run of each old scene gives the midpoints of all reuse ratios.

Scenes come in blocks of one batch. What a block needs is a file for each run and cell in the work folder, whole or not
there, so a run that is interrupted goes on where it was, and one with more blocks adds to what is there. The tables are
made of these files: they differ from those of an uninterrupted run in nothing but the times.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from refine_env._files import replacing
from refine_env.commands import command, parse_list, run
from refine_env.errors import ConfigurationError
from refine_env.evaluation import Table, bootstrap_interval, write_atomically, write_table
from refine_env.evaluation.statistics import percentile_interval, resampled_means
from refine_env.metrics import psnr, ssim
from refine_env.trajectories import Reuse, sample_seed
from refine_env.trajectories.conditions import hash_condition
from refine_env.trajectories.midpoints import Midpoint
from refine_env.trajectories.pipeline import LatentDecoder, LatentSampler
from refine_env.trajectories.similarity import estimate_distances
from train.diffusion.config import DeviceOption
from train.diffusion.radiomap.assess import BATCH, SETS, UNCHANGED, WORK, Maps, load_regressor, truths
from train.diffusion.radiomap.config import EXTRA, MODEL
from train.diffusion.radiomap.experiment_figures import draw_quality, draw_strips
from train.diffusion.reuse import ADAPTIVE_COLUMNS, tabulate_adaptive
from train.diffusion.scenes import FIRST_TEST_SEED, Scene, conditions, make_scene
from train.options import require_extra, show_log

log = logging.getLogger("train.radiomap")

EXPERIMENTS = {name.partition(",")[0]: name for name in UNCHANGED}
MODES = ("vanilla", "two-stage")
RATIOS = (0.0, 0.5, 0.7, 0.8, 0.9, 0.94, 0.98)
STEPS = (50, 100)
BLOCKS = 13

_SCORES = ("nmse", "rmse", "psnr_db", "ssim")
SCORES = tuple(f"{name}_{of}" for of in ("truth", "full") for name in _SCORES)
MAP_COLUMNS: dict[str, type] = {
    "experiment": str, "num_steps": int, "mode": str, "ratio": float, "step": int, "block": int, "scene": int,
    **dict.fromkeys(SCORES, float),
}  # fmt: skip
"""One row a map: its scores against the truth, and against the full run of the same scene, seed and T; of gray levels,
of which 1 is 100 dB. Of a full run the mode is ``full``; ``copying`` and ``regressor`` have no ratio."""

SUMMARY_COLUMNS: dict[str, type] = {
    "experiment": str, "num_steps": int, "mode": str, "ratio": float, "step": int, "scenes": int,
    **{name + end: float for name in (*SCORES, "loss", "ms_per_map", "speed_up") for end in ("", "_low", "_high")},
    "fewer_evaluations": float,
}  # fmt: skip
"""Means over the maps with 95 % bootstrap intervals; ``loss`` is the NMSE against the truth less that of R = 0, scene
by scene. Times are the processor's, of the sampling with the midpoint at hand, and the speed-up is that over R = 0 of
the same experiment and T; the intervals resample blocks."""

RATIO_COLUMNS: dict[str, type] = {"experiment": str, "num_steps": int, **ADAPTIVE_COLUMNS, "knee": float}
"""R* for a tolerance of the map's NMSE against the full run's, see ``train.diffusion.reuse``, and where the knee is
found: the largest R of the grid up to which the mean of that NMSE is at most the tolerance."""


@dataclass(frozen=True)
class Settings:
    """Of the experiments.

    Args:
        model: hub id, folder, or ``radiomap``.
        work: folder of the runs.
        experiments: some of :data:`EXPERIMENTS`.
        modes: some of :data:`MODES`.
        ratios: R, 0 not among them.
        batch_size: scenes of a block.
        seed: of the noise.
        device: torch device.
    """

    model: str
    work: Path
    experiments: tuple[str, ...]
    modes: tuple[str, ...]
    ratios: tuple[float, ...]
    batch_size: int
    seed: int
    device: str

    def steps(self, num_steps: int) -> dict[float, int]:
        """m of every ratio."""
        return {ratio: Reuse(ratio=ratio, static_prompts=[""]).step(num_steps) for ratio in self.ratios}


@dataclass(frozen=True)
class Change:
    """The scenes of a block before and after they change, and what the network is told of them.

    Attributes:
        old, new: the scenes.
    """

    old: list[Scene]
    new: list[Scene]

    @cached_property
    def told(self) -> dict[str, Maps]:
        """Conditions (B, 3, S, S): of the new scenes, and of the old ones as either mode's midpoints have them."""
        return {
            "full": np.stack([conditions(scene) for scene in self.new]),
            "vanilla": np.stack([conditions(scene) for scene in self.old]),
            "two-stage": np.stack([conditions(scene, static=True) for scene in self.old]),
        }


class Runs:
    """The runs of one T, made or read.

    Args:
        settings: of the experiments.
        num_steps: T.
        blocks: number of batches of scenes.

    Raises:
        ConfigurationError: if the work folder has runs of another network or with other options, or a ratio does not
            go with T.
    """

    def __init__(self, settings: Settings, num_steps: int, blocks: int) -> None:
        self.settings, self.num_steps, self.blocks = settings, num_steps, blocks
        self.steps = settings.steps(num_steps)
        self.sampler = LatentSampler(settings.model, num_steps=num_steps, guidance_scale=1.0, device=settings.device)
        if self.sampler.condition_shape is None:
            raise ConfigurationError(
                f"`--model` must be a model of radio maps, whose network sees an image, got {settings.model!r}. Train "
                "one with python -m train.radiomap."
            )
        self.side = 4 * self.sampler.latent_shape[1]
        _claim(settings, self.sampler)
        self._warm = False

    def path(self, block: int, name: str) -> Path:
        """Of a run's file."""
        return self.settings.work / f"T{self.num_steps}" / f"block-{block:03d}" / f"{name}.npz"

    def change(self, experiment: str, block: int) -> Change:
        """The scenes of a block."""
        size = self.settings.batch_size
        seeds = range(FIRST_TEST_SEED + block * size, FIRST_TEST_SEED + (block + 1) * size)
        base = [make_scene(seed, side=self.side) for seed in seeds]
        name = EXPERIMENTS[experiment]
        return Change(
            old=[UNCHANGED[name](scene) for scene in base],
            new=[SETS[name](scene, seed) for scene, seed in zip(base, seeds, strict=True)],
        )

    def seeds(self, block: int) -> list[int]:
        """Of the noise of a block's scenes."""
        size = self.settings.batch_size
        return [sample_seed(self.settings.seed, block * size + k) for k in range(size)]

    def full(self, experiment: str, block: int, change: Change) -> dict[str, NDArray[Any]]:
        """The full run of the new scenes: x_0 (B, C, H, W), and the processor's milliseconds a map."""
        path = self.path(block, f"{experiment}-full")
        if not path.is_file():
            _write(path, self._sample(block, change.told["full"], None))
        return _read(path)

    def source(self, block: int, told: Maps) -> dict[str, NDArray[Any]]:
        """x_m and y(x_m) of the run under some conditions at every m, falling, (K, B, C, H, W) each."""
        path = self.path(block, f"source-{hash_condition(told)[:12]}")
        if not path.is_file():
            size, falling = len(told), sorted(set(self.steps.values()), reverse=True)
            *passing, last = falling
            made = self.sampler.sample_midpoints([""] * size, self.seeds(block), last, passing=passing, conditions=told)
            latents = np.stack(
                [
                    np.stack([midpoint.tensors["latent"] for midpoint in made if midpoint.key.step == step])
                    for step in falling
                ]
            )
            estimates = [
                self.sampler.estimate([""] * size, x, step, conditions=told)
                for x, step in zip(latents, falling, strict=True)
            ]
            _write(path, {"steps": np.array(falling), "latents": latents, "estimates": np.stack(estimates)})
        return _read(path)

    def reused(self, experiment: str, block: int, mode: str, ratio: float, change: Change) -> dict[str, NDArray[Any]]:
        """A run of the new scenes from midpoints of the old: x_0, milliseconds, and ‖Δy‖² and ‖y‖² at x_m, (B,)."""
        path = self.path(block, f"{experiment}-{mode}-{ratio:g}")
        if not path.is_file():
            source = self.source(block, change.told[mode])
            place = source["steps"].tolist().index(self.steps[ratio])
            made = self._sample(block, change.told["full"], (self.steps[ratio], source["latents"][place]))
            first = made.pop("first").astype(np.float32)
            made["distance"] = estimate_distances(first, source["estimates"][place])
            made["power"] = estimate_distances(first, np.zeros_like(first))
            _write(path, made)
        return _read(path)

    def _sample(self, block: int, told: Maps, start: tuple[int, NDArray[np.float32]] | None) -> dict[str, NDArray[Any]]:
        """x_0, the first clean estimate where the run starts at midpoints, and the processor's milliseconds a map."""
        size, seeds = len(told), self.seeds(block)
        if not self._warm:  # what torch does once is no part of a map's time
            self.sampler.estimate([""] * size, self.sampler.initial_noise(seeds), self.num_steps, conditions=told)
            self._warm = True
        midpoints = None
        if start is not None:
            key = self.sampler.midpoint_key("", 0, start[0], size, told[0])
            midpoints = [Midpoint(key=key, tensors={"latent": latent}) for latent in start[1]]
        begun = time.process_time()
        latents, clean = self.sampler.sample([""] * size, seeds, start=midpoints, conditions=told)
        milliseconds = 1e3 * (time.process_time() - begun) / size
        found = {"x_0": latents[:, 0], "milliseconds": np.array(milliseconds)}
        return found if start is None else {**found, "first": clean[:, -1]}


def _write(path: Path, arrays: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def _read(path: Path) -> dict[str, NDArray[Any]]:
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def _claim(settings: Settings, sampler: LatentSampler) -> None:
    """Write down what the runs of a work folder are of, or check that it is the same.

    It is not the model's revision: a VAE whose decoder alone was trained further has the same runs.
    """
    network = hashlib.sha256()
    for name, values in sampler._pipeline.unet.state_dict().items():
        network.update(name.encode() + values.float().cpu().numpy().tobytes())
    wanted = {"network": network.hexdigest(), "batch_size": settings.batch_size, "seed": settings.seed}
    path = settings.work / "runs.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(wanted) + "\n")
    for name, value in json.loads(path.read_text(encoding="utf-8")).items():
        if wanted.get(name) != value:
            raise ConfigurationError(
                f"`--work` must be a folder of runs of this {name}, {wanted.get(name)!r:.20}, got "
                f"{str(settings.work)!r}, which has {value!r:.20}. Give another folder, or the same options."
            )


# --- Scores ---------------------------------------------------------------------------------------


def score_maps(maps: Maps, truth: Maps, of: str) -> dict[str, NDArray[np.float64]]:
    """NMSE, RMSE, PSNR [dB] and SSIM of maps (N, side, side), (N,) each, by the names of :data:`SCORES`.

    Args:
        maps: gray levels.
        truth: what they are compared with.
        of: the names' end.
    """
    squares = ((maps.astype(np.float64) - truth) ** 2).mean(axis=(1, 2))
    pictures = [np.repeat(values[..., None], 3, axis=3).clip(0, 1) for values in (truth, maps)]
    return {
        f"nmse_{of}": squares / (truth.astype(np.float64) ** 2).mean(axis=(1, 2)),
        f"rmse_{of}": np.sqrt(squares),
        f"psnr_db_{of}": psnr(*pictures),
        f"ssim_{of}": ssim(*pictures),
    }


class Scoring:
    """Scores runs, each once for one decoder.

    Args:
        settings: of the experiments.
        regressor: folder of the regressor; left out where there is none.
    """

    def __init__(self, settings: Settings, regressor: Path) -> None:
        self.settings = settings
        self.decoder = LatentDecoder(settings.model, device=settings.device)
        self.regressor = load_regressor(regressor, settings.device)

    def maps(self, latents: NDArray[Any]) -> Maps:
        """Decode x_0."""
        return self.decoder(latents)[..., 0]

    @cached_property
    def digest(self) -> str:
        """Of the VAE."""
        weights = hashlib.sha256()
        for name, values in self.decoder._vae.state_dict().items():
            weights.update(name.encode() + values.float().cpu().numpy().tobytes())
        return weights.hexdigest()

    def rows(self, runs: Runs, experiment: str, block: int) -> Iterator[dict[str, Any]]:
        """Rows with :data:`MAP_COLUMNS` of a block, and beside them ``milliseconds``, ``distance`` and ``power``."""
        path = runs.path(block, f"{experiment}-scores").with_suffix(".json")
        cells = [("full", 0.0), *((mode, ratio) for mode in self.settings.modes for ratio in self.settings.ratios)]
        wanted = {"vae": self.digest, "cells": [list(cell) for cell in cells], "regressor": self.regressor is not None}
        if path.is_file():
            known = json.loads(path.read_text(encoding="utf-8"))
            if {name: known[name] for name in wanted} == wanted:
                yield from known["rows"]
                return
        rows = list(self._score(runs, experiment, block, cells))
        write_atomically(path, json.dumps({**wanted, "rows": rows}) + "\n")
        yield from rows

    def _score(
        self, runs: Runs, experiment: str, block: int, cells: Sequence[tuple[str, float]]
    ) -> Iterator[dict[str, Any]]:
        change = runs.change(experiment, block)
        truth = truths(change.new)
        full = self.maps(runs.full(experiment, block, change)["x_0"])
        found: list[tuple[str, float | None, int, Maps, dict[str, Any]]] = []
        for cell in cells:
            is_full = cell[0] == "full"
            own = runs.full(experiment, block, change) if is_full else runs.reused(experiment, block, *cell, change)
            step = runs.num_steps if is_full else runs.steps[cell[1]]
            found.append((*cell, step, self.maps(own.pop("x_0")), own))
        found.append(("copying", None, 0, truths(change.old), {}))
        if self.regressor is not None:
            found.append(("regressor", None, 1, self.regressor(change.told["full"]), {}))
        for mode, ratio, step, maps, own in found:
            scores = {**score_maps(maps, truth, "truth"), **score_maps(maps, full, "full")}
            for k in range(len(maps)):
                values = {name: float(of[k]) if of.ndim else float(of) for name, of in {**own, **scores}.items()}
                yield {
                    "experiment": experiment,
                    "num_steps": runs.num_steps,
                    "mode": mode,
                    "ratio": ratio,
                    "step": step,
                    "block": block,
                    "scene": FIRST_TEST_SEED + block * self.settings.batch_size + k,
                    **values,
                }


def summarize(rows: Table) -> Table:
    """Rows with :data:`SUMMARY_COLUMNS` of the rows of one experiment and T."""
    cells: dict[tuple[str, float | None], Table] = {}
    for row in rows:
        cells.setdefault((row["mode"], row["ratio"]), []).append(row)
    full = cells["full", 0.0]
    losses = {row["scene"]: row["nmse_truth"] for row in full}
    full_ms = _by_block(full)
    summary: Table = []
    for own in cells.values():
        ratio = own[0]["ratio"]
        columns: dict[str, Any] = {}
        for name in SCORES:
            columns |= _interval(name, [row[name] for row in own])
        columns |= _interval("loss", [row["nmse_truth"] - losses[row["scene"]] for row in own])
        ms = _by_block(own)
        columns |= _interval("ms_per_map", ms)
        columns |= dict.fromkeys(("speed_up", "speed_up_low", "speed_up_high"))
        if ms[0] is not None:
            resampled = resampled_means(np.array(full_ms)) / resampled_means(np.array(ms))
            ends = percentile_interval(resampled)
            columns |= {"speed_up": sum(full_ms) / sum(ms), "speed_up_low": ends[0], "speed_up_high": ends[1]}
        shared = {name: own[0][name] for name in ("experiment", "num_steps", "mode", "ratio", "step")}
        fewer = None if ratio is None else own[0]["num_steps"] / own[0]["step"]
        summary.append({**shared, "scenes": len(own), **columns, "fewer_evaluations": fewer})
    return summary


def _by_block(rows: Table) -> list[Any]:
    """The milliseconds of each block."""
    return list({row["block"]: row.get("milliseconds") for row in rows}.values())


def _interval(name: str, values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and the ends of its interval; None where a value is missing, as times of copying are."""
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if len(known) < len(values):
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"))
    low, high = bootstrap_interval(known)
    return {name: float(known.mean()), f"{name}_low": low, f"{name}_high": high}


def tabulate_ratios(rows: Table, runs: Runs) -> Table:
    """Rows with :data:`RATIO_COLUMNS` of the rows of one experiment and T; none of fewer than two blocks."""
    reused = [row for row in rows if row["mode"] in MODES]
    pairs = [{**row, "source": str(row["scene"]), "target": "", "nmse": row["nmse_full"]} for row in reused]
    table = []
    for row in tabulate_adaptive(pairs, pairs, runs.sampler.schedule):
        knee = 0.0
        for ratio in sorted(runs.settings.ratios):
            errors = [pair["nmse"] for pair in pairs if pair["mode"] == row["mode"] and pair["ratio"] == ratio]
            if float(np.mean(errors)) > row["tolerance"]:
                break
            knee = ratio
        first = rows[0]
        table.append({"experiment": first["experiment"], "num_steps": first["num_steps"], **row, "knee": knee})
    return table


def strip(runs: Runs, scoring: Scoring, experiment: str, scene: int) -> dict[str, Any]:
    """What :func:`draw_strips` shows of a scene of the first block: old and new scene, truths, and maps over R."""
    change = runs.change(experiment, 0)
    full = runs.full(experiment, 0, change)["x_0"]
    ratios = sorted(runs.settings.ratios)
    return {
        "label": EXPERIMENTS[experiment],
        "old": change.old[scene],
        "new": change.new[scene],
        "old truth": truths([change.old[scene]])[0],
        "truth": truths([change.new[scene]])[0],
        "full": scoring.maps(full[scene : scene + 1])[0],
        "ratios": ratios,
        "modes": {
            mode: [
                scoring.maps(runs.reused(experiment, 0, mode, ratio, change)["x_0"][scene : scene + 1])[0]
                for ratio in ratios
            ]
            for mode in runs.settings.modes
        },
    }


@command
def main(
    out: Annotated[Path, typer.Option(help="Folder for the tables.")] = Path("results/radiomap"),
    figures: Annotated[Path, typer.Option(help="Folder for the figures.")] = Path("results/radiomap"),
    work: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/radiomap-experiments"),
    model: Annotated[str, typer.Option(help="Hub id or folder of a model, or radiomap.")] = str(MODEL),
    regressor: Annotated[Path, typer.Option(help="Folder of the regressor; without it, it has no rows.")] = (
        WORK / "regressor"
    ),
    experiments: Annotated[str, typer.Option(help="Experiments with commas between.")] = ",".join(EXPERIMENTS),
    modes: Annotated[str, typer.Option(help="Modes of reuse with commas between.")] = ",".join(MODES),
    ratios: Annotated[str, typer.Option(help="Reuse ratios R with commas between.")] = ",".join(map(str, RATIOS)),
    num_steps: Annotated[str, typer.Option(help="T, sampling steps, with commas between.")] = ",".join(map(str, STEPS)),
    blocks: Annotated[str, typer.Option(help="Batches of held-out scenes; one number, or one for each T.")] = str(
        BLOCKS
    ),
    batch_size: Annotated[int, typer.Option(help="Scenes of a batch.", min=1, max=1024)] = BATCH,
    strip_scene: Annotated[int, typer.Option(help="Scene of the first batch that the strips show.", min=0)] = 0,
    seed: Annotated[int, typer.Option(help="Of the noise.", min=0)] = 0,
    device: DeviceOption = "cpu",
) -> None:
    """Sample changed scenes from midpoints of the old ones, and tabulate and draw what it costs and saves."""
    show_log()
    require_extra("ldm", EXTRA)

    def listed(name: str, text: str, kind: Any, allowed: Any, what: str) -> Any:
        return parse_list(
            name,
            text,
            kind,
            what=f"{what}, none twice",
            advice="Leave it out for the default.",
            valid=lambda items: len(set(items)) == len(items) and all(map(allowed, items)),
        )

    chosen = listed("experiments", experiments, str, EXPERIMENTS.__contains__, f"some of {', '.join(EXPERIMENTS)}")
    own_modes = listed("modes", modes, str, MODES.__contains__, f"some of {', '.join(MODES)}")
    own_ratios = listed("ratios", ratios, float, lambda ratio: 0.0 <= ratio < 1.0, "numbers in [0, 1)")
    own_steps = listed("num_steps", num_steps, int, lambda steps: 2 <= steps <= 10_000, "integers in 2 … 10000")
    own_blocks = parse_list(
        "blocks",
        blocks,
        int,
        what="a positive integer, or one for each T",
        advice="Leave it out for the default.",
        valid=lambda items: len(items) in (1, len(own_steps)) and min(items) >= 1,
    )
    if strip_scene >= batch_size:
        raise ConfigurationError(
            f"`strip_scene` must be less than `batch_size`, {batch_size}, got {strip_scene}. Choose another scene."
        )
    settings = Settings(
        model=model,
        work=work,
        experiments=chosen,
        modes=own_modes,
        ratios=tuple(sorted(ratio for ratio in own_ratios if ratio > 0.0)),
        batch_size=batch_size,
        seed=seed,
        device=device,
    )
    if not settings.ratios:
        raise ConfigurationError(f"`ratios` must have one above 0, got {ratios!r}. Leave it out for the default.")
    for steps in own_steps:
        settings.steps(steps)
    all_runs = [Runs(settings, steps, own_blocks[k % len(own_blocks)]) for k, steps in enumerate(own_steps)]
    for block in range(max(own_blocks)):
        for runs in [runs for runs in all_runs if block < runs.blocks]:
            for experiment in chosen:
                change = runs.change(experiment, block)
                runs.full(experiment, block, change)
                for mode in own_modes:
                    for ratio in settings.ratios:
                        runs.reused(experiment, block, mode, ratio, change)
            log.info("T = %d: %d of %d blocks sampled", runs.num_steps, block + 1, runs.blocks)
    scoring = Scoring(settings, regressor)
    maps: Table = []
    summary: Table = []
    adaptive: Table = []
    for runs in all_runs:
        for experiment in chosen:
            rows = [row for block in range(runs.blocks) for row in scoring.rows(runs, experiment, block)]
            maps += rows
            summary += summarize(rows)
            adaptive += tabulate_ratios(rows, runs)
        log.info("T = %d: scored", runs.num_steps)
    out.mkdir(parents=True, exist_ok=True)
    figures.mkdir(parents=True, exist_ok=True)
    write_table(out / "radiomap-maps.csv", maps, MAP_COLUMNS)
    write_table(out / "radiomap-reuse.csv", summary, SUMMARY_COLUMNS)
    write_table(out / "radiomap-adaptive.csv", adaptive, RATIO_COLUMNS)
    draw_quality(summary, figures)
    draw_strips([strip(all_runs[-1], scoring, experiment, strip_scene) for experiment in chosen], figures)
    log.info("wrote %s and %s", out, figures)


if __name__ == "__main__":
    run(main)
