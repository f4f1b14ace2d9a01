"""Tables on the disk: equal after reading, and whole after a crash."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import agents
from refine_env import ConfigurationError
from refine_env.evaluation import (
    EPISODE_COLUMNS,
    SUMMARY_COLUMNS,
    read_table,
    roll_out,
    summarize,
    write_atomically,
    write_table,
)


def test_tables_survive_the_disk(gaussian_cache: Path, tmp_path: Path) -> None:
    rows = roll_out(partial(agents.make, "lookahead"), env_kwargs={"cache": str(gaussian_cache)}, episodes=5)
    write_table(tmp_path / "episodes.csv", rows, EPISODE_COLUMNS)
    assert read_table(tmp_path / "episodes.csv", EPISODE_COLUMNS) == rows
    summary = summarize(rows)
    write_table(tmp_path / "summary.csv", summary, SUMMARY_COLUMNS)
    assert read_table(tmp_path / "summary.csv", SUMMARY_COLUMNS) == summary
    with pytest.raises(ConfigurationError, match="`summary.csv` must have the columns .* got none named episode"):
        read_table(tmp_path / "summary.csv", EPISODE_COLUMNS)
    odd = [{**rows[0], "agent": name} for name in ('a"b', 'x, "y"', "two\nlines", "α")]
    write_table(tmp_path / "odd.csv", odd, EPISODE_COLUMNS)
    assert read_table(tmp_path / "odd.csv", EPISODE_COLUMNS) == odd
    with pytest.raises(ConfigurationError, match="`none.csv` must be a table of an evaluation, got no file"):
        read_table(tmp_path / "none.csv", EPISODE_COLUMNS)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "table.csv"
    write_atomically(path, "old")

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    renamed: list[int] = []
    rename = os.replace

    def replace(source: Path, target: Path) -> None:
        assert os.stat(source).st_ino in synced
        renamed.append(os.stat(source).st_ino)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "replace", replace)
    write_atomically(tmp_path / "table.csv", "new")
    assert synced == [*renamed, tmp_path.stat().st_ino]
    assert (tmp_path / "table.csv").stat().st_mode & 0o777 == 0o644
