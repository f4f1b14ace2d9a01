"""The experiments with changed scenes: tables, resuming, what a full run is, strips, bad input; on a tiny model."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from refine_env.evaluation import read_table
from train.diffusion.radiomap.config import EXTRA
from train.diffusion.radiomap.training import train

for module in EXTRA:
    pytest.importorskip(module, reason="the ldm extra is not installed")

from refine_env.trajectories import sample_seed  # noqa: E402
from refine_env.trajectories.pipeline import LatentDecoder, LatentSampler  # noqa: E402
from tests.train.diffusion.test_radiomap import Killed, tiny  # noqa: E402
from train.diffusion.radiomap.assess import error_figures, truths  # noqa: E402
from train.diffusion.radiomap.experiments import (  # noqa: E402
    MAP_COLUMNS,
    MODES,
    RATIO_COLUMNS,
    SCORES,
    SUMMARY_COLUMNS,
    Change,
    Runs,
    Settings,
    main,
    score_maps,
    summarize,
)
from train.diffusion.scenes import FIRST_TEST_SEED, conditions, make_scene, move_transmitter  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

TABLES: dict[str, dict[str, type]] = {
    "radiomap-maps.csv": MAP_COLUMNS,
    "radiomap-reuse.csv": SUMMARY_COLUMNS,
    "radiomap-adaptive.csv": RATIO_COLUMNS,
}
TIMES = ("ms_per_map", "speed_up")
SIZE, BLOCKS = 10, 2


def experiment(folder: Path, trained: Path, /, **options: Any) -> Path:
    """Run the command, small; returns the folder of the tables."""
    values: dict[str, Any] = {
        "out": folder / "out", "figures": folder / "out", "work": folder / "work", "model": str(trained / "model"),
        "regressor": trained / "work" / "regressor", "experiments": "S1,S2,S3", "modes": "vanilla,two-stage",
        "ratios": "0,0.5,0.75", "num_steps": "4", "blocks": str(BLOCKS), "batch_size": SIZE, "strip_scene": 1,
        "seed": 0, "device": "cpu",
    }  # fmt: skip
    main(**{**values, **options})
    return folder / "out"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    train(tiny(folder, vae_steps=1, decoder_steps=1, unet_steps=1, regressor_steps=1, log_every=1))
    return folder


@pytest.fixture(scope="module")
def finished(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    experiment(folder, model)
    return folder


def table(folder: Path, name: str) -> Any:
    return read_table(folder / "out" / name, TABLES[name], optional=tuple(TABLES[name]))


def test_the_tables_are_complete(finished: Path) -> None:
    rows = table(finished, "radiomap-maps.csv")
    cells = [
        (name, mode, ratio)
        for name in ("S1", "S2", "S3")
        for mode, ratio in [("full", 0.0), *((mode, ratio) for mode in MODES for ratio in (0.5, 0.75)),
                            ("copying", None), ("regressor", None)]
    ]  # fmt: skip
    summary = table(finished, "radiomap-reuse.csv")
    assert [(row["experiment"], row["mode"], row["ratio"]) for row in summary] == cells
    assert len(rows) == len(cells) * SIZE * BLOCKS
    assert {row["scene"] for row in rows} == set(range(FIRST_TEST_SEED, FIRST_TEST_SEED + SIZE * BLOCKS))
    for row in summary:
        own = [one for one in rows if all(one[name] == row[name] for name in ("experiment", "mode", "ratio"))]
        assert (row["scenes"], row["num_steps"]) == (SIZE * BLOCKS, 4)
        steps = {"full": 4, "copying": 0, "regressor": 1}
        assert row["step"] == (steps[row["mode"]] if row["mode"] in steps else 4 * (1 - row["ratio"]))
        for name in SCORES:
            assert row[name] == pytest.approx(np.mean([one[name] for one in own]))
            assert row[f"{name}_low"] - 1e-9 <= row[name] <= row[f"{name}_high"] + 1e-9
        assert (row["speed_up"] is None) == (row["ratio"] is None)
        if row["ratio"] is not None:
            assert row["fewer_evaluations"] == 4 / row["step"]
            assert row["ms_per_map"] > 0.0
    adaptive = table(finished, "radiomap-adaptive.csv")
    assert {(row["experiment"], row["mode"]) for row in adaptive} == {(n, m) for n, m, ratio in cells if ratio == 0.5}
    assert {row["knee"] for row in adaptive} <= {0.0, 0.5, 0.75}
    for name in ("radiomap-reuse", "radiomap-changes"):
        assert (finished / "out" / f"{name}.png").stat().st_size > 1000


def test_a_resumed_run_gives_the_same_tables(
    model: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at the fifth run; and of one block first, whose files the second run takes."""
    sample, calls = Runs._sample, [0]

    def broken(self: Runs, *arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 5:
            raise Killed("at the fifth run")
        return sample(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Runs, "_sample", broken)
        with pytest.raises(Killed, match="at the fifth run"):
            experiment(tmp_path, model)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.npz")}
    assert len(before) == 6  # four runs, and those of both modes that they start from
    experiment(tmp_path, model, blocks="1")
    experiment(tmp_path, model)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for name, columns in TABLES.items():
        kept = [column for column in columns if not column.startswith(TIMES)]
        assert [[row[column] for column in kept] for row in table(tmp_path, name)] == [
            [row[column] for column in kept] for row in table(finished, name)
        ], name


def runs_of(folder: Path, model: Path, **changes: Any) -> Runs:
    values: dict[str, Any] = {
        "model": str(model / "model"), "work": folder, "experiments": ("S1",), "modes": ("vanilla",),
        "ratios": (0.5, 0.75), "batch_size": 2, "seed": 0, "device": "cpu",
    }  # fmt: skip
    return Runs(Settings(**{**values, **changes}), 4, 1)


def test_the_row_of_no_reuse_is_the_full_run(model: Path, finished: Path) -> None:
    """That of the sampler, scored as the model's assessment does; and its loss is none."""
    scenes = [move_transmitter(make_scene(seed), seed) for seed in range(FIRST_TEST_SEED, FIRST_TEST_SEED + SIZE)]
    sampler = LatentSampler(model / "model", num_steps=4, guidance_scale=1.0)
    latents, _ = sampler.sample(
        [""] * SIZE, [sample_seed(0, k) for k in range(SIZE)], conditions=np.stack([conditions(s) for s in scenes])
    )
    maps = LatentDecoder(model / "model")(latents[:, 0])[..., 0]
    expected = error_figures(truths(scenes), maps)
    own = ("S1", "full", 0)
    rows = [r for r in table(finished, "radiomap-maps.csv") if (r["experiment"], r["mode"], r["block"]) == own]
    assert np.mean([row["nmse_truth"] for row in rows]) == pytest.approx(expected["map_nmse"], rel=1e-6)
    assert np.mean([row["psnr_db_truth"] for row in rows]) == pytest.approx(expected["psnr_db"], rel=1e-6)
    for row in table(finished, "radiomap-reuse.csv"):
        if row["mode"] == "full":
            assert row["loss"] == row["nmse_full"] == 0.0
            assert row["speed_up"] == 1.0


def test_reuse_of_a_scene_that_did_not_change_is_its_full_run(model: Path, tmp_path: Path) -> None:
    runs = runs_of(tmp_path, model)
    scenes = [make_scene(FIRST_TEST_SEED + k) for k in range(2)]
    full = runs.full("S1", 0, Change(scenes, scenes))["x_0"]
    for ratio in runs.steps:
        again = runs.reused("S1", 0, "vanilla", ratio, Change(scenes, scenes))
        np.testing.assert_array_equal(again["x_0"], full)
        assert (again["distance"] < 1e-6 * again["power"]).all()
        other = runs.reused("S1", 0, "two-stage", ratio, Change(scenes, scenes))
        assert not np.array_equal(other["x_0"], full)
        assert (other["distance"] > 0.0).all()


def test_midpoints_are_those_of_the_old_scene(model: Path, tmp_path: Path) -> None:
    runs = runs_of(tmp_path, model)
    change = runs.change("S3", 0)
    assert (change.old[0].buildings != change.new[0].buildings).any()
    np.testing.assert_array_equal(change.told["two-stage"][:, 0], [scene.buildings for scene in change.old])
    assert not change.told["two-stage"][:, 1:].any()
    source = runs.source(0, change.told["vanilla"])
    latents, estimates = runs.sampler.sample(["", ""], runs.seeds(0), conditions=change.told["vanilla"])
    assert source["steps"].tolist() == [2, 1]
    for place, step in enumerate(source["steps"]):
        np.testing.assert_allclose(source["latents"][place], latents[:, step], atol=2e-3)
        np.testing.assert_allclose(source["estimates"][place], estimates[:, step - 1], atol=2e-3)
    assert runs.change("S2", 0).old[1].cars.sum() == 0
    assert runs.change("S2", 0).new[1].cars.any()


def test_scores_and_summary_by_hand() -> None:
    truth = np.full((1, 12, 12), 0.5, dtype=np.float32)
    scores = score_maps(truth + np.float32(0.1), truth, "truth")
    assert float(scores["nmse_truth"][0]) == pytest.approx(0.04, rel=1e-5)
    assert float(scores["rmse_truth"][0]) == pytest.approx(0.1, rel=1e-5)
    assert float(scores["psnr_db_truth"][0]) == pytest.approx(20.0, rel=1e-5)
    rows = [
        {"experiment": "S1", "num_steps": 10, "mode": mode, "ratio": ratio, "step": step, "block": scene // 2,
         "scene": scene, **dict.fromkeys(SCORES, 0.0), "nmse_truth": nmse + 0.1 * scene, "milliseconds": ms}
        for mode, ratio, step, nmse, ms in (("full", 0.0, 10, 0.2, 8.0), ("vanilla", 0.8, 2, 0.3, 2.0))
        for scene in range(4)
    ]  # fmt: skip
    full, reused = summarize(rows)
    assert full["nmse_truth"] == pytest.approx(0.35)
    assert [reused["loss"], reused["loss_low"]] == pytest.approx([0.1, 0.1])
    assert (reused["speed_up"], reused["fewer_evaluations"], reused["ms_per_map"]) == (4.0, 5.0, 2.0)


def test_bad_input(
    model: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], bundled: Path
) -> None:
    def refused(**options: Any) -> str:
        with pytest.raises(typer.Exit, match="2"):
            experiment(tmp_path, model, **options)
        return " ".join(capsys.readouterr().err.split())

    assert "`experiments` must be some of S1, S2, S3, none twice, got 'S1,S4'" in refused(experiments="S1,S4")
    assert "`modes` must be some of vanilla, two-stage, none twice" in refused(modes="vanilla,switch")
    assert "`ratios` must be numbers in [0, 1), none twice" in refused(ratios="0.5,1")
    assert "`ratios` must have one above 0, got '0'" in refused(ratios="0")
    assert "`reuse_ratio` must leave m" in refused(ratios="0.98")
    assert "`num_steps` must be integers in 2 … 10000" in refused(num_steps="4,1")
    assert "`blocks` must be a positive integer, or one for each T, got '1,2'" in refused(blocks="1,2")
    assert "`strip_scene` must be less than `batch_size`, 10, got 10" in refused(strip_scene=10)
    assert "`--model` must be a model of radio maps, whose network sees an image" in refused(model=str(bundled))
    shutil.copytree(finished / "work", tmp_path / "other")
    message = refused(work=tmp_path / "other", seed=1)
    assert "`--work` must be a folder of runs of this seed, 1, got " in message
    assert not (tmp_path / "out").exists()
