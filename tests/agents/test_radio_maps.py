"""Radio maps in frames, figures, reports and scores, with a tiny model; all other images stay as they are."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from numpy.typing import NDArray
from typer.testing import CliRunner

import agents
import refine_env
from agents import evaluate
from agents.figures import draw_all
from agents.record import record_episode
from agents.report import main as report
from agents.studies.coverage import USABLE, read_coverage
from agents.studies.images import ImageScorer, decode, open_decoder, read_tiles
from agents.studies.timeline import read_timelines
from refine_env import TrajectoryCache
from refine_env.evaluation import EPISODE_COLUMNS, read_table, roll_out
from refine_env.metrics import MapTask, coverage_iou
from refine_env.radiomap import PowerScale, color_bar
from refine_env.render.decoder import pictures_of, scale_of
from refine_env.trajectories import generate_diffusers
from refine_env.trajectories.conditions import Conditions
from tests.processes import run
from tests.trajectories.models import save_map_model

pytest.importorskip("matplotlib")
pytest.importorskip("diffusers")
pytest.importorskip("plotly")

NUMBER, STEPS = 4, 6
SCALE = PowerScale(-134.0, -54.0)
TABLE = {tuple(color) for color in np.rint(255 * color_bar()[:, 0]).astype(int).tolist()}
GRAY = (153, 153, 153)


def scenes() -> Conditions:
    """Two scenes of two transmitters each, with a building in the upper left corner of the first."""
    planes = np.zeros((NUMBER, 3, 8, 8), np.float16)
    planes[:2, 0, :3, :2] = 1.0
    planes[2:, 1, 5, 5] = 1.0
    planes[np.arange(NUMBER), 2, 4, np.arange(NUMBER)] = 1.0
    truth = np.full((NUMBER, 8, 8), 200, np.uint8)
    return Conditions(values=planes, names=tuple(f"scene {k}" for k in range(NUMBER)), truth=truth)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_map_model(tmp_path_factory.mktemp("maps"))


@pytest.fixture(scope="module")
def cache(model: Path) -> TrajectoryCache:
    return generate_diffusers(
        model.parent / "cache", model, None, conditions=scenes(), num_steps=STEPS, guidance_scale=1.0, batch_size=4
    )  # fmt: skip


@pytest.fixture
def words(cache: TrajectoryCache, model: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    """Of a command; the cache's model is found by its name."""
    monkeypatch.chdir(model.parent)
    return ("--cache", cache.path, "--episodes", "3", "--workers", "1", "--deadline", "9", "--snr-db", "6,18")


def colors_of(pictures: NDArray[np.uint8]) -> set[tuple[int, ...]]:
    return set(map(tuple, pictures.reshape(-1, 3).tolist()))


def test_the_cache_keeps_the_truth(cache: TrajectoryCache) -> None:
    assert cache.truth is not None
    np.testing.assert_array_equal(cache.truth, scenes().truth)
    assert TrajectoryCache.open("default").truth is None


def test_only_a_map_is_colored(cache: TrajectoryCache, model: Path) -> None:
    decoder = open_decoder(cache, str(model))
    assert scale_of(decoder) == SCALE
    images = decode(decoder, np.stack([cache.latents(k)[0] for k in range(NUMBER)]))
    pictures = pictures_of(images, decoder, cache, range(NUMBER))
    assert colors_of(np.rint(255 * pictures[:2, :3, :2]).astype(np.uint8)) == {GRAY}
    assert colors_of(np.rint(255 * pictures[2:]).astype(np.uint8)) <= TABLE
    assert len(colors_of(np.rint(255 * pictures).astype(np.uint8))) > 20

    def plain(latents: Any) -> NDArray[np.float32]:
        return decoder(latents)

    assert scale_of(plain) is None
    assert scale_of(open_decoder(TrajectoryCache.open("default"))) is None
    assert pictures_of(images, plain, cache, range(NUMBER)) is images
    decoder.scale = None
    assert pictures_of(images, decoder, cache, range(NUMBER)) is images


def test_scores_are_those_of_what_the_device_shows(cache: TrajectoryCache, model: Path) -> None:
    decoder = open_decoder(cache, str(model))
    task = MapTask(decoder.scale or SCALE)
    seen: list[NDArray[np.float32]] = []
    scorer = ImageScorer(cache, decoder, {"task": task})

    def score(rows: Any, latents: NDArray[np.float32]) -> Any:
        seen.append(latents.copy())
        return scorer(rows, latents)

    rows = roll_out(
        partial(agents.make, "persistent-q3"),
        env_kwargs={"cache": str(cache.path), "split": "all", "deadline": 7, "snr_db": 12.0},
        episodes=5,
        score=score,
    )
    held = decode(decoder, np.concatenate(seen).reshape(-1, *cache.latent_shape))
    clean = decode(decoder, np.stack([cache.latents(k)[0] for k in range(NUMBER)]))
    for row, image in zip(rows, held, strict=True):
        k = row["trajectory"]
        other = {0: 1, 1: 0, 2: 3, 3: 2}[k]
        truth = np.full((1, 8, 8, 3), 200 / 255)
        assert row["task_coverage"] == coverage_iou(clean[[k]], image[None], 0.5)[0]
        assert row["task_truth"] == coverage_iou(truth, image[None], 0.5)[0]
        covered = (clean[k] >= 0.5) | (clean[other] >= 0.5)
        right = (clean[k] > clean[other]) == (image > clean[other])
        assert row["task_transmitter"] == pytest.approx(right[covered].mean())
    assert 0.0 < min(row["task_coverage"] for row in rows) < 1.0


