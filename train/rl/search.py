"""Search the options of ``python -m train.ppo``: ``python -m train.rl.search``.

A study of Optuna over short trainings: every trial trains with options that the sampler draws, and is scored, on the
train split, with the geometric mean of (MSE + 1e-6)/(the reference policy's + 1e-6) over the SNRs; trials that are
behind the others are ended early. The study is kept in ``--out``: ``study.db``, from which the same command goes on,
and ``trials.csv``, every trial with its options and score. Several processes may work on one study (``--workers``).
"""

from __future__ import annotations

import json
import logging
import math
from concurrent.futures import wait
from pathlib import Path
from typing import Annotated, Any

import typer

import agents
from refine_env import ConfigurationError
from refine_env.commands import command, run
from refine_env.errors import import_extra
from refine_env.evaluation import Table, write_table
from train.options import require_extra, show_log
from train.rl.config import EXTRA, Config
from train.rl.evaluation import geometric_mean_ratio, read_evaluations
from train.rl.training import train, worker_pool

__all__ = ["SPACE", "main", "search", "suggest"]

log = logging.getLogger("train.rl.search")

SPACE: dict[str, tuple[Any, ...]] = {
    "learning_rate": (3e-4, 3e-3),
    "gae_lambda": (0.9, 1.0),
    "entropy": (0.003, 0.2),
    "final_entropy": (1e-5, 3e-3),
    "clip_range": (0.1, 0.4),
    "relative_power": (0.1, 1.0),
    "relative_until": (0.1, 0.8),
    "relative_cap": (30.0, 1000.0),
    "first_wait": (0.5, 0.97),
    "epochs": ("4", "8", "12"),
    "batch_size": ("1024", "2048", "4096"),
    "rollout_steps": ("64", "128", "256"),
    "actor": ("64,64", "96,96", "64,64,64"),
    "activation": ("tanh", "relu"),
}
"""Option: lowest and highest value of a number, or the choices (texts)."""

_LOGARITHMIC = ("learning_rate", "entropy", "final_entropy", "relative_power", "relative_cap")
_INTEGERS = ("epochs", "batch_size", "rollout_steps")


def suggest(trial: Any) -> dict[str, Any]:
    """Options that the study's sampler draws for a trial."""
    options: dict[str, Any] = {}
    for name, values in SPACE.items():
        if isinstance(values[0], str):
            choice = trial.suggest_categorical(name, values)
            options[name] = int(choice) if name in _INTEGERS else choice
        else:
            options[name] = trial.suggest_float(name, *values, log=name in _LOGARITHMIC)
    options["critic"] = options["actor"]
    return options


def search(
    out: Path,
    *,
    trials: int,
    base: dict[str, Any],
    rival: str = "dp",
    seed: int = 0,
    workers: int = 1,
    start_with_defaults: bool = True,
) -> Any:
    """Run trials of a study, or go on with it until it has so many.

    Args:
        out: folder of the study.
        trials: how many finished ones it is to have.
        base: options of every trial, of :class:`train.rl.config.Config`.
        rival: the policy that the score is relative to.
        seed: of the sampler (one higher in every further process) and of the trainings.
        workers: processes, each with trials of its own.
        start_with_defaults: the first trial is that of the defaults, so that the search cannot end below them.

    Returns:
        The study.

    Raises:
        MissingExtraError: if a package of the ``train`` extra is not installed.
        ConfigurationError: if there is no such policy, or an option is out of range.
    """
    require_extra("train", EXTRA)
    optuna = import_extra("optuna", "train")
    agents.env_kwargs(rival)  # an unknown policy is known before the first trial
    out.mkdir(parents=True, exist_ok=True)
    study = _open(out, seed)
    if start_with_defaults and not study.trials:
        defaults = {name: getattr(Config(), name) for name in SPACE}
        study.enqueue_trial(
            {name: str(value) if isinstance(SPACE[name][0], str) else value for name, value in defaults.items()}
        )
    waiting = (optuna.trial.TrialState.WAITING,)
    if workers == 1:
        _work(out, trials, base, rival, seed, seed)
    else:
        with worker_pool(workers) as pool:
            running = [pool.submit(_work, out, trials, base, rival, seed, seed)]
            # Of trials that wait, two processes could claim the same one: SQLite has no row locks. New ones are safe.
            while not running[0].done() and study.get_trials(deepcopy=False, states=waiting):
                wait(running, timeout=0.1)
            running += [pool.submit(_work, out, trials, base, rival, seed, seed + k) for k in range(1, workers)]
            for process in running:
                process.result()
    write_trials(out, study)
    return study


