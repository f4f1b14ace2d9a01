"""The comparison: common draws, tables, intervals, figures, exit codes, and the paper's ordering."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

import agents
import refine_env
from agents import evaluate as evaluate_module
from agents.evaluate import DEFAULT_AGENTS, DEFAULT_SNRS_DB, evaluate
from agents.figures import draw_fig3a
from refine_env import ConfigurationError, TrajectoryCache
from refine_env.errors import ActionError
from refine_env.evaluation import (
    EPISODE_COLUMNS,
    SUMMARY_COLUMNS,
    bootstrap_interval,
    episode_seeds,
    read_table,
    roll_out,
    summarize,
    write_table,
)
from tests.processes import assert_refused, run, run_module

ROOT = Path(__file__).parents[2]


def lookahead(config: Any) -> agents.Agent:
    return agents.make("lookahead", config)


@pytest.fixture(scope="module")
def fig3a(gaussian_cache: Path) -> dict[tuple[str, float], dict[str, Any]]:
    """Summary rows by (agent, SNR) on ideal trajectories."""
    rows = evaluate(
        DEFAULT_AGENTS,
        (0.0, 3.0, 6.0, 9.0, 12.0, 15.0, 21.0, 24.0),
        episodes=300,
        seed=0,
        env_kwargs={"cache": str(gaussian_cache), "split": "all"},
    )
    return {(row["agent"], row["snr_db"]): row for row in summarize(rows)}


@pytest.mark.parametrize("snr_db", [0.0, 3.0, 6.0, 9.0, 12.0, 15.0])
def test_lookahead_is_lowest(fig3a: dict[tuple[str, float], dict[str, Any]], snr_db: float) -> None:
    means = {agent: fig3a[agent, snr_db]["latent_mse"] for agent in DEFAULT_AGENTS}
    assert min(means, key=lambda agent: means[agent]) == "lookahead"


@pytest.mark.parametrize("snr_db", [2.0, 5.0])
def test_persistent_q3_wins_between_them(gaussian_cache: Path, snr_db: float) -> None:
    """3,000 paired episodes; Persistent-Q's tail is heavy, since a last delivery that misses costs two steps."""
    rows = evaluate(
        ("lookahead", "persistent-q3"),
        (snr_db,),
        episodes=3000,
        seed=0,
        env_kwargs={"cache": str(gaussian_cache), "split": "all"},
    )
    ours, theirs = np.array([row["latent_mse"] for row in rows]).reshape(2, -1)
    assert bootstrap_interval(theirs - ours, resamples=2000)[1] < 0.0


def test_final_only_fails_up_to_21_db_and_delivers_at_24(
    fig3a: dict[tuple[str, float], dict[str, Any]],
) -> None:
    for snr_db in (0.0, 12.0, 21.0):
        row = fig3a["final-only", snr_db]
        assert row["delivered_share"] == 0.0
        assert row["latent_mse"] == row["no_delivery_mse"]
    assert fig3a["final-only", 24.0]["delivered_share"] >= 0.98


@pytest.mark.parametrize(
    ("snr_db", "expected"), [(0.0, 0.119), (3.0, 0.0500), (6.0, 2.13e-3), (9.0, 4.92e-4), (12.0, 2.77e-4)]
)
def test_lookahead_reaches_the_reference(
    fig3a: dict[tuple[str, float], dict[str, Any]], snr_db: float, expected: float
) -> None:
    """References at M = 16384 and other draws; within 20 %, the heavy-tailed 6 and 12 dB included."""
    assert fig3a["lookahead", snr_db]["latent_mse"] == pytest.approx(expected, rel=0.2)


def test_rows_are_paired_and_replayable(gaussian_cache: Path) -> None:
    kwargs = {"cache": str(gaussian_cache), "snr_db": 3.0}
    tables = [
        roll_out(lambda config, name=name: agents.make(name, config), env_kwargs=kwargs, episodes=12, seed=5)
        for name in ("lookahead", "persistent-q3")
    ]
    for a, b in zip(*tables, strict=True):
        for column in ("episode", "seed", "trajectory", "no_delivery_mse", "uplink_slots"):
            assert a[column] == b[column]
    assert {row["trajectory"] for row in tables[0]} <= set(range(8, 16))  # the test split
    env = gym.make(refine_env.ENV_ID, split="test", **kwargs)
    agent = lookahead(env.unwrapped.config)  # type: ignore[attr-defined]
    for row in tables[0][:3]:
        observation, info = env.reset(seed=row["seed"])
        terminated = False
        while not terminated:
            observation, reward, terminated, _, info = env.step(agent.select_action(observation, info))
        assert -reward == row["latent_mse"]
        assert info["trajectory"] == row["trajectory"]
        assert observation["device_step"] == row["device_step"]
        assert info["bits_sent"] == row["bits_sent"]


