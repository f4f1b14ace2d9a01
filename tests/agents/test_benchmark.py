"""The benchmark: its ratios, its references, what it writes, and what it says when it cannot run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from agents import benchmark
from agents.benchmark import (
    ROWS,
    Measurement,
    Options,
    compare,
    insert_table,
    is_met,
    markdown_table,
    measure,
    print_measurements,
)
from refine_env import CacheError, ConfigurationError
from refine_env._store import DIRECTORY_VARIABLE
from refine_env.trajectories import generate_gaussian
from tests.processes import run_module

ROOT = Path(__file__).parents[2]
FAST = {"repetitions": 1, "seconds": 0.01, "num_envs": (2,), "episodes": 2}


def test_ratios_are_medians_of_pairs_and_larger_is_better() -> None:
    """The second pair was taken while the machine was twice as slow."""
    times = compare("step", "a", "s", [1.0, 2.0, 1.0], [3.0, 6.0, 4.0], "it")
    assert (times.value, times.reference, times.ratio) == (1.0, 4.0, 3.0)
    speeds = compare("step", "a", "1/s", [3.0, 6.0, 4.0], [1.0, 2.0, 1.0], "it", "≥ 3.5×")
    assert (speeds.ratio, speeds.met) == (3.0, False)


@pytest.mark.parametrize(
    ("target", "value", "ratio", "met"),
    [
        ("≤ 4 ns, ≥ 15×", 4.0, 15.0, True),
        ("≤ 4 ns, ≥ 15×", 4.0, 14.9, False),
        ("≤ 4 ns, ≥ 15×", 4.1, 15.0, False),
        ("≥ 0.4× or ≥ 1 M", 1e6, 0.3, True),
        ("≥ 0.4× or ≥ 1 M", 9e5, 0.4, True),
        ("≥ 0.4× or ≥ 1 M", 9e5, 0.3, False),
        ("< 1 GB", 999.0, 0.0, True),
        ("< 1 GB", 1000.0, 0.0, False),
        ("< 2 s", 2.0, 0.0, False),
    ],
)
def test_a_target_is_read_as_it_is_shown(target: str, value: float, ratio: float, met: bool) -> None:
    assert is_met(target, value, ratio) is met


def test_every_recorded_target_was_met_as_it_says() -> None:
    content = json.loads((ROOT / "docs" / "benchmark.json").read_text(encoding="utf-8"))
    measurements = [Measurement(**fields) for fields in content["measurements"]]
    with_target = [one for one in measurements if one.target]
    assert len(with_target) > 8
    assert all(one.met == is_met(one.target, one.value, one.ratio) for one in with_target)


def test_what_is_compared_runs_in_turns() -> None:
    calls: list[str] = []

    def timer(name: str) -> Any:
        return lambda: float(calls.append(name) or len(calls))  # type: ignore[func-returns-value]

    assert benchmark.alternate(2, timer("a"), timer("b")) == [[3.0, 5.0], [4.0, 6.0]]
    assert calls == ["a", "b"] * 3


@pytest.mark.parametrize(
    ("row", "cases"),
    [
        ("reconstruct", ["b = 3", "b = 4", "b = 8", "b = 10", "b = 8, traffic"]),
        ("step", ["single"]),
        ("vector", ["2 envs", "2 envs"]),
        ("build", ["look-ahead table", "decision, 256 envs"]),
    ],
)
def test_rows(row: str, cases: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    measurements = list(measure((row,), Options(**FAST)))  # type: ignore[arg-type]
    assert [(one.row, one.case) for one in measurements] == [(row, case) for case in cases]
    for one in measurements:
        assert one.value > 0.0
        assert one.ratio == pytest.approx(  # of one repetition
            one.reference / one.value if one.unit.split("/")[0] in ("ns", "ms", "µs") else one.value / one.reference
        )
    print_measurements(measurements)
    shown = capsys.readouterr().out
    assert all(case in shown for case in cases)


def test_figure_3_in_small(tmp_path: Path) -> None:
    """154 episodes on a cache that it makes itself; the command's memory is that of a process."""
    options = Options(**FAST, cache=tmp_path / "gaussian", workers=2)  # type: ignore[arg-type]
    found = {one.case: one for one in measure(("fig3",), options)}
    episodes = found["154 episodes"]
    assert episodes.against == "NumPy twin"
    assert "played 77 episodes" in episodes.note
    assert found["speed"].value == pytest.approx(154 / episodes.value)
    assert found["whole command"].reference == episodes.value
    if sys.platform == "linux":
        assert 20.0 < found["anonymous memory"].value < 1000.0
    made = (tmp_path / "gaussian" / "manifest.json").stat().st_mtime_ns
    benchmark.open_gaussian(options)
    assert (tmp_path / "gaussian" / "manifest.json").stat().st_mtime_ns == made


