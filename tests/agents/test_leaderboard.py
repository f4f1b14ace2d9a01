"""The leaderboard: frozen tasks, the same table twice, entries that are replayed."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import agents
from agents import leaderboard
from agents.leaderboard import TASKS, Task, enter, play, policies_for, replay
from refine_env import ConfigurationError
from refine_env.evaluation import roll_out
from refine_env.trajectories import TrajectoryCache

EPISODES = 12


@pytest.mark.parametrize("name", TASKS)
def test_tasks_are_frozen_with_the_cache_that_they_name(name: str) -> None:
    TASKS[name].check_cache()


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_its_references(name: str) -> None:
    known = policies_for(TASKS[name])
    best = "dp" if TASKS[name].tells_snr else "dp-inferred"
    assert best in known
    assert any(policy.startswith("persistent-q") for policy in known)
    assert ("dp" in known) == TASKS[name].tells_snr


def test_the_table_is_the_same_twice_and_says_what_was_played() -> None:
    first = play("paper-6dB", episodes=EPISODES)
    assert first == play("paper-6dB", episodes=EPISODES, workers=2)
    by_policy = {row["policy"]: row for row in first}
    assert by_policy["dp"]["score"] == 1.0
    fixed = [row for row in first if row["policy"].startswith("persistent-q")]
    assert max(row["score"] for row in fixed) == 0.0
    assert [row["score"] for row in first] == sorted((row["score"] for row in first), reverse=True)
    arguments = {"snr_db": 6.0, **agents.env_kwargs("lookahead")}
    table = roll_out(partial(agents.make, "lookahead"), env_kwargs=arguments, episodes=EPISODES, seed=2026)
    mean = np.mean([row["latent_mse"] for row in table])
    assert by_policy["lookahead"]["latent_mse"] == pytest.approx(mean, rel=1e-12)
    assert by_policy["lookahead"]["geometric_mean"] == pytest.approx(mean, rel=1e-12)
    for row in first:
        assert row["ci_low"] <= row["latent_mse"] <= row["ci_high"]
        assert row["score_low"] <= row["score"] <= row["score_high"]


def test_scores_are_means_over_the_snrs(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: three policies, two SNRs; nothing is added to anything."""
    task = Task(summary="", snrs_db=(0.0, 1.0))
    scores = leaderboard._Scores(task)
    for policy, means in {"persistent-q3": (4.0, 1.0), "persistent-q4": (5.0, 0.5), "dp": (2.0, 0.0)}.items():
        scores.add(policy, [[{"latent_mse": mean}] * 3 for mean in means], "")
    scores.add("mine", [[{"latent_mse": mean}] * 3 for mean in (3.0, 0.25)], "ten steps")
    rows = {row["policy"]: row for row in scores.rows("t")}
    assert rows["mine"]["score"] == pytest.approx(0.5)
    assert rows["dp"]["geometric_mean"] == 0.0
    assert rows["persistent-q3"]["score"] == pytest.approx((0.0 - 1.0) / 2)
    assert rows["persistent-q3"]["geometric_mean"] == pytest.approx(2.0)
    assert rows["mine"]["latent_mse"] == pytest.approx(1.625)
    assert rows["mine"]["training"] == "ten steps"


@pytest.fixture
def entry(tmp_path: Path) -> Path:
    """The look-ahead, as if it came from elsewhere."""
    make = partial(agents.make, "lookahead")
    return enter(make, tmp_path / "mine", name="mine", training="none", tasks=["paper-6dB"], episodes=EPISODES)


def test_an_entry_is_replayed(entry: Path) -> None:
    rows = {row["policy"]: row for row in play("paper-6dB", [entry], episodes=EPISODES)}
    assert {**rows["mine"], "policy": "", "training": ""} == {**rows["lookahead"], "policy": "", "training": ""}
    assert rows["mine"]["training"] == "none"
    assert "mine" not in {row["policy"] for row in play("paper-3dB", [entry], episodes=2)}


def test_other_actions_score_otherwise(entry: Path) -> None:
    path = entry / "actions.csv"
    lines = path.read_text().splitlines()
    waits = [lines[0], *(line.rsplit(",", 1)[0] + "," + "0" * 60 for line in lines[1:])]
    path.write_text("\n".join(waits) + "\n")
    _, _, (table,) = replay(entry, "paper-6dB", episodes=EPISODES)
    assert all(row["num_deliveries"] == 0 for row in table)


def _change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_entries_that_are_refused(entry: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"must have the 1000 seeds of paper-6dB at 6 dB, in their order"):
        replay(entry, "paper-6dB")
    with pytest.raises(ConfigurationError, match="`entry` must be a folder with the entry.json that"):
        replay(tmp_path, "paper-6dB")
    with pytest.raises(ConfigurationError, match="`entry` must have been made with the cache of paper-3dB"):
        replay(entry, "paper-3dB", episodes=EPISODES)
    table, header = (entry / "actions.csv").read_text(), (entry / "entry.json").read_text()
    seed = table.splitlines()[1].split(",")[3]
    _change(entry / "actions.csv", seed, "1")
    with pytest.raises(ConfigurationError, match=r"in their order, got 12 rows with other ones"):
        replay(entry, "paper-6dB", episodes=EPISODES)
    (entry / "actions.csv").write_text(table[:-2] + "9\n")
    with pytest.raises(ConfigurationError, match=r"`entry` must have 60 actions of 012345 in every row of paper-6dB"):
        replay(entry, "paper-6dB", episodes=EPISODES)
    (entry / "actions.csv").write_text(table)
    _change(entry / "entry.json", TASKS["paper-6dB"].cache_sha256, "0" * 64)
    with pytest.raises(ConfigurationError, match="`entry` must have been made with the cache of paper-6dB"):
        replay(entry, "paper-6dB", episodes=EPISODES)
    described = json.loads(header)
    (entry / "entry.json").write_text(json.dumps({**described, "env_kwargs": {"deadline": 90}}))
    with pytest.raises(ConfigurationError, match=r"`env_kwargs` of an entry must be among .* got deadline"):
        replay(entry, "paper-6dB", episodes=EPISODES)


def test_another_cache_is_refused(monkeypatch: pytest.MonkeyPatch, gaussian_cache: Path) -> None:
    other: Any = TrajectoryCache.open(str(gaussian_cache))
    monkeypatch.setattr(leaderboard.TrajectoryCache, "open", lambda name: other)
    with pytest.raises(ConfigurationError, match=r"`cache` must be the 'default' that the task was frozen with"):
        play("paper-6dB", episodes=2)


def test_a_task_that_is_not_there() -> None:
    with pytest.raises(ConfigurationError, match=r"`task` must be one of paper-3dB, .* got 'paper'"):
        play("paper")
