"""What reuse buys on the link: the study's starts, its search for deadlines, its tables and its figure."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import agents
from agents.evaluate import main
from agents.figures import draw_all
from agents.studies.reuse import MOST_SLOTS, POLICIES, RATIOS, STRIDE, least_deadlines, read_reuse, starts_of
from refine_env import TrajectoryCache
from refine_env.evaluation import EPISODE_COLUMNS, bootstrap_interval, read_table, roll_out
from refine_env.trajectories import generate_gaussian
from tests.processes import run


def test_starts(gaussian_cache: Path, reuse_cache: Path) -> None:
    starts = starts_of(TrajectoryCache.open(gaussian_cache))
    assert [start.step for start in starts if not start.shared] == [50, 35, 25, 15, 10, 5, 3, 1]
    assert [(start.ratio, start.shared) for start in starts] == [
        (ratio, shared) for ratio in RATIOS for shared in ((False, True) if ratio else (False,))
    ]
    assert starts[0].env_kwargs == {}
    assert starts[2].env_kwargs == {"warm_start": {"step": 35, "shared": True}}
    of_midpoints = starts_of(TrajectoryCache.open(reuse_cache))
    assert [(start.ratio, start.step, start.shared) for start in of_midpoints] == [(0.6, 20, False), (0.6, 20, True)]


@pytest.mark.parametrize("first", [1, 2, STRIDE, STRIDE + 1, 3 * STRIDE, MOST_SLOTS - 1, MOST_SLOTS])
def test_the_least_deadlines_are_found(first: int) -> None:
    """One by one; more time may be worse again, and each deadline is that of its own error."""
    asked = []

    def ends(deadline: int) -> tuple[float, float, float]:
        asked.append(deadline)
        assert 1 <= deadline <= MOST_SLOTS
        bump = 4.0 if deadline % 7 == 0 and deadline > first + 3 else 0.0
        return tuple(float(bump + first + more - deadline) for more in (0, -1, 2))  # type: ignore[return-value]

    expected = [first, max(1, first - 1), first + 2]
    while expected[2] % 7 == 0 and expected[2] > first + 3:
        expected[2] += 1
    assert least_deadlines(ends, 0.0) == [None if value > MOST_SLOTS else value for value in expected]
    assert len(set(asked)) < first / STRIDE + 2 * STRIDE or first > MOST_SLOTS - 3
    assert least_deadlines(lambda _: (1.0,), 0.5) == [None]


def test_command(tmp_path: Path) -> None:
    """Its numbers are those of roll-outs, and the deadline before the least one is not enough."""
    pytest.importorskip("matplotlib")
    out, cache = tmp_path / "out", tmp_path / "cache"
    generate_gaussian(cache, num_trajectories=4, latent_shape=(4, 8, 8), num_steps=10)
    words = ("--study", "reuse", "--cache", cache, "--split", "all", "--episodes", "5", "--workers", "1")
    said = run(
        main, *words, "--snr-db", "3,6", "--reuse-ratios", "0,0.8", "--deadline", "9", "--target-mse", "0.05",
        "--out", out,
    )  # fmt: skip
    assert "least deadline in slots with a mean latent MSE of 0.05, dp" in " ".join(said.split())
    cells, deadlines = read_reuse(out)
    systems = [(0.0, 10, "no"), (0.8, 2, "no"), (0.8, 2, "yes")]
    assert [(r["agent"], r["ratio"], r["step"], r["shared"], r["snr_db"]) for r in deadlines] == [
        (policy, *system, 6.0)
        for policy in POLICIES
        for system in systems  # of 0, 6 and 12 dB only 6 is played
    ]
    assert {(r["agent"], r["ratio"], r["step"], r["shared"], r["snr_db"]) for r in cells} == {
        (policy, *system, snr_db) for policy in POLICIES for system in systems for snr_db in (3.0, 6.0)
    }
    played = read_table(out / "episodes.csv", {"ratio": float, "shared": str, **EPISODE_COLUMNS})
    for row in (cells[0], cells[-1]):
        names = ("agent", "ratio", "shared", "snr_db")
        scores = np.array([r["latent_mse"] for r in played if all(r[name] == row[name] for name in names)])
        assert scores.size == row["episodes"] == 5
        assert row["latent_mse"] == pytest.approx(scores.mean(), rel=1e-9, abs=1e-13)
        assert (row["latent_mse_low"], row["latent_mse_high"]) == pytest.approx(
            bootstrap_interval(scores), rel=1e-6, abs=1e-12
        )
        assert row["full_latent_mse"] is None
    for row in deadlines:
        kwargs = {**agents.env_kwargs(row["agent"]), "cache": str(cache), "split": "all", "snr_db": 6.0}
        if row["ratio"]:
            kwargs["warm_start"] = {"step": row["step"], "shared": row["shared"] == "yes"}
        before, then = (
            np.mean(
                [
                    r["latent_mse"]
                    for r in roll_out(
                        partial(agents.make, row["agent"]), env_kwargs={**kwargs, "deadline": deadline}, episodes=5
                    )
                ]
            )
            for deadline in (row["deadline"] - 1, row["deadline"])
        )
        assert before > 0.05 >= then
        assert then == pytest.approx(row["latent_mse"], rel=1e-9)
        usual = next(r for r in deadlines if (r["agent"], r["ratio"]) == (row["agent"], 0.0))
        assert row["sooner"] == usual["deadline"] - row["deadline"]
        assert row["sooner_low"] <= row["sooner"] <= row["sooner_high"]
        assert row["deadline_low"] <= row["deadline"] <= row["deadline_high"]
        assert (row["sooner"] > 4) == (row["ratio"] == 0.8)
    assert [path.name for path in draw_all(out, tmp_path)] == ["reuse.png", "reuse.pdf"]


def test_on_a_cache_of_midpoints(reuse_cache: Path, tmp_path: Path) -> None:
    """Its own ratio, both errors, and no gain over what it does not have."""
    words = ("--study", "reuse", "--cache", reuse_cache, "--split", "all", "--episodes", "3", "--workers", "1")
    run(main, *words, "--snr-db", "12", "--deadline", "25", "--out", tmp_path)
    cells, deadlines = read_reuse(tmp_path)
    assert {row["ratio"] for row in [*cells, *deadlines]} == {0.6}
    for row in [*cells, *deadlines]:
        assert row["full_latent_mse_low"] <= row["full_latent_mse"] <= row["full_latent_mse_high"]
        assert row["full_latent_mse"] > 10.0 * row["latent_mse"]
    assert all(row["sooner"] is None for row in deadlines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--reuse-ratios 0,x", "`--reuse-ratios` must be a comma-separated list"),
        ("--reuse-ratios 1", r"`reuse_ratio` must be in [0, 1), got 1.0"),
        ("--reuse-ratios 0.999", "`reuse_ratio` must leave m"),
        ("--target-mse 0", "`target_mse` must be > 0, got 0.0"),
        ("--target-mse nan", "`--target-mse` must be a finite number, got nan"),
        ("--warm-start 25", "`--warm-start` must be left out of --study reuse, got '25'"),
        ("--study fig3a --reuse-ratios 0.5", "`--reuse-ratios` must be left out of --study fig3a, got '0.5'"),
        ("--study ladder --reuse-ratios 0.5", "`--reuse-ratios` must be left out of --study ladder, got '0.5'"),
        ("--cache REUSE --reuse-ratios 0.5", "`--reuse-ratios` must be left out on a cache whose trajectories start"),
    ],
)
def test_bad_arguments(words: str, message: str, reuse_cache: Path, gaussian_cache: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(main)
    base = ["--study", "reuse", "--cache", str(gaussian_cache), "--snr-db", "6", "--out", str(tmp_path / "out")]
    given = [str(reuse_cache) if word == "REUSE" else word for word in words.split()]
    result = CliRunner().invoke(app, [*base, "--episodes", "1", *given])
    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1].startswith(f"error: {message}")