def test_another_cache_is_refused(tmp_path: Path, gaussian_cache: Path) -> None:
    with pytest.raises(CacheError, match=r"`--fig3-cache` must hold 2 trajectories of \(4, 64, 64\), got 16 of"):
        benchmark.open_gaussian(Options(**FAST, cache=gaussian_cache))  # type: ignore[arg-type]
    generate_gaussian(tmp_path / "few", 1, (4, 64, 64), num_steps=2)
    with pytest.raises(CacheError, match=r"must hold 2 trajectories of \(4, 64, 64\), got 1 of"):
        benchmark.open_gaussian(Options(**FAST, cache=tmp_path / "few"))  # type: ignore[arg-type]


def test_the_cache_is_the_user_s_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "kept"))
    assert benchmark.open_gaussian(Options(**FAST)).path == tmp_path / "kept" / "benchmark" / "gaussian"  # type: ignore[arg-type]
    monkeypatch.setenv(DIRECTORY_VARIABLE, "")
    with pytest.raises(ConfigurationError, match="`--fig3-cache` must be given where nothing is kept for the user"):
        benchmark.open_gaussian(Options(**FAST))  # type: ignore[arg-type]


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark.shutil, "disk_usage", lambda path: type("usage", (), {"free": 10}))
    with pytest.raises(CacheError, match=r"`--fig3-cache` must be where 1\.7 GB are free, got 0\.0 GB"):
        benchmark.open_gaussian(Options(cache=tmp_path / "gaussian"))
    assert not (tmp_path / "gaussian").exists()


def test_without_the_clone_s_twins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(benchmark, "_TWIN", tmp_path / "twin.py")
    with pytest.raises(ConfigurationError, match="`rows` must be without reconstruct, fig3 and build where there is"):
        list(measure(("build",), Options()))


def test_start(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    monkeypatch.setattr(benchmark.subprocess, "run", lambda command, **options: commands.append(command))
    found = {one.case: one for one in measure(("start",), Options(**FAST))}  # type: ignore[arg-type]
    assert list(found) == ["import refine_env", "gym.make", "agents.evaluate"]
    assert "to its end" in found["agents.evaluate"].note
    assert found["gym.make"].unit == "ms"
    assert sum("import refine_env" in command for command in commands) == 2
    assert sum("agents.evaluate" in command for command in commands) == 2


def test_the_command_line(tmp_path: Path) -> None:
    out = tmp_path / "results" / "benchmark.json"
    result = run_module("agents.benchmark", "--rows", "build", "--repetitions", "1", "--out", str(out))
    assert result.returncode == 0, result.stderr
    assert "medians of alternating runs" in result.stdout
    content = json.loads(out.read_text())
    measurements = [Measurement(**one) for one in content["measurements"]]
    assert [one.target for one in measurements] == ["≤ 50 ms", "≤ 1 µs"]
    assert content["machine"]["cores"] >= 1
    assert set(content["machine"]["versions"]) >= {"refine-env", "python", "numba"}


def test_the_page_s_table_is_the_recorded_one() -> None:
    content = json.loads((ROOT / "docs" / "benchmark.json").read_text())
    page = (ROOT / "docs" / "performance.md").read_text()
    table = markdown_table(content)
    assert insert_table(page, table) == page
    assert list(dict.fromkeys(one["row"] for one in content["measurements"])) == list(ROWS)
    assert len(table.splitlines()) >= 2 + len(content["measurements"])


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="`--page` must hold the lines <!-- measured --> and"):
        insert_table("# A page", "| a |")
