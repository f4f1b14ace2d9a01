"""The ladder: common draws, paired gains, bounds of the same system, and its table and figure."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import agents
from agents.figures import draw_all
from agents.studies import ladder
from agents.studies.ladder import LADDER_COLUMNS, RUNG_COLUMNS, RUNGS, Rung
from agents.studies.registry import STUDIES
from refine_env.dynamics.settings import EnvSettings
from refine_env.evaluation import read_table

SNRS_DB = (3.0, 9.0)
SOME = (
    Rung("look-ahead", "paper", "lookahead", {}),
    Rung("look-ahead, exact", "alone", "lookahead", {"latency_model": "exact"}),
    Rung("DP", "ladder", "dp", {"sent_scale": False}),
    Rung("+ sent", "ladder", "dp", {}),
    Rung("+ tight", "ladder", "dp", {"bit_depths": [3, 4, 5, 8, 10, 16]}),
)


@pytest.fixture(scope="module")
def climbed(gaussian_cache: Path) -> list[dict[str, Any]]:
    return ladder.climb(
        SNRS_DB, episodes=60, seed=4, env_kwargs={"cache": str(gaussian_cache), "split": "all"}, rungs=SOME
    )


def test_every_rung_is_played_on_the_same_draws(climbed: list[dict[str, Any]]) -> None:
    labels = [rung.label for rung in SOME]
    found = {bound for rung in SOME if (bound := ladder.bound_label(rung, SOME)) is not None}
    assert found == {"clairvoyant: ladder: DP", "clairvoyant: ladder: + sent", "clairvoyant: ladder: + tight"}
    assert len(climbed) == ladder.number_of_entries(SNRS_DB, {}, SOME) * 60
    seen = {
        (label, snr_db): [
            (row["seed"], row["trajectory"], row["uplink_slots"])
            for row in climbed
            if (row["rung"], row["snr_db"]) == (label, snr_db)
        ]
        for label in [*labels, *found]
        for snr_db in SNRS_DB
    }
    for snr_db in SNRS_DB:
        assert len({tuple(seen[label, snr_db]) for label in [*labels, *found]}) == 1


def test_gains_and_bounds_by_hand(climbed: list[dict[str, Any]]) -> None:
    cells, totals = ladder.summarize_ladder(climbed, SOME)

    def mean(label: str, snr_db: float) -> float:
        return float(np.mean([r["latent_mse"] for r in climbed if (r["rung"], r["snr_db"]) == (label, snr_db)]))

    logs = []
    for snr_db in SNRS_DB:
        cell = next(c for c in cells if (c["rung"], c["snr_db"]) == ("+ sent", snr_db))
        own, first = mean("+ sent", snr_db), mean("look-ahead", snr_db)
        best = mean("clairvoyant: ladder: + sent", snr_db)
        assert cell["latent_mse"] == pytest.approx(own)
        assert cell["gain"] == pytest.approx(first / own, rel=1e-6)
        assert cell["bound_ratio"] == pytest.approx(own / best, rel=1e-6)
        assert cell["ci_low"] < own < cell["ci_high"]
        assert cell["gain_low"] < cell["gain"] < cell["gain_high"]
        logs.append(np.log(cell["gain"]))
    total = next(t for t in totals if t["rung"] == "+ sent")
    assert total["gain"] == pytest.approx(np.exp(np.mean(logs)))
    assert total["gain_low"] < total["gain"] < total["gain_high"]
    assert total["bound_ratio"] == pytest.approx(total["bound_gain"] / total["gain"])
    baseline = totals[0]
    assert (baseline["gain"], baseline["gain_low"], baseline["gain_high"]) == (1.0, 1.0, 1.0)  # paired with itself
    assert baseline["bound_gain"] is None  # none of the paper's coder


def test_the_optimum_is_between_bound_and_look_ahead(climbed: list[dict[str, Any]]) -> None:
    _, totals = ladder.summarize_ladder(climbed, SOME)
    for row in totals[2:]:
        assert row["gain"] > 1.3
        assert row["bound_ratio"] > 0.98  # 256 dimensions follow the recursion up to a few percent


def test_rungs_are_what_they_say(gaussian_cache: Path) -> None:
    """Every label once; the ladder adds one thing a step; every rung can be made."""
    labels = [rung.label for rung in RUNGS]
    assert len(set(labels)) == len(labels)
    climbing = [rung for rung in RUNGS if rung.group == "ladder"]
    for below, above in itertools.pairwise(climbing):
        changed = {key for key, value in above.env_kwargs.items() if below.env_kwargs.get(key) != value}
        assert len(changed) + (below.agent != above.agent) == 1, above.label
    full = climbing[-1]
    for rung in RUNGS:
        kwargs = {**agents.env_kwargs(rung.agent), **rung.env_kwargs, "cache": str(gaussian_cache), "snr_db": 9.0}
        settings = EnvSettings.from_kwargs(kwargs)
        config = settings.config_for(settings.open_cache())
        if rung.group == "without" and "look-ahead" not in rung.label:
            assert (rung.agent, rung.env_kwargs) != (full.agent, full.env_kwargs)
        if rung.agent.startswith("lookahead"):
            agents.make(rung.agent, config)


def test_command_writes_tables_and_figure(gaussian_cache: Path, tmp_path: Path, monkeypatch: Any) -> None:
    import typer

    from agents.evaluate import main

    monkeypatch.setattr(ladder, "RUNGS", SOME)
    app = typer.Typer()
    app.command()(main)
    arguments = ["--study", "ladder", "--cache", str(gaussian_cache), "--split", "all", "--episodes", "6"]
    result = CliRunner().invoke(app, [*arguments, "--snr-db", "6,9", "--out", str(tmp_path / "out"), "--workers", "1"])
    assert result.exit_code == 0, result.output
    for name in ("episodes.csv", "ladder.csv", "rungs.csv", "run.json", "ladder.png", "ladder.pdf"):
        assert (tmp_path / "out" / name).is_file(), name
    assert "geometric mean" in result.output
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert (run["study"], len(run["rungs"]), run["episodes"]) == ("ladder", len(SOME), 6)
    cells = read_table(tmp_path / "out" / "ladder.csv", LADDER_COLUMNS, optional=ladder.BOUND_COLUMNS)
    assert len(cells) == 2 * len(SOME)
    assert len(read_table(tmp_path / "out" / "rungs.csv", RUNG_COLUMNS, optional=ladder.BOUND_COLUMNS)) == len(SOME)
    before = (tmp_path / "out" / "ladder.png").read_bytes()
    assert [path.name for path in draw_all(tmp_path / "out", tmp_path / "again")] == ["ladder.png", "ladder.pdf"]
    assert (tmp_path / "again" / "ladder.png").read_bytes() == before


def test_ordering_of_all_policies_on_one_system(gaussian_cache: Path, tmp_path: Path, monkeypatch: Any) -> None:
    import typer

    from agents.evaluate import main

    assert len({json.dumps(dict(rung.env_kwargs)) for rung in ladder.ORDERING}) == 1
    assert {ladder.bound_label(rung, ladder.ORDERING) for rung in ladder.ORDERING} == {"clairvoyant: paper: dp"}
    shown = [rung for rung in ladder.ORDERING if rung.label in ("dp", "lookahead", "persistent-q3", "random")]
    monkeypatch.setattr(ladder, "ORDERING", shown)
    app = typer.Typer()
    app.command()(main)
    arguments = ["--study", "ordering", "--cache", str(gaussian_cache), "--split", "all", "--episodes", "200"]
    result = CliRunner().invoke(app, [*arguments, "--snr-db", "3,9", "--out", str(tmp_path), "--workers", "1"])
    assert result.exit_code == 0, result.output
    assert "clairvoyant" in result.output
    for cell in read_table(tmp_path / "ladder.csv", LADDER_COLUMNS, optional=ladder.BOUND_COLUMNS):
        if cell["rung"] == "dp":
            assert cell["bound_ratio_high"] > 0.99
        else:
            assert cell["gain_high"] < 1.0, cell  # significantly worse than the optimum


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--study", "steps"], f"`--study` must be one of 'fig3a', {', '.join(map(repr, STUDIES))}, got 'steps'"),
        (["--study", "ladder", "--agents", "dp"], "`--agents` must be left out of --study ladder, got 'dp'"),
        (["--study", "ladder", "--html"], "`--html` must be left out of --study ladder, got True"),
        (["--study", "ladder", "--snr-db", "x"], "`--snr-db` must be a comma-separated list"),
        (["--study", "ladder", "--workers", "0"], "`--workers` must be an integer >= 1, got 0"),
    ],
)
def test_bad_arguments(arguments: list[str], sentence: str, tmp_path: Path) -> None:
    import typer

    from agents.evaluate import main

    app = typer.Typer()
    app.command()(main)
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert sentence in result.output.replace("\n", " ")
