"""Decoded images of an evaluation: what is decoded, what is scored, what is kept, and the command."""

from __future__ import annotations

import csv
import json
import shutil
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import typer
from numpy.typing import ArrayLike, NDArray

import agents
import refine_env
from agents import evaluate as evaluate_module
from agents.evaluate import evaluate
from agents.studies import images as images_module
from agents.studies.images import ImageScorer, decode, open_decoder, open_metrics, read_tiles
from refine_env import CacheError, ConfigurationError, MissingExtraError, TrajectoryCache
from refine_env.evaluation import (
    EPISODE_COLUMNS,
    IMAGE_COLUMNS,
    SUMMARY_COLUMNS,
    Table,
    bootstrap_interval,
    episode_columns,
    read_table,
    roll_out,
    summarize,
    summary_columns,
    write_table,
)
from refine_env.metrics import MAX_PSNR_DB, psnr, shrink, ssim
from tests.trajectories.manifests import read_values, write_values

pytest.importorskip("skimage")
METRICS = {"psnr": psnr, "ssim": ssim}
NAMES = ("lookahead", "persistent-q8", "final-only")


class StandInDecoder:
    """Latents (N, 4, 8, 8) to images of 32 × 32 pixels; counts, leaving out padding, what it decodes."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.decoded = 0

    def __call__(self, latents: ArrayLike) -> NDArray[np.float32]:
        values = np.asarray(latents, dtype=np.float32)
        self.batches.append(len(values))
        self.decoded += int((values != 0.0).any(axis=(1, 2, 3)).sum())
        pixels = 1.0 / (1.0 + np.exp(-values[:, :3]))
        return np.repeat(np.repeat(pixels, 4, axis=2), 4, axis=3).transpose(0, 2, 3, 1)


@pytest.fixture
def cache(gaussian_cache: Path) -> TrajectoryCache:
    return TrajectoryCache.open(gaussian_cache)


@pytest.fixture
def scorer(cache: TrajectoryCache) -> ImageScorer:
    return ImageScorer(cache, StandInDecoder(), METRICS)


def play(cache: TrajectoryCache, scorer: ImageScorer | None, *, snrs: tuple[float, ...] = (6.0,), n: int = 6) -> Table:
    return evaluate(NAMES, snrs, episodes=n, seed=4, env_kwargs={"cache": str(cache.path)}, score=scorer)


def test_scores_are_those_of_what_the_device_holds(cache: TrajectoryCache, scorer: ImageScorer) -> None:
    """Each episode replayed alone, decoded alone, and compared with the clean latent of its trajectory."""
    rows = [row for row in play(cache, scorer) if row["agent"] != "final-only"]
    decoder = StandInDecoder()
    assert len({row["psnr_db"] for row in rows}) > 6
    for row in rows[::2]:
        env = gym.make(refine_env.ENV_ID, split="test", cache=str(cache.path), snr_db=6.0)
        agent = agents.make(row["agent"], env.unwrapped.config)  # type: ignore[attr-defined]
        observation, info = env.reset(seed=row["seed"])
        terminated = False
        while not terminated:
            observation, _, terminated, _, info = env.step(agent.select_action(observation, info))
        held = env.unwrapped._process.episodes.device[0]  # type: ignore[attr-defined]
        pair = [decoder(x.reshape(1, 4, 8, 8)) for x in (cache.latents(row["trajectory"])[0], held)]
        assert row["psnr_db"] == pytest.approx(psnr(*pair)[0], rel=1e-6)
        assert row["ssim"] == pytest.approx(ssim(*pair)[0], rel=1e-6)
        assert row["lpips"] is None


def test_the_task_fills_two_columns_where_it_is_asked_for(cache: TrajectoryCache, tmp_path: Path) -> None:
    """A gallery of the clean samples themselves, in two groups: recognized is what is delivered well."""
    decoder = StandInDecoder()
    thumbnails = np.rint(255 * shrink(decoder(np.stack([cache.latents(i)[0] for i in range(len(cache))])), 8))
    names = np.array([f"sample {i}" for i in range(len(cache))])
    groups = np.array(["even", "odd"] * (len(cache) // 2))
    np.savez(tmp_path / "g.npz", thumbnails=thumbnails.astype(np.uint8), prompts=names, groups=groups)
    metrics, missing = open_metrics(("task",), gallery=tmp_path / "g.npz")
    assert missing == []
    rows = play(cache, ImageScorer(cache, decoder, metrics, image_episodes=5), snrs=(3.0, 9.0))
    plain = play(cache, None, snrs=(3.0, 9.0))
    assert [{key: row[key] for key in other} for row, other in zip(rows, plain, strict=True)] == plain
    scored = [row for row in rows if row["episode"] < 5]
    assert {row["task_glyph"] for row in rows if row["episode"] == 5} == {None}
    assert {(row["task_glyph"], row["task_group"]) for row in scored} >= {(0.0, 0.0), (1.0, 1.0)}
    assert all(row["task_glyph"] <= row["task_group"] for row in scored)
    assert {row["task_glyph"] for row in scored if row["latent_mse"] < 0.01} == {1.0}
    summary = summarize(rows)
    assert {"task_glyph", "task_group_low", "task_group_high"} <= set(summary_columns(summary))
    assert [row["scored_episodes"] for row in summary] == [5] * 6
    for path, table, columns in (
        (tmp_path / "episodes.csv", rows, episode_columns(rows)),
        (tmp_path / "summary.csv", summary, summary_columns(summary)),
    ):
        write_table(path, table, columns)
        assert read_table(path, columns) == [{name: row[name] for name in columns} for row in table]


def test_nothing_but_the_columns_changes(cache: TrajectoryCache, scorer: ImageScorer) -> None:
    plain = play(cache, None)
    assert all(row[name] is None for row in plain for name in IMAGE_COLUMNS)
    scored = play(cache, scorer)
    assert [{**row, **dict.fromkeys(IMAGE_COLUMNS)} for row in scored] == plain


def test_the_clean_latent_scores_as_identical(cache: TrajectoryCache, scorer: ImageScorer) -> None:
    rows = play(cache, scorer, snrs=(30.0,))
    exact = [row for row in rows if row["latent_mse"] == 0.0]
    assert len(exact) >= 6
    assert {(row["psnr_db"], row["ssim"]) for row in exact} == {(MAX_PSNR_DB, 1.0)}


def test_equal_latents_are_decoded_once(cache: TrajectoryCache) -> None:
    """Final-Only at 0 dB delivers nothing: as many images as trajectories, and as many references."""
    decoder = StandInDecoder()
    scorer = ImageScorer(cache, decoder, METRICS)
    calls = []
    scorer.progress = lambda: calls.append(scorer.num_images)
    for _ in range(2):
        rows = evaluate(
            ("final-only",), (0.0,), episodes=40, seed=0, env_kwargs={"cache": str(cache.path)}, score=scorer
        )
    distinct = len({row["trajectory"] for row in rows})
    assert scorer.num_images == distinct < 40
    assert decoder.decoded == 2 * distinct
    assert calls[-1] == distinct
    assert len({row["psnr_db"] for row in rows}) == distinct


def test_the_same_bytes_on_another_trajectory_are_another_image(cache: TrajectoryCache, scorer: ImageScorer) -> None:
    row = {"agent": "a", "snr_db": 0.0, "coder": "forward", "payload": "latent", "episode": 0}
    held = np.tile(cache.latents(0)[0].reshape(-1).astype(np.float32), (2, 1))
    first, second = scorer([{**row, "trajectory": 0}, {**row, "trajectory": 1}], held)
    assert first["psnr_db"] == MAX_PSNR_DB
    assert second["psnr_db"] is not None
    assert second["psnr_db"] < 40.0


@pytest.mark.parametrize("decision_epochs", [False, True])
def test_batches_and_decision_epochs_change_no_score(cache: TrajectoryCache, decision_epochs: bool) -> None:
    """With decision epochs episodes of a batch end at different steps, and the next ones begin there."""
    tables = [
        roll_out(
            partial(agents.make, "persistent-q4"),
            env_kwargs={"cache": str(cache.path), "snr_db": 9.0, "decision_epochs": decision_epochs},
            episodes=9,
            batch_size=size,
            score=ImageScorer(cache, StandInDecoder(), METRICS),
        )
        for size in (1, 4, 100)
    ]
    assert tables[0] == tables[1] == tables[2]
    plain = roll_out(
        partial(agents.make, "persistent-q4"),
        env_kwargs={"cache": str(cache.path), "snr_db": 9.0},
        episodes=9,
        score=ImageScorer(cache, StandInDecoder(), METRICS),
    )
    assert tables[0] == plain


def test_only_the_first_episodes_are_scored(cache: TrajectoryCache) -> None:
    decoder = StandInDecoder()
    rows = play(cache, ImageScorer(cache, decoder, METRICS, image_episodes=2))
    assert [row["episode"] for row in rows if row["psnr_db"] is not None] == [0, 1] * len(NAMES)
    trajectories = {row["trajectory"] for row in rows if row["episode"] < 2}
    assert decoder.decoded <= len(trajectories) + 2 * len(NAMES)
    for message, value in (("got 0", 0), ("got 1.5", 1.5)):
        with pytest.raises(ConfigurationError, match=f"`image_episodes` must be an integer >= 1, {message}"):
            ImageScorer(cache, decoder, METRICS, image_episodes=value)  # type: ignore[arg-type]


def test_references_that_were_dropped_are_decoded_again(
    cache: TrajectoryCache, scorer: ImageScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = play(cache, scorer)
    monkeypatch.setattr(images_module, "_REFERENCE_BYTES", 2 * 32 * 32 * 3 * 4)
    small = ImageScorer(cache, StandInDecoder(), METRICS)
    assert play(cache, small) == expected
    assert len(small._references) == 2


def test_decoding_is_in_batches_of_one_size() -> None:
    decoder = StandInDecoder()
    latents = np.random.default_rng(0).normal(size=(35, 4, 8, 8)).astype(np.float32)
    images = decode(decoder, latents)
    assert images.shape == (35, 32, 32, 3)
    assert decoder.batches == [16, 16, 16]
    assert np.array_equal(images[34], StandInDecoder()(latents[34:])[0])
    large = StandInDecoder()
    decode(large, np.ones((3, 4, 64, 64)))
    assert large.batches == [4]  # as many values at once, not as many images


def test_summaries_have_means_and_intervals(cache: TrajectoryCache) -> None:
    rows = play(cache, ImageScorer(cache, StandInDecoder(), METRICS, image_episodes=5), n=8)
    for group in summarize(rows):
        values = np.array([row["ssim"] for row in rows if row["agent"] == group["agent"] and row["ssim"] is not None])
        assert (group["episodes"], group["scored_episodes"]) == (8, 5)
        assert group["ssim"] == pytest.approx(values.mean())
        assert (group["ssim_low"], group["ssim_high"]) == bootstrap_interval(values)
        assert (group["lpips"], group["lpips_low"], group["lpips_high"]) == (None, None, None)


def test_tables_with_empty_cells_survive_the_disk(cache: TrajectoryCache, tmp_path: Path) -> None:
    rows = play(cache, ImageScorer(cache, StandInDecoder(), METRICS, image_episodes=2))
    for name, table, columns in (
        ("episodes.csv", rows, EPISODE_COLUMNS),
        ("summary.csv", summarize(rows), SUMMARY_COLUMNS),
    ):
        write_table(tmp_path / name, table, columns)
        assert read_table(tmp_path / name, columns) == table


def test_tables_from_before_the_images_are_read(cache: TrajectoryCache, tmp_path: Path) -> None:
    rows = play(cache, None)
    old = {name: kind for name, kind in EPISODE_COLUMNS.items() if name not in IMAGE_COLUMNS}
    write_table(tmp_path / "episodes.csv", rows, old)
    assert read_table(tmp_path / "episodes.csv", EPISODE_COLUMNS) == rows
    before = list(SUMMARY_COLUMNS)[: list(SUMMARY_COLUMNS).index("scored_episodes")]
    write_table(tmp_path / "summary.csv", summarize(rows), {name: SUMMARY_COLUMNS[name] for name in before})
    expected = [{**row, "scored_episodes": None} for row in summarize(rows)]
    assert read_table(tmp_path / "summary.csv", SUMMARY_COLUMNS) == expected


def test_a_row_cut_short_is_not_an_empty_cell(cache: TrajectoryCache, tmp_path: Path) -> None:
    write_table(tmp_path / "episodes.csv", play(cache, None), EPISODE_COLUMNS)
    text = (tmp_path / "episodes.csv").read_text()
    (tmp_path / "episodes.csv").write_text(text.rstrip("\n").rstrip(","))
    with pytest.raises(ConfigurationError, match="right kind in every column"):
        read_table(tmp_path / "episodes.csv", EPISODE_COLUMNS)


class TestTiles:
    def test_they_are_what_the_policies_show(self, cache: TrajectoryCache, tmp_path: Path) -> None:
        scorer = ImageScorer(cache, StandInDecoder(), METRICS, tile_episodes=2)
        rows = play(cache, scorer, snrs=(0.0, 30.0))
        scorer.write_tiles(tmp_path / "images.npz")
        for episode in (0, 1):
            tiles, clean, prompt, scale = read_tiles(tmp_path / "images.npz", episode)
            assert scale is None
            assert prompt == ""  # ideal trajectories have none
            assert [(tile["agent"], tile["snr_db"], tile["coder"]) for tile in tiles] == [
                (row["agent"], row["snr_db"], row["coder"]) for row in rows if row["episode"] == episode
            ]
            trajectory = next(row["trajectory"] for row in rows if row["episode"] == episode)
            latents = cache.latents(trajectory)
            expected = [np.rint(StandInDecoder()(x[None])[0] * 255) for x in (latents[0], latents[-1])]
            assert np.array_equal(clean, expected[0])
            shown = {(tile["agent"], tile["snr_db"]): tile["image"] for tile in tiles}
            assert shown["final-only", 0.0].dtype == np.uint8
            assert np.array_equal(shown["final-only", 0.0], expected[1])
            assert np.array_equal(shown["final-only", 30.0], expected[0])

    def test_an_image_scored_for_a_later_episode_is_kept_for_an_early_one(
        self, cache: TrajectoryCache, tmp_path: Path
    ) -> None:
        row = {"agent": "a", "snr_db": 0.0, "coder": "forward", "payload": "latent", "trajectory": 3}
        scorer = ImageScorer(cache, StandInDecoder(), METRICS, tile_episodes=1)
        held = cache.latents(3)[5].reshape(1, -1).astype(np.float32)
        scorer([{**row, "episode": 7}], held)
        scorer([{**row, "episode": 0}], held)
        scorer.write_tiles(tmp_path / "images.npz")
        tiles, *_ = read_tiles(tmp_path / "images.npz")
        assert np.array_equal(tiles[0]["image"], np.rint(StandInDecoder()(cache.latents(3)[5:6])[0] * 255))

    def test_the_same_images_give_the_same_bytes(self, cache: TrajectoryCache, tmp_path: Path) -> None:
        for name in ("a.npz", "b.npz"):
            scorer = ImageScorer(cache, StandInDecoder(), METRICS)
            play(cache, scorer)
            scorer.write_tiles(tmp_path / name)
        assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()

    def test_files_that_are_none(self, cache: TrajectoryCache, scorer: ImageScorer, tmp_path: Path) -> None:
        path = tmp_path / "images.npz"
        with pytest.raises(ConfigurationError, match=r"`images.npz` must hold the images of an evaluation, got .*No"):
            read_tiles(path)
        for content in (b"", b"no archive"):
            path.write_bytes(content)
            with pytest.raises(ConfigurationError, match=r"must hold the images of an evaluation.*evaluate --images"):
                read_tiles(path)
        np.savez(path, other=np.zeros(2))
        with pytest.raises(ConfigurationError, match="must hold the images of an evaluation.*KeyError"):
            read_tiles(path)
        play(cache, scorer)
        scorer.write_tiles(path)
        with pytest.raises(ConfigurationError, match="`episode` must be one whose images are kept, 0, 1, 2, 3, got 4"):
            read_tiles(path, 4)


class TestMetrics:
    def test_names(self) -> None:
        assert open_metrics(("psnr", "ssim")) == (METRICS, [])
        with pytest.raises(
            ConfigurationError, match="`metrics` must be one of 'psnr', 'ssim', 'lpips', 'task', got 'mse'"
        ):
            open_metrics(("psnr", "mse"))
        with pytest.raises(ConfigurationError, match="`metrics` must leave out 'task' where no model is known"):
            open_metrics(("psnr", "task"))
        with pytest.raises(ConfigurationError, match="`gallery` must be the file of .*, got no file at none"):
            open_metrics(("task",), gallery=Path("none.npz"))

    def test_what_is_missing_is_said_and_the_rest_is_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in ("skimage", "lpips"):
            monkeypatch.setitem(sys.modules, module, None)
        metrics, missing = open_metrics(("psnr", "ssim", "lpips"))
        assert list(metrics) == ["psnr"]
        assert [sentence.split(":")[0] for sentence in missing] == ["No SSIM", "No LPIPS"]
        assert "refine-env[images]" in missing[0]
        assert "refine-env[perceptual]" in missing[1]

    def test_missing_weights_are_said_but_given_ones_have_to_be_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(weights: Any, device: str) -> None:
            raise images_module.MissingWeightsError("`lpips_weights` must be the file")

        monkeypatch.setattr(images_module, "LPIPS", fail)
        assert open_metrics(("lpips",)) == ({}, ["No LPIPS: `lpips_weights` must be the file"])
        with pytest.raises(ConfigurationError, match="`lpips_weights` must be the file"):
            open_metrics(("lpips",), Path("mine.pth"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as far as decoding reads it, with a decoder of random weights: (4, 8, 8) to 32 × 32 pixels."""
    torch = pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("models") / "small"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        diffusers = pytest.importorskip("diffusers")
        pytest.importorskip("transformers")
        torch.manual_seed(0)
        diffusers.AutoencoderKL(
            block_out_channels=(8, 8, 8),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            norm_num_groups=4,
            latent_channels=4,
            sample_size=32,
        ).save_pretrained(folder / "vae")
    parts = ("unet", "tokenizer", "text_encoder", "scheduler")
    index = {"_class_name": "StableDiffusionPipeline", "vae": ["diffusers", "AutoencoderKL"]}
    (folder / "model_index.json").write_text(json.dumps({**index, **{part: ["some", "Class"] for part in parts}}))
    return folder


