"""The study of learning: its statistics by hand, and a tiny one from training to figure."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refine_env import ConfigurationError
from refine_env.evaluation import read_table

for module in ("torch", "stable_baselines3", "sb3_contrib", "tensorboard"):
    pytest.importorskip(module, reason="the train extra is not installed")
pytest.importorskip("matplotlib", reason="the plot extra is not installed")

from train.rl import study  # noqa: E402
from train.rl.config import Config  # noqa: E402
from train.rl.evaluation import MSE_FLOOR  # noqa: E402


def test_iqm_by_hand() -> None:
    assert study.iqm(np.array([100.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, -50.0])) == pytest.approx((2 + 3 + 4 + 5) / 4)


def test_the_interval_covers_and_is_stratified() -> None:
    rng = np.random.default_rng(0)
    # SNRs differ by far more than seeds: an interval that resampled SNRs would be far wider.
    strata = np.linspace(-5.0, 5.0, 9)
    hits = 0
    for trial in range(200):
        scores = strata + rng.normal(0.0, 0.1, (10, 9))
        low, high = study.bootstrap_interval(scores, resamples=400, seed=trial)
        assert high - low < 0.2
        hits += low <= 0.0 <= high
    assert hits >= 160  # 95 % nominal; the percentile bootstrap of ten seeds covers a little less
    assert study.bootstrap_interval(scores, seed=1) == study.bootstrap_interval(scores, seed=1)
    assert study.bootstrap_interval(scores, seed=1) != study.bootstrap_interval(scores, seed=2)


def rows(**means: float) -> list[dict[str, Any]]:
    return [{"snr_db": 6.0, "agent": name.replace("_", "-"), "latent_mse": mse} for name, mse in means.items()]


def test_normalized_scores_by_hand() -> None:
    floor = MSE_FLOOR
    scores = study.normalized_scores(
        rows(learned=1e-2 - floor, dp=1e-3 - floor, persistent_q3=0.5, persistent_q8=1e-1 - floor)
    )[6.0]
    assert scores["score"] == pytest.approx(0.5)  # one decade of two
    assert scores["ratio"] == pytest.approx(10.0)
    assert math.isnan(study.normalized_scores(rows(learned=0.0, dp=0.0, persistent_q16=0.0))[6.0]["score"])


def test_a_score_wants_its_two_ends() -> None:
    for told in (rows(learned=1e-2, dp=1e-3), rows(learned=1e-2, persistent_q3=0.5)):
        with pytest.raises(ConfigurationError, match=r"`--runs` must hold runs .* dp and a Persistent-Q, got \['"):
            study.normalized_scores(told)


def test_a_small_study(gaussian_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = Config(
        cache=str(gaussian_cache),
        total_steps=256,
        num_envs=8,
        rollout_steps=16,
        batch_size=64,
        epochs=1,
        actor="8",
        critic="8",
        eval_every=128,
        eval_episodes=2,
        test_episodes=3,
        eval_snr_db="6,9",
        rivals="dp,persistent-q3,persistent-q4",
        progress=False,
        tensorboard=False,
    )
    names = ["maskable-ppo", "one-hot"]
    study.run_variants(tmp_path / "runs", names, 2, base, workers=2)
    trained: list[Any] = []
    monkeypatch.setattr(study, "train", trained.append)
    study.run_variants(tmp_path / "runs", names, 2, base)
    assert trained == []  # what is there is not trained again
    for changes, what in (({"learning_rate": 0.5}, "learning_rate 0.0013 in place of 0.5"), ({"eval_seed": 7}, "eval")):
        with pytest.raises(ConfigurationError, match=rf"`--runs` must hold runs with the same options, got .*{what}"):
            study.run_variants(tmp_path / "runs", names, 2, replace(base, **changes))
    runs, variants, curves = study.summarize_runs(tmp_path / "runs", names)
    assert [(row["variant"], row["seeds"]) for row in variants] == [(name, 2) for name in names]
    assert len(runs) == 2 * 2 * 2
    for row in variants:
        assert row["ci_low"] <= row["iqm"] <= row["ci_high"]
        assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
        own = [run["ratio"] for run in runs if run["variant"] == row["variant"]]
        assert row["ratio"] == pytest.approx(math.exp(np.mean(np.log(own))))
        assert row["worst_ratio"] >= row["ratio"] > 0.0
    assert [row["steps"] for row in curves["one-hot"]] == [128, 256]
    for row in curves["one-hot"]:
        assert row["seeds"] == 2
        assert row["ci_low"] <= row["iqm"] <= row["ci_high"]
    written = study.draw_curves(curves, tmp_path) + study.draw_scores(variants, tmp_path)
    written += study.draw_ratios("maskable-ppo", tmp_path / "runs", tmp_path)
    assert all(path.stat().st_size > 1000 for path in written)
    study.write_table(tmp_path / "runs.csv", runs, study.RUN_COLUMNS)
    assert read_table(tmp_path / "runs.csv", study.RUN_COLUMNS) == runs


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"`--variants` must be among maskable-ppo, .*, got 'x'"):
        study.run_variants(tmp_path, ["x"], 1, Config())
    with pytest.raises(ConfigurationError, match=r"`--runs` must hold finished runs, got none in"):
        study.summarize_runs(tmp_path, ["ppo"])
