"""What an agent learns with the default hyperparameters of Stable-Baselines3: ``python -m train.rl.out_of_the_box``.

Every training is ``Algorithm(policy, gym.make(id, snr_db=...), seed=...).learn(steps)`` with nothing else set, on the
paper's setting and on the set-up for learning, and every model plays the same draws as the reference policies.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from concurrent.futures import as_completed
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import numpy as np
import typer

import agents
import refine_env
from refine_env.commands import command, parse_list, print_table, run
from refine_env.evaluation import Table, bootstrap_interval, read_table, roll_out, write_table
from train.options import require_extra, show_log
from train.rl.training import worker_pool

__all__ = ["ALGORITHMS", "COLUMNS", "REFERENCES", "SETUPS", "compare", "main", "score_references", "train_and_score"]

log = logging.getLogger("train.rl")

SETUPS = {"paper": refine_env.ENV_ID, "learning": refine_env.LEARNING_ID}
ALGORITHMS = ("maskable-ppo", "ppo")
REFERENCES = ("persistent-q4", "lookahead", "dp")

COLUMNS: dict[str, type] = {
    "setup": str,
    "algorithm": str,
    "snr_db": float,
    "seed": int,
    "steps": int,
    "episodes": int,
    "latent_mse": float,
    "ci_low": float,
    "ci_high": float,
    "to_lookahead": float,
}
"""Columns of ``out_of_the_box.csv``; the last is the mean divided by that of the paper's look-ahead."""

_Key = tuple[str, str, float, int]


def train_and_score(key: _Key, steps: int, episodes: int, cache: str) -> list[float]:
    """Train a model with nothing but defaults; return the latent MSE of every episode of the evaluation.

    Args:
        key: set-up, algorithm, SNR in dB, and seed.
        steps: of the environment.
        episodes: of the evaluation, on the test split.
        cache: name or folder of a trajectory cache.
    """
    import torch
    from sb3_contrib import MaskablePPO
    from stable_baselines3 import PPO

    from refine_env.sb3 import evaluate_sb3

    torch.set_num_threads(1)
    setup, algorithm, snr_db, seed = key
    env = gym.make(SETUPS[setup], snr_db=snr_db, cache=cache)
    kind: Any = MaskablePPO if algorithm == "maskable-ppo" else PPO
    policy = "MultiInputPolicy" if isinstance(env.observation_space, gym.spaces.Dict) else "MlpPolicy"
    model = kind(policy, env, seed=seed, device="cpu").learn(steps)
    return [row["latent_mse"] for row in evaluate_sb3(model, episodes=episodes)]


def score_references(snrs_db: Sequence[float], episodes: int, cache: str) -> Table:
    """Rows of the reference policies, each on the coder that it is made for, on the same draws."""
    rows = []
    for snr_db in snrs_db:
        errors = {
            name: [
                row["latent_mse"]
                for row in roll_out(
                    partial(agents.make, name),
                    env_kwargs={"snr_db": snr_db, "cache": cache, **agents.env_kwargs(name)},
                    episodes=episodes,
                )
            ]
            for name in REFERENCES
        }
        rows += [
            _row(("reference", name, snr_db, 0), 0, values, errors["lookahead"]) for name, values in errors.items()
        ]
    return rows


def _row(key: _Key, steps: int, errors: Sequence[float], lookahead: Sequence[float]) -> dict[str, Any]:
    low, high = bootstrap_interval(np.array(errors))
    setup, algorithm, snr_db, seed = key
    return {
        "setup": setup,
        "algorithm": algorithm,
        "snr_db": snr_db,
        "seed": seed,
        "steps": steps,
        "episodes": len(errors),
        "latent_mse": float(np.mean(errors)),
        "ci_low": low,
        "ci_high": high,
        "to_lookahead": float(np.mean(errors) / np.mean(lookahead)),
    }


