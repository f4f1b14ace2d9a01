"""Commands refuse bad arguments in one sentence, and write nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.processes import assert_refused, run_module


@pytest.mark.parametrize(
    ("line", "code", "match"),
    [
        ("agents.benchmark --rows stepp", 2, "`rows` must be one of"),
        ("agents.benchmark --rows step,step", 2, "`--rows` must be a comma-separated list without repetition"),
        ("agents.benchmark --num-envs a", 2, "`--num-envs` must be a comma-separated list"),
        ("agents.benchmark --repetitions 0", 2, "`--repetitions` must be an integer >= 1"),
        ("agents.benchmark --workers 0", 2, "`--workers` must be an integer >= 1"),
        ("agents.benchmark --twin-episodes 0", 2, "`--twin-episodes` must be an integer >= 1"),
        ("agents.distortion --bit-depths 4,3", 2, "`--bit-depths` must be ascending integers in 1 … 15"),
        ("agents.distortion --bit-depths 8,16", 2, "`--bit-depths` must be ascending integers in 1 … 15"),
        ("agents.distortion --trajectories 0", 2, "`--trajectories` must be an integer >= 1, got 0"),
        ("agents.distortion --split both", 2, "`split` must be one of"),
        ("agents.distortion --cache nowhere", 3, "nowhere"),
    ],
)
def test_bad_arguments_end_in_one_sentence(line: str, code: int, match: str, tmp_path: Path) -> None:
    result = run_module(*line.split(), "--out", str(tmp_path / "out"))
    assert_refused(result, code, match)
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