@pytest.mark.parametrize(
    ("actions", "complaint"),
    [
        ([0, -1], "`actions` must be in 0 … 5, got -1"),
        ([6, 0], "`actions` must be in 0 … 5, got 6"),
        ([0.0, 1.0], "`actions` must be 2 integers in 0 … 5"),
        ([0], "`actions` must be 2 integers in 0 … 5"),
    ],
)
def test_a_policy_outside_the_action_space(gaussian_cache: Path, actions: list[Any], complaint: str) -> None:
    class Wrong(agents.Agent):
        def decide(self, observation: Any, legal: Any) -> Any:
            return np.zeros(legal.shape, dtype=np.int64)

        def select_action(self, observation: Any, info: Any) -> Any:
            return actions

    with pytest.raises(ActionError, match=complaint):
        roll_out(lambda config: Wrong(config, name="wrong"), env_kwargs={"cache": str(gaussian_cache)}, episodes=2)


@pytest.mark.parametrize("epochs", [False, True])
def test_batch_size_and_decision_epochs_change_nothing(gaussian_cache: Path, epochs: bool) -> None:
    kwargs = {"cache": str(gaussian_cache), "snr_db": 6.0}
    expected = roll_out(lookahead, env_kwargs=kwargs, episodes=11, seed=2)
    for size in (1, 4, 11, 500):
        other = roll_out(
            lookahead, env_kwargs={**kwargs, "decision_epochs": epochs}, episodes=11, seed=2, batch_size=size
        )
        assert other == expected


def test_roll_out_refuses_what_it_could_not_tabulate(gaussian_cache: Path) -> None:
    kwargs = {"cache": str(gaussian_cache)}
    with pytest.raises(ConfigurationError, match="`env_kwargs` must leave `autoreset_mode` to the roll-out"):
        roll_out(lookahead, env_kwargs={**kwargs, "autoreset_mode": "SameStep"}, episodes=1)
    with pytest.raises(ConfigurationError, match="`snr_db` must be one number for an evaluation, got the range"):
        roll_out(
            lambda config: agents.make("persistent-q3", config),
            env_kwargs={**kwargs, "snr_db": [0, 24]},
            episodes=1,
        )