def test_frames(cache: TrajectoryCache, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clean picture is a map with its building, and beside it is the scale; frames without one are as before."""
    monkeypatch.chdir(model.parent)
    kwargs = {"cache": str(cache.path), "split": "all", "deadline": 3, "snr_db": 12.0}
    frames = record_episode("persistent-q3", seed=0, trajectory=0, env_kwargs=kwargs)
    clean, bar = frames[-1][335:509, 725:899], frames[-1][122:298, 912:916]
    assert GRAY in colors_of(clean[:60, :40])
    assert len(colors_of(bar) & TABLE) > 100
    assert (bar[0].mean(axis=0)[:2] > 200).all()  # the most power, yellow, is above
    decoder = open_decoder(cache, str(model))
    monkeypatch.setattr("refine_env.render.viewer.find_decoder", lambda *_: (lambda latents: decoder(latents), ""))
    plain = record_episode("persistent-q3", seed=0, trajectory=0, env_kwargs=kwargs)[-1]
    assert (plain[110:330, 905:960] == 255).all()
    assert {len({*shade}) for shade in colors_of(plain[335:509, 725:899])} == {1}
    outside = np.ones(plain.shape[:2], bool)
    outside[110:520, 715:960] = False
    np.testing.assert_array_equal(plain[outside], frames[-1][outside])


def test_evaluation(words: tuple[object, ...], cache: TrajectoryCache, tmp_path: Path) -> None:
    """Tables, strip and report; a wrong metric is refused as ever."""
    out = tmp_path / "out"
    run(
        evaluate.main, *words, "--agents", "persistent-q3,final-only", "--split", "all", "--images", "--metrics",
        "psnr,task", "--html", "--out", out,
    )  # fmt: skip
    columns = {**EPISODE_COLUMNS, "task_coverage": float, "task_transmitter": float, "task_truth": float}
    rows = read_table(out / "episodes.csv", columns)
    assert all(0.0 <= row[name] <= 1.0 for row in rows for name in list(columns)[-3:])
    assert {"strip.png", "fig3b.png"} <= {path.name for path in out.iterdir()}
    tiles, clean, prompt, scale = read_tiles(out / "images.npz")
    assert scale == SCALE
    assert prompt.startswith("scene ")
    assert colors_of(clean) <= TABLE | {GRAY}
    assert colors_of(tiles[0]["image"]) <= TABLE | {GRAY}
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Received power: -134 dBm" in page
    before = page.count("data:image/png")
    run(report, out, "--images", "--out", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8").count("data:image/png") == before


def test_timeline(words: tuple[object, ...], tmp_path: Path) -> None:
    run(evaluate.main, *words, "--study", "fig1", "--split", "all", "--episodes", "1", "--out", tmp_path)
    timelines = read_timelines(tmp_path)
    assert {one.scale for one in timelines} == {SCALE}
    assert all(colors_of(image) <= TABLE | {GRAY} for one in timelines for image in one.images.values())
    assert (tmp_path / "fig1.png").stat().st_size > 1000


def test_the_study_of_coverage(words: tuple[object, ...], tmp_path: Path) -> None:
    said = run(
        evaluate.main, *words, "--study", "coverage", "--split", "all", "--reuse-ratios", "0,0.5", "--snr-db", "12",
        "--out", tmp_path,
    )  # fmt: skip
    assert "least deadline in slots with a mean coverage of 0.9, dp" in " ".join(said.split())
    table, maps = read_coverage(tmp_path)
    assert [(r["agent"], r["ratio"], r["step"], r["shared"]) for r in table] == [
        (policy, *start)
        for policy in ("lookahead", "dp")
        for start in ((0.0, 6, "no"), (0.5, 3, "no"), (0.5, 3, "yes"))
    ]
    for row in table:
        assert row["task_coverage_low"] <= row["task_coverage"] <= row["task_coverage_high"]
        assert row["task_coverage"] >= USABLE
        assert row["deadline_low"] <= row["deadline"] <= row["deadline_high"]
        assert 0.0 <= row["task_truth"] <= 1.0
    assert table[0]["deadline"] - table[1]["deadline"] == table[1]["sooner"]
    assert maps is not None
    assert maps.scale == SCALE
    assert maps.coverage.shape == maps.pictures.shape[:2] == (3, len(maps.deadlines))
    assert colors_of(maps.pictures) | colors_of(maps.truth) | colors_of(maps.clean) <= TABLE | {GRAY}
    assert [path.name for path in draw_all(tmp_path, tmp_path / "again")] == ["coverage.png", "coverage.pdf"]
    (tmp_path / "coverage.npz").write_bytes(b"nothing")
    with pytest.raises(refine_env.ConfigurationError, match=r"`coverage\.npz` must hold the maps of an episode, got"):
        read_coverage(tmp_path)


def test_images_have_no_coverage(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(evaluate.main)
    result = CliRunner().invoke(app, ["--study", "coverage", "--episodes", "1", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith("error: `cache` must hold radio maps, got 'default', whose model")