@pytest.fixture
def model_cache(model: Path, gaussian_cache: Path, tmp_path: Path) -> Path:
    """The Gaussian cache, whose manifest claims that the model drew it."""
    from refine_env.trajectories.pipeline import LatentDecoder

    folder = tmp_path / "cache"
    shutil.copytree(gaussian_cache, folder)
    manifest = read_values(folder)
    manifest["model"] = {"id": "small", "revision": LatentDecoder(model).revision}
    for trajectory in manifest["trajectories"]:
        trajectory["prompt"] = "a small thing"
    write_values(folder, manifest)
    return folder


class TestDecoder:
    def test_a_cache_without_a_model(self, cache: TrajectoryCache) -> None:
        with pytest.raises(ConfigurationError, match="`cache` must hold latents of a model .* source is 'gaussian'"):
            open_decoder(cache)

    def test_it_decodes_the_cache_s_latents(self, model: Path, model_cache: Path) -> None:
        cache = TrajectoryCache.open(model_cache)
        decoder = open_decoder(cache, str(model))
        assert decoder.model_id == "small"
        images = decode(decoder, cache.latents(0)[:2].astype(np.float32))
        assert images.shape == (2, 32, 32, 3)
        assert 0.0 <= images.min() < images.max() <= 1.0

    def test_the_model_has_to_be_the_cache_s(self, model: Path, model_cache: Path, tmp_path: Path) -> None:
        other = shutil.copytree(model, tmp_path / "small")
        config = json.loads((other / "vae" / "config.json").read_text())
        (other / "vae" / "config.json").write_text(json.dumps({**config, "scaling_factor": 1.0}))
        with pytest.raises(CacheError, match=r"`model` must be the one that drew the cache 'cache', small of revision"):
            open_decoder(TrajectoryCache.open(model_cache), str(other))

    def test_a_model_that_is_not_here(self, model_cache: Path) -> None:
        with pytest.raises(
            CacheError, match="`model` must be a hub id, a local folder, 'emoji' or 'radiomap', got 'small'"
        ):
            open_decoder(TrajectoryCache.open(model_cache))

    def test_without_diffusers(self, model: Path, model_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "diffusers", None)
        with pytest.raises(MissingExtraError, match=r"refine-env\[generate\]"):
            open_decoder(TrajectoryCache.open(model_cache), str(model))


