"""The table of what is learned out of the box, on a small scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("sb3_contrib", reason="the train extra is not installed")

from refine_env.evaluation import read_table
from train.rl import out_of_the_box


@pytest.fixture
def small(gaussian_cache: Path) -> dict[str, Any]:
    """One SNR, one seed, few steps."""
    return {"snrs_db": [6.0], "seeds": 1, "total_steps": 2048, "episodes": 20, "cache": str(gaussian_cache)}


def test_the_table(small: dict[str, Any], tmp_path: Path) -> None:
    rows = out_of_the_box.compare(tmp_path, setups=tuple(out_of_the_box.SETUPS), **small)
    assert rows == read_table(tmp_path / "out_of_the_box.csv", out_of_the_box.COLUMNS, command="")
    references = [("reference", name) for name in out_of_the_box.REFERENCES]
    trained = [(setup, name) for setup in out_of_the_box.SETUPS for name in out_of_the_box.ALGORITHMS]
    assert [(row["setup"], row["algorithm"]) for row in rows] == references + trained
    lookahead = next(row["latent_mse"] for row in rows if row["algorithm"] == "lookahead")
    for row in rows:
        assert row["ci_low"] <= row["latent_mse"] <= row["ci_high"]
        assert row["to_lookahead"] == pytest.approx(row["latent_mse"] / lookahead)


def test_it_goes_on_with_what_is_missing(
    small: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []

    def fake(key: tuple[str, str, float, int], steps: int, episodes: int, cache: str) -> list[float]:
        trained.append(key)
        return [0.5] * episodes

    monkeypatch.setattr(out_of_the_box, "train_and_score", fake)
    before = out_of_the_box.compare(tmp_path, setups=["learning"], **small)
    assert len(trained) == 2
    after = out_of_the_box.compare(tmp_path, setups=["paper", "learning"], **{**small, "seeds": 2})
    assert after[: len(before)] == before
    assert len(trained) == len(set(trained)) == 8