def _open(out: Path, sampler_seed: int) -> Any:
    """The study in a folder, begun if there is none."""
    import optuna

    return optuna.create_study(
        study_name="train.ppo",
        storage=f"sqlite:///{(out / 'study.db').resolve()}",
        sampler=optuna.samplers.TPESampler(seed=sampler_seed, n_startup_trials=8, constant_liar=True),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5),
        direction="minimize",
        load_if_exists=True,
    )


def _work(out: Path, trials: int, base: dict[str, Any], rival: str, seed: int, sampler_seed: int) -> None:
    """Run trials, one after the other, until the study has so many finished ones."""
    import optuna

    study = _open(out, sampler_seed)

    def objective(trial: Any) -> float:
        folder = out / "trials" / f"{trial.number:03d}"
        options = {
            **base,
            **suggest(trial),
            "out": folder,
            "seed": seed,
            "rivals": rival,
            "progress": False,
            "tensorboard": False,
        }
        config = Config(**options)
        reported = 0

        def prune(_: int) -> None:
            nonlocal reported
            if not (folder / "evaluations.csv").is_file():
                return
            steps, (score, _worst) = _newest_score(folder, rival)
            if steps > reported:
                reported = steps
                trial.report(math.log(score), steps)
                if trial.should_prune():
                    raise optuna.TrialPruned

        train(config, on_rollout=prune)
        _, (score, worst) = _newest_score(folder, rival)
        trial.set_user_attr("ratio", score)
        trial.set_user_attr("worst", worst)
        trial.set_user_attr("seconds", json.loads((folder / "run.json").read_text())["seconds"])
        return math.log(score)

    over = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    if len(study.get_trials(deepcopy=False, states=over)) < trials:
        enough = optuna.study.MaxTrialsCallback(trials, states=over)
        study.optimize(objective, callbacks=[lambda study, _: write_trials(out, study), enough])


def _newest_score(folder: Path, rival: str) -> tuple[int, tuple[float, float]]:
    """Steps of a run's newest evaluation on the train split, and geometric mean and largest of its ratios."""
    rows = [row for row in read_evaluations(folder) if row["split"] == "train"]
    steps = max((row["steps"] for row in rows), default=0)
    return steps, geometric_mean_ratio([row for row in rows if row["steps"] == steps], "learned", rival)


def write_trials(out: Path, study: Any) -> None:
    """Write ``trials.csv``: a row a trial, the best first."""
    columns = dict.fromkeys(("trial", "state", "ratio", "worst", "seconds", *SPACE), str)
    rows: Table = [
        {**dict.fromkeys(columns, ""), "trial": trial.number, "state": trial.state.name.lower()}
        | trial.user_attrs
        | trial.params
        for trial in study.trials
    ]
    rows.sort(key=lambda row: row["ratio"] or math.inf)
    write_table(out / "trials.csv", rows, columns)


@command
def main(
    out: Annotated[Path, typer.Option(help="Folder of the study.")] = Path("runs/search"),
    trials: Annotated[int, typer.Option(help="Trials that the study is to have.", min=1, max=10**6)] = 40,
    total_steps: Annotated[int, typer.Option(help="Steps of every trial.", min=1, max=10**12)] = 2_000_000,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations.", min=1)] = 500_000,
    eval_episodes: Annotated[int, typer.Option(help="Episodes of an evaluation, per SNR.", min=1, max=10**7)] = 1000,
    rival: Annotated[str, typer.Option(help="Policy that the score is relative to.")] = "dp",
    cache: Annotated[str, typer.Option(help="Name or folder of a trajectory cache.")] = "default",
    coder: Annotated[str, typer.Option(help="Refinement coder of the environment.")] = "closed_loop",
    seed: Annotated[int, typer.Option(help="Seed of the sampler and of the trainings.", min=0, max=2**32 - 1)] = 0,
    workers: Annotated[int, typer.Option(help="Processes, each with trials of its own.", min=1, max=1024)] = 1,
) -> None:
    """Search options of the training, or go on with a study.

    Exit codes: 0 done, 2 an argument is wrong, 3 a cache is missing or damaged, or the output cannot be written, 4 the
    train extra is not installed.
    """
    show_log()
    if eval_every > total_steps:
        raise ConfigurationError(
            f"`--eval-every` must be at most --total-steps, got {eval_every}. A trial has no score without it."
        )
    base = {
        "total_steps": total_steps,
        "eval_every": eval_every,
        "eval_episodes": eval_episodes,
        "test_episodes": 1,
        "cache": cache,
        "coder": coder,
    }
    study = search(out, trials=trials, base=base, rival=rival, seed=seed, workers=workers)
    best = study.best_trial
    typer.echo(f"best of {len(study.trials)} trials: {best.number}, {best.user_attrs}, {best.params}")


if __name__ == "__main__":
    run(main)