def run_main(out: Path, cache: Path, **options: Any) -> None:
    settings = {"agent_names": "persistent-q3,final-only", "snr_db": "0,30", "episodes": 3}
    evaluate_module.main(**settings, cache=str(cache), out=out, images=True, **options)  # type: ignore[arg-type]


class TestCommand:
    def test_images(self, model: Path, model_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        out = tmp_path / "out"
        run_main(out, model_cache, model=str(model), metrics="psnr,ssim", image_episodes=2)
        figures = {f"{name}.{suffix}" for name in ("fig3a", "fig3b", "strip") for suffix in ("png", "pdf")}
        assert {path.name for path in out.iterdir()} == {
            "episodes.csv", "summary.csv", "run.json", "images.npz", *figures,
        }  # fmt: skip
        rows = read_table(out / "episodes.csv", EPISODE_COLUMNS)
        assert [row["ssim"] is not None for row in rows] == [True, True, False] * 4
        exact = [row["psnr_db"] for row in rows if row["latent_mse"] == 0.0 and row["psnr_db"] is not None]
        assert exact == [MAX_PSNR_DB] * 2
        run = json.loads((out / "run.json").read_text())["images"]
        assert (run["metrics"], run["episodes"], run["lpips"]) == (["psnr", "ssim"], 2, None)
        assert run["model"] == json.loads((model_cache / "manifest.json").read_text())["model"]
        assert "fig3b has no panel for LPIPS" in capsys.readouterr().out
        assert read_tiles(out / "images.npz")[2] == "a small thing"
        with (out / "summary.csv").open() as file:
            assert all(row["lpips"] == "" and row["psnr_db"] for row in csv.DictReader(file))

    def test_an_evaluation_without_images_removes_those_of_another(self, gaussian_cache: Path, tmp_path: Path) -> None:
        (tmp_path / "images.npz").write_bytes(b"of an earlier evaluation")
        evaluate_module.main(
            agent_names="final-only", snr_db="0", episodes=2, cache=str(gaussian_cache), out=tmp_path, figures=False
        )
        assert not (tmp_path / "images.npz").exists()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "error: `cache` must hold latents of a model to be decoded"),
            ({"metrics": "psnr,psnr"}, "error: `--metrics` must be a comma-separated list without repetition"),
            ({"metrics": "mse"}, "error: `metrics` must be one of 'psnr', 'ssim', 'lpips', 'task', got 'mse'"),
        ],
    )
    def test_what_cannot_work_costs_no_episodes(
        self,
        gaussian_cache: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
        options: dict[str, Any],
        message: str,
    ) -> None:
        with pytest.raises(typer.Exit, match="2") as caught:
            run_main(tmp_path / "out", gaussian_cache, **{"metrics": "psnr", **options})
        assert caught.value.exit_code == 2
        assert capsys.readouterr().err.startswith(message)
        assert not (tmp_path / "out").exists()

    def test_without_diffusers(
        self,
        model: Path,
        model_cache: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.setitem(sys.modules, "diffusers", None)
        with pytest.raises(typer.Exit, match="4") as caught:
            run_main(tmp_path / "out", model_cache, model=str(model), metrics="psnr")
        assert caught.value.exit_code == 4
        assert "refine-env[generate]" in capsys.readouterr().err

    @pytest.mark.lpips
    def test_lpips(self, model: Path, model_cache: Path, tmp_path: Path) -> None:
        """With random weights: the code path, not a perceptual distance."""
        import torch
        import torchvision

        torch.save(torchvision.models.alexnet(weights=None).state_dict(), tmp_path / "random.pth")
        out = tmp_path / "out"
        run_main(out, model_cache, model=str(model), lpips_weights=tmp_path / "random.pth")
        rows = read_table(out / "episodes.csv", EPISODE_COLUMNS)
        assert all(row["lpips"] == 0.0 for row in rows if row["latent_mse"] == 0.0)
        assert all(row["lpips"] > 0.0 for row in rows if row["num_deliveries"] == 0)
        run = json.loads((out / "run.json").read_text())["images"]
        assert run["metrics"] == ["psnr", "ssim", "lpips"]
        assert run["lpips"]["net"] == "alex"