def test_episode_seeds() -> None:
    assert episode_seeds(3, 5) == episode_seeds(3, 9)[:5]
    assert episode_seeds(3, 5) != episode_seeds(4, 5)
    assert len(set(episode_seeds(0, 1000))) == 1000
    with pytest.raises(ConfigurationError, match="`episodes` must be an integer >= 1, got 0"):
        episode_seeds(0, 0)
    with pytest.raises(ConfigurationError, match="`seed` must be an integer >= 0, got -1"):
        episode_seeds(-1, 3)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text.splitlines()[0] + "\n", "must have rows, got none below the header"),
        (lambda text: text.replace("0.25", "abc"), "right kind in every column, got .*abc.* in line 2"),
        (lambda text: text.replace("0.25", "nan"), "right kind in every column, got nan in line 2"),
        (lambda text: text[: text.index("\n") + 20], "right kind in every column"),
        (lambda text: text.replace("agent", "\udcff", 1), "must have the columns"),
    ],
)
def test_figures_of_a_bad_table_end_in_one_sentence(tmp_path: Path, spoil: Any, message: str) -> None:
    row = {name: kind("0.25") if kind is float else kind("3") for name, kind in SUMMARY_COLUMNS.items()}
    write_table(tmp_path / "good.csv", [row], SUMMARY_COLUMNS)
    text = spoil((tmp_path / "good.csv").read_text())
    (tmp_path / "summary.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigurationError, match=message):
        read_table(tmp_path / "summary.csv", SUMMARY_COLUMNS)
    result = run_module("agents.figures", str(tmp_path))
    assert_refused(result, 2, "error: `summary.csv` must")
    assert result.stderr.count("\n") == 1


def run_evaluate(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return run_module("agents.evaluate", *arguments, cwd=cwd)


def test_command_line(gaussian_cache: Path, tmp_path: Path) -> None:
    names = "lookahead,persistent-q8,final-only"
    common = ("--agents", names, "--snr-db", "0,30", "--episodes", "6", "--cache", str(gaussian_cache))
    for out in ("a", "b"):
        result = run_evaluate(*common, "--out", str(tmp_path / out))
        assert result.returncode == 0, result.stderr
        assert "latent MSE at the deadline" in result.stdout
    files = {path.name for path in (tmp_path / "a").iterdir()}
    assert files == {"episodes.csv", "summary.csv", "run.json", "fig3a.png", "fig3a.pdf"}
    for name in ("episodes.csv", "summary.csv", "run.json", "fig3a.png", "fig3a.pdf"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    run = json.loads((tmp_path / "a" / "run.json").read_text())
    assert run["cache"]["sha256"] == refine_env.TrajectoryCache.open(gaussian_cache).sha256
    assert run["versions"]["refine-env"] == refine_env.__version__
    assert run["config"]["lookahead"]["latent_dim"] == 256
    rows = read_table(tmp_path / "a" / "episodes.csv", EPISODE_COLUMNS)
    assert len(rows) == 3 * 2 * 6
    for path in (tmp_path / "a").glob("fig3a.*"):
        path.unlink()
    assert run_module("agents.figures", str(tmp_path / "a")).returncode == 0
    assert (tmp_path / "a" / "fig3a.png").read_bytes() == (tmp_path / "b" / "fig3a.png").read_bytes()


def test_a_first_run_says_that_it_compiles_and_compiles_what_it_needs(gaussian_cache: Path, tmp_path: Path) -> None:
    """Neither another coder, nor deliveries one by one, nor the texts of NumPy's errors; and nothing a second time."""
    script = tmp_path / "watched.py"
    script.write_text(
        "import sys\n"
        "from numba.core import event\n"
        "from agents.evaluate import main\n"
        "with event.install_recorder('numba:compile') as recorder:\n"
        "    main(agent_names='lookahead,persistent-q3', snr_db='6', episodes=2, cache=sys.argv[1], figures=False,\n"
        "         out=__import__('pathlib').Path(sys.argv[2]))\n"
        "print(*{e.data['dispatcher'].py_func.__name__ for _, e in recorder.buffer}, file=sys.stderr)\n"
    )
    said = []
    for _ in range(2):
        result = subprocess.run(
            [sys.executable, str(script), str(gaussian_cache), str(tmp_path / "out")],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(tmp_path / "compiled")},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        said.append(result.stderr)
    assert said[0].count("compiling, once, about") == 1
    compiled = set(said[0].splitlines()[-1].split())
    assert {"score_chains", "fill_rates", "_refine"} <= compiled
    assert compiled.isdisjoint({"deliver_batch", "rotate", "residual", "fit_scale", "concat_impl"})
    assert "compiling" not in said[1]
    assert said[1].splitlines()[-1] == ""


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--agents", "lookahed"), 2, "`name` must be one of"),
        (("--agents", "random,random"), 2, "`--agents` must be a comma-separated list without repetition"),
        (("--snr-db", "zero"), 2, "`--snr-db` must be a comma-separated list"),
        (("--snr-db", "nan"), 2, "`snr_db` must be a finite number"),
        (("--episodes", "0"), 2, "`episodes` must be an integer >= 1"),
        (("--workers", "0"), 2, "`--workers` must be an integer >= 1"),
        (("--bit-depths", "4,3"), 2, "`bit_depths` must be strictly ascending"),
        (("--bit-depths", "a"), 2, "For example: --bit-depths 3,4,8,10,16"),
        (("--agents", "lookahead,persistent-q5", "--episodes", "3"), 2, "`bits` must be one of the bit depths"),
        (("--snr-db", "0,500", "--episodes", "3"), 2, "`snr_db` must lie in"),
        (("--cache", "nowhere"), 3, "nowhere"),
    ],
)
def test_bad_arguments_end_in_one_sentence(
    arguments: tuple[str, ...], code: int, message: str, tmp_path: Path, gaussian_cache: Path
) -> None:
    base = () if "--cache" in arguments else ("--cache", str(gaussian_cache))
    assert_refused(run_evaluate(*arguments, *base, "--out", str(tmp_path / "out")), code, message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--warm-start x", "`--warm-start` must be STEP or STEP,shared, got 'x'"),
        ("--warm-start 25,share", "`--warm-start` must be STEP or STEP,shared, got '25,share'"),
        ("--warm-start -3", "`--warm-start` must be STEP or STEP,shared, got '-3'"),
        ("--warm-start 0", "`warm_start.step` must be an integer >= 1, got 0"),
        ("--warm-start 50", "`warm_start.step` must be in 1 … 49"),
        ("--name-bits 8", "`--name-bits` must go with a shared midpoint, got 8.0 without"),
        ("--warm-start 25 --name-bits 8", "`--name-bits` must go with a shared midpoint, got 8.0 without"),
        ("--warm-start 25,shared --name-bits 0", "`warm_start.name_bits` must be > 0, got 0.0"),
        ("--warm-start 25 --payload posterior_mean --agents dp", "`payload` must be 'latent' with a warm start"),
        ("--warm-start 25 --agents persistent-q3,learned", "`config` must be the system that learned was trained for"),
        ("--warm-start 25 --study ladder", "`--warm-start` must be left out of --study ladder"),
    ],
)
def test_bad_warm_starts_cost_no_episodes(words: str, message: str, gaussian_cache: Path, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(evaluate_module.main)
    given = [*words.split(), "--snr-db", "6", "--cache", str(gaussian_cache), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 2
    (said,) = result.stderr.splitlines()
    assert said.startswith(f"error: {message}")
    assert not (tmp_path / "out").exists()


def test_a_warm_start_is_in_tables_and_run(gaussian_cache: Path, tmp_path: Path) -> None:
    """Every policy that takes one; a shared midpoint is what a device shows to which nothing is delivered."""
    names = ",".join(name for name in agents.names() if name != "learned")
    words = ["--agents", names, "--snr-db", "6", "--episodes", "2", "--cache", gaussian_cache, "--no-figures"]
    run(evaluate_module.main, *words, "--warm-start", "20,shared", "--name-bits", "64", "--out", tmp_path)
    described = json.loads((tmp_path / "run.json").read_text())
    start = {"step": 20, "shared": True, "name_bits": 64.0}
    assert described["env_kwargs"]["warm_start"] == start
    assert all(system["warm_start"] == start for system in described["config"].values())
    rows = read_table(tmp_path / "episodes.csv", EPISODE_COLUMNS)
    cache = TrajectoryCache.open(gaussian_cache)
    for row in rows:
        latents = cache.latents(row["trajectory"]).astype(float)
        assert row["no_delivery_mse"] == pytest.approx(np.square(latents[20] - latents[0]).mean(), rel=1e-9)
        assert row["device_step"] <= 20


def test_an_output_that_cannot_be_written_costs_no_episodes(tmp_path: Path, gaussian_cache: Path) -> None:
    (tmp_path / "out").write_text("a file")
    result = run_evaluate("--cache", str(gaussian_cache), "--out", str(tmp_path / "out"))
    assert result.returncode == 3
    assert "`--out` must be a folder that can be written" in result.stderr
    assert "episode" not in result.stderr.replace("`--out`", "")


def test_defaults_are_the_paper_s() -> None:
    assert DEFAULT_SNRS_DB == (0, 3, 6, 9, 12, 15, 18, 21, 24, 27, 30)
    assert len(DEFAULT_AGENTS) == 7


def test_missing_matplotlib_costs_only_the_figure(
    gaussian_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    evaluate_module.main(
        agent_names="final-only", snr_db="0", episodes=2, out=tmp_path / "out", cache=str(gaussian_cache)
    )
    assert "pip install 'refine-env[plot]'" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"episodes.csv", "summary.csv", "run.json"}


def test_figure_of_zeros_and_unknown_agents(tmp_path: Path) -> None:
    row = dict.fromkeys(SUMMARY_COLUMNS, 0.0)
    summary = [
        {**row, "agent": agent, "snr_db": snr, "latent_mse": mse, "ci_high": mse, "no_delivery_mse": 1.85}
        for agent, snr, mse in (("final-only", 24.0, 0.0), ("final-only", 21.0, 1.8), ("mine", 24.0, 1e-3))
    ]
    written = draw_fig3a(summary, tmp_path)
    assert [path.name for path in written] == ["fig3a.png", "fig3a.pdf"]
    assert all(path.stat().st_size > 5000 for path in written)
