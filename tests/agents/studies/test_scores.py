"""The scores: orders of policies by hand, intervals, what is left out without images, and the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import agents
from agents.evaluate import DEFAULT_AGENTS, main
from agents.figures import draw_all
from agents.studies import scores
from agents.studies.scores import POLICIES, measure_agreement, read_scores, summarize_scores
from refine_env.evaluation import Table

PUBLISHED = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}


def table(rng: np.random.Generator, episodes: int = 40, **by_score: dict[str, float]) -> Table:
    """Four policies at two SNRs, with the given means of the scores and a little noise that leaves the order alone."""
    rows: Table = []
    for snr_db in (0.0, 6.0):
        for agent, mse in PUBLISHED.items():
            for noise in rng.normal(0.0, 0.05, episodes):
                row = {
                    "agent": agent,
                    "snr_db": snr_db,
                    "coder": "forward",
                    "payload": "latent",
                    "latent_mse": mse + noise,
                }
                row |= {name: means[agent] + (noise if name != "ssim" else 0.0) for name, means in by_score.items()}
                rows.append(row)
    return rows


def test_orders_by_hand(rng: np.random.Generator) -> None:
    rows = table(
        rng,
        anytime_mse={"a": 4.0, "b": 3.0, "c": 2.0, "d": 1.0},  # the other way round
        psnr_db={"a": 40.0, "b": 30.0, "c": 20.0, "d": 10.0},  # more is better: the same order
        lpips={"a": 2.0, "b": 1.0, "c": 3.0, "d": 4.0},  # one pair of six exchanged: τ = (5 - 1)/6
        ssim={"a": 1.0, "b": 1.0, "c": 1.0, "d": 1.0},  # says nothing
        task_glyph={"a": 9.0, "b": 9.0, "c": 5.0, "d": 1.0},
    )
    for row in rows:
        row["task_glyph"] = round(row["task_glyph"])  # a tie of two in one of the orders: τ_b = 5/√(5·6)
    found = {(row["score"], row["snr_db"]): row for row in measure_agreement(rows, resamples=50)}
    assert {key[0] for key in found} == {"anytime_mse", "psnr_db", "lpips", "ssim", "task_glyph"}
    expected = {"anytime_mse": -1.0, "psnr_db": 1.0, "lpips": 2 / 3, "task_glyph": 5 / np.sqrt(30)}
    for name, tau in expected.items():
        for snr_db in (0.0, 6.0, None):
            row = found[name, snr_db]
            assert row["policies"] == 4
            assert row["kendall_tau"] == pytest.approx(tau)
            assert (row["kendall_tau_low"], row["kendall_tau_high"]) == pytest.approx((tau, tau))
    assert found["lpips", 0.0]["spearman_rho"] == pytest.approx(0.8)
    assert ("ssim", None) not in found
    assert found["ssim", 0.0]["kendall_tau"] is found["ssim", 0.0]["kendall_tau_low"] is None


def test_the_mean_over_the_snrs_and_what_is_not_significant(rng: np.random.Generator) -> None:
    """At 6 dB two neighbors differ by less than the noise: some resamples exchange them."""
    rows = table(rng, anytime_mse=PUBLISHED)
    for row in rows:
        if row["snr_db"] == 6.0 and row["agent"] == "b":
            row["anytime_mse"] = 1.001 + rng.normal(0.0, 0.05)
    found = {row["snr_db"]: row for row in measure_agreement(rows, resamples=100)}
    assert found[0.0]["kendall_tau_low"] == found[0.0]["kendall_tau"] == pytest.approx(1.0)
    assert found[6.0]["kendall_tau_low"] == pytest.approx(2 / 3)
    assert found[6.0]["kendall_tau_high"] == pytest.approx(1.0)
    assert found[None]["kendall_tau"] == pytest.approx((1.0 + found[6.0]["kendall_tau"]) / 2)
    assert found[None]["kendall_tau_low"] == pytest.approx(5 / 6)


def test_means_by_policy(rng: np.random.Generator) -> None:
    rows = table(rng, anytime_mse=PUBLISHED)
    cells = summarize_scores(rows)
    assert len(cells) == 8
    for cell in cells:
        own = [row["anytime_mse"] for row in rows if (row["agent"], row["snr_db"]) == (cell["agent"], cell["snr_db"])]
        assert cell["anytime_mse"] == pytest.approx(np.mean(own))
        assert cell["anytime_mse_low"] < cell["anytime_mse"] < cell["anytime_mse_high"]
        assert cell["ssim"] is cell["ssim_low"] is None


def test_the_policies_are_the_paper_s_and_the_optimum() -> None:
    assert {*DEFAULT_AGENTS, "dp"} <= set(POLICIES) <= set(agents.names())


def run_study(*arguments: str) -> str:
    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, ["--study", "scores", "--workers", "1", *arguments])
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_command_without_a_model(gaussian_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "POLICIES", ("lookahead", "persistent-q3", "persistent-q8", "dp"))
    arguments = ("--cache", str(gaussian_cache), "--split", "all", "--episodes", "12", "--snr-db", "6,12")
    said = run_study(*arguments, "--out", str(tmp_path / "out"))
    assert "No scores of images: `cache` must hold latents of a model" in said
    means, agreement = read_scores(tmp_path / "out")
    assert len(means) == 8
    assert [(row["score"], row["snr_db"]) for row in agreement] == [("anytime_mse", x) for x in (6.0, 12.0, None)]
    assert all(row["psnr_db"] is row["task_glyph"] is None for row in means)
    assert all(row["latent_mse_low"] <= row["latent_mse"] < row["anytime_mse"] for row in means)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["study"] == "scores"
    before = (tmp_path / "out" / "scores.png").read_bytes()
    assert [path.name for path in draw_all(tmp_path / "out", tmp_path / "again")] == ["scores.png", "scores.pdf"]
    assert (tmp_path / "again" / "scores.png").read_bytes() == before


def test_command_where_nothing_is_ever_delivered(
    gaussian_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All policies are on a level: no coefficient, and still a table and a figure."""
    monkeypatch.setattr(scores, "POLICIES", ("lookahead", "persistent-q3"))
    run_study(
        "--cache", str(gaussian_cache), "--episodes", "3", "--snr-db", "0", "--deadline", "3", "--out", str(tmp_path)
    )
    _, agreement = read_scores(tmp_path)
    assert [row["kendall_tau"] for row in agreement] == [None]
    assert (tmp_path / "scores.png").is_file()


def test_what_images_need_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    pytest.importorskip("diffusers")
    said: list[str] = []
    scorer = scores.open_image_scores("default", said.append)
    assert scorer is not None
    assert {"psnr", "ssim", "task"} <= set(scorer._metrics)
    monkeypatch.setattr(scores, "gallery_path", lambda model: model / "none.npz")
    without: list[str] = []
    scorer = scores.open_image_scores("default", without.append)
    assert scorer is not None
    assert "task" not in scorer._metrics
    assert any(sentence.startswith("No task: there is no gallery of the model's glyphs at") for sentence in without)
    monkeypatch.setitem(sys.modules, "torch", None)
    assert scores.open_image_scores("default", said.append) is None
    assert said[-1].startswith("No scores of images: `torch` must be installed")
