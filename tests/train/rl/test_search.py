"""The search of options: a tiny study, gone on with."""

from __future__ import annotations

import csv
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

for module in ("torch", "stable_baselines3", "sb3_contrib", "tensorboard", "optuna"):
    pytest.importorskip(module, reason="the train extra is not installed")

from train.rl import search  # noqa: E402
from train.rl.config import Config  # noqa: E402


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_small_search(gaussian_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(search.SPACE, "actor", ("8,8", "8"))
    monkeypatch.setitem(search.SPACE, "rollout_steps", ("16", "32"))
    monkeypatch.setitem(search.SPACE, "batch_size", ("64", "128"))
    base = {
        "cache": str(gaussian_cache),
        "total_steps": 256,
        "num_envs": 8,
        "eval_every": 128,
        "eval_episodes": 2,
        "test_episodes": 1,
        "eval_snr_db": "6,12",
        "checkpoint_every": 3600,
    }
    study = search.search(tmp_path, trials=2, base=base, rival="lookahead", start_with_defaults=False)
    assert len(study.trials) == 2
    study = search.search(tmp_path, trials=3, base=base, rival="lookahead", start_with_defaults=False)
    assert len(study.trials) == 3  # gone on with, not begun anew
    with (tmp_path / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3
    scores = [float(row["ratio"]) for row in rows if row["ratio"]]
    assert scores == sorted(scores)
    assert study.best_trial.user_attrs["ratio"] == scores[0]
    study = search.search(tmp_path, trials=3, base=base, rival="lookahead")
    assert len(study.trials) == 3  # there are enough


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_two_processes_share_a_study(gaussian_cache: Path, tmp_path: Path) -> None:
    base = {
        "cache": str(gaussian_cache),
        "total_steps": 64,
        "num_envs": 2,
        "eval_every": 32,
        "eval_episodes": 1,
        "test_episodes": 1,
        "eval_snr_db": "6",
    }
    study = search.search(tmp_path, trials=3, base=base, rival="lookahead", workers=2)
    finished = [trial for trial in study.trials if trial.state.is_finished()]
    assert 3 <= len(finished) <= 4  # both may be at their last one
    assert finished[0].params["learning_rate"] == Config().learning_rate
    assert len({trial.params["learning_rate"] for trial in study.trials}) == len(study.trials)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("claims", [True, False])
def test_the_others_start_when_no_trial_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, claims: bool) -> None:
    """Two processes could claim the same waiting trial, and so its folder; one that claims none holds up nobody."""
    waiting: dict[int, int] = {}

    def work(out: Path, trials: int, base: object, rival: str, seed: int, sampler_seed: int) -> None:
        study = search._open(out, sampler_seed)
        waiting[sampler_seed] = sum(trial.state.name == "WAITING" for trial in study.trials)
        if claims:
            time.sleep(0.5)
            study.ask()

    monkeypatch.setattr(search, "_work", work)
    monkeypatch.setattr(search, "worker_pool", ThreadPoolExecutor)
    study = search.search(tmp_path, trials=3, base={}, workers=3, seed=7)
    assert waiting == ({7: 1, 8: 0, 9: 0} if claims else {7: 1, 8: 1, 9: 1})
    assert [trial.number for trial in study.trials] == ([0, 1, 2] if claims else [0])


def test_the_space_is_of_options() -> None:
    """Every name is an option of the training, and the defaults lie within it."""
    defaults = Config()
    for name, values in search.SPACE.items():
        value = getattr(defaults, name)
        if isinstance(values[0], str):
            assert str(value) in values
        else:
            assert values[0] <= value <= values[1]