def compare(
    out: Path,
    *,
    setups: Sequence[str],
    snrs_db: Sequence[float],
    seeds: int,
    total_steps: int,
    episodes: int,
    cache: str = "default",
    workers: int = 1,
) -> Table:
    """Train and score what is missing in the table of a folder, and return the table.

    Args:
        out: the folder; ``out_of_the_box.csv`` is written anew after every training.
        setups: of :data:`SETUPS`.
        snrs_db: in dB.
        seeds: trainings with seeds 0, 1, … of every set-up, algorithm and SNR.
        total_steps: of every training.
        episodes: of every evaluation.
        cache: name or folder of a trajectory cache.
        workers: processes; 1 is this one.

    Raises:
        ConfigurationError, CacheError: as the environment does.
    """
    path = out / "out_of_the_box.csv"
    rows = read_table(path, COLUMNS, command="python -m train.rl.out_of_the_box") if path.exists() else []
    rows = [row for row in rows if row["steps"] in (0, total_steps) and row["episodes"] == episodes]
    done = {(row["setup"], row["algorithm"], row["snr_db"], row["seed"]) for row in rows}
    missing_snrs = [snr_db for snr_db in snrs_db if ("reference", "lookahead", snr_db, 0) not in done]
    rows += score_references(missing_snrs, episodes, cache)
    write_table(path, rows, COLUMNS)
    lookahead = {row["snr_db"]: row["latent_mse"] for row in rows if row["algorithm"] == "lookahead"}
    wanted = itertools.product(range(seeds), setups, ALGORITHMS, snrs_db)
    keys = [(setup, name, snr, seed) for seed, setup, name, snr in wanted if (setup, name, snr, seed) not in done]

    def note(key: _Key, errors: Sequence[float]) -> None:
        rows.append(_row(key, total_steps, errors, [lookahead[key[2]]]))
        write_table(path, rows, COLUMNS)
        mse, ratio = rows[-1]["latent_mse"], rows[-1]["to_lookahead"]
        log.info("%s, %s, %g dB, seed %d: %.3g, %.2f × look-ahead", *key, mse, ratio)

    if workers == 1:
        for key in keys:
            note(key, train_and_score(key, total_steps, episodes, cache))
        return rows
    with worker_pool(workers) as pool:
        running = {pool.submit(train_and_score, key, total_steps, episodes, cache): key for key in keys}
        for future in as_completed(running):
            note(running[future], future.result())
    return rows


def _figures(row: dict[str, Any]) -> tuple[str, str]:
    return f"{row['latent_mse']:.3g}", f"{row['to_lookahead']:.2f}"


@command
def main(
    out: Annotated[Path, typer.Option(help="Folder of the table.")] = Path("runs/out_of_the_box"),
    setups: Annotated[str, typer.Option(help=f"Set-ups, of {', '.join(SETUPS)}.")] = ",".join(SETUPS),
    snr_db: Annotated[str, typer.Option(help="SNRs in dB.")] = "3,6,12",
    seeds: Annotated[int, typer.Option(help="Seeds of every training.", min=1, max=1000)] = 3,
    total_steps: Annotated[int, typer.Option(help="Steps of every training.", min=1, max=10**9)] = 200_000,
    episodes: Annotated[int, typer.Option(help="Episodes of every evaluation.", min=1, max=10**7)] = 2_000,
    cache: Annotated[str, typer.Option(help="Name or folder of a trajectory cache.")] = "default",
    workers: Annotated[int, typer.Option(help="Trainings side by side.", min=1, max=1024)] = 1,
) -> None:
    """Train with default hyperparameters, or go on with what is missing in the table.

    Exit codes: 0 done, 2 an argument is wrong, 3 a cache is missing or damaged, or the output cannot be written, 4 the
    train extra is not installed.
    """
    require_extra("train", ("stable_baselines3", "sb3_contrib"))
    show_log()
    chosen = parse_list("--setups", setups, str, advice=f"Choose of {', '.join(SETUPS)}.", valid={*SETUPS}.issuperset)
    snrs_db = parse_list("--snr-db", snr_db, float, advice="Give e.g. 3,6,12.")
    rows = compare(
        out,
        setups=chosen,
        snrs_db=snrs_db,
        seeds=seeds,
        total_steps=total_steps,
        episodes=episodes,
        cache=cache,
        workers=workers,
    )
    sides: dict[str, Any] = {"set-up": "left", "algorithm": "left"}
    sides |= dict.fromkeys(("dB", "seed", "MSE", "× look-ahead"), "right")
    lines = [(row["setup"], row["algorithm"], f"{row['snr_db']:g}", str(row["seed"]), *_figures(row)) for row in rows]
    print_table(sides, lines, title=f"Mean latent MSE, test split, {episodes:,} draws")


if __name__ == "__main__":
    run(main)
