"""What was learned, as tables and figures: ``python -m train.rl.study``.

Trains every variant with every seed (a run that is there is not repeated, an interrupted one goes on), several at a
time with ``--workers``, and writes into ``--out``:

- ``runs.csv``: a row per run and SNR, on the test split: the mean latent MSE and the normalized score;
- ``variants.csv``: a row per variant: interquartile mean of the normalized score with its stratified bootstrap
  interval, geometric mean of the MSE relative to the optimal schedule, environment steps and wall time;
- ``learning-curves.png``, ``learning-scores.png``: the curves over environment steps, and the scores;
- ``learning-ratios.png``: the first variant's mean latent MSE relative to the optimal schedule, by SNR.

The normalized score of an SNR is (log m_q − log m)/(log m_q − log m_dp): 0 is the best Persistent-Q, 1 the optimal
schedule; m is the mean latent MSE + 1e-6. An aggregate over SNRs and seeds is the mean of the middle half of the scores
(Agarwal et al., *Deep Reinforcement Learning at the Edge of the Statistical Precipice*, 2021), its interval the
bootstrap that resamples the seeds within every SNR.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from scipy.stats import gmean, trim_mean

from agents.figures import save_figure
from refine_env import ConfigurationError
from refine_env.commands import command, parse_list, run
from refine_env.config import PAPER_BIT_DEPTHS
from refine_env.errors import import_extra
from refine_env.evaluation import Table, percentile_interval, write_table
from train.options import show_log
from train.rl.config import Config
from train.rl.evaluation import MSE_FLOOR, read_evaluations
from train.rl.training import train, worker_pool

__all__ = [
    "VARIANTS",
    "bootstrap_interval",
    "iqm",
    "main",
    "normalized_scores",
    "run_variants",
    "summarize_runs",
]

log = logging.getLogger("train.rl.study")

OPTIMUM = "dp"
PERSISTENT = tuple(f"persistent-q{bits}" for bits in PAPER_BIT_DEPTHS)
REFERENCES = (OPTIMUM, "dp-inferred", "lookahead", *PERSISTENT)

VARIANTS: dict[str, dict[str, Any]] = {
    "maskable-ppo": {},
    "ppo": {"algorithm": "ppo"},
    "log-reward": {"reward": "log", "reward_scale": 0.1},
    "terminal-reward": {"reward": "terminal"},
    "improvement-reward": {"reward": "improvement"},
    "normalized": {"encoding": "normalized"},
    "normalized-last-10": {"encoding": "normalized", "history": 10},
    "one-hot": {"encoding": "one-hot"},
    "no-hindsight": {"hindsight": False},
    "sampled-misses": {"expected_misses": False},
    "cloned-lookahead": {"clone": "lookahead-closed-loop"},
    "dqn": {"algorithm": "dqn", "rollout_steps": 4, "batch_size": 512, "epochs": 2, "learning_rate": 3e-4},
}
"""Options in which each variant differs from the first."""

RUN_COLUMNS: dict[str, type] = {
    "variant": str,
    "seed": int,
    **dict.fromkeys(("snr_db", "latent_mse", "score", "ratio"), float),
}
VARIANT_COLUMNS: dict[str, type] = {
    "variant": str,
    "seeds": int,
    **dict.fromkeys(("iqm", "ci_low", "ci_high", "ratio", "ratio_low", "ratio_high", "worst_ratio"), float),
    "steps": int,
    **dict.fromkeys(("seconds", "steps_per_second"), float),
}

Scores = dict[float, dict[str, float]]
"""Score, ratio to the optimum and latent MSE of one run, by SNR in dB."""


# --- Statistics ------------------------------------------------------------------------------------


def iqm(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Interquartile mean over the last axis: the mean of what is left when a quarter at each end is cut off."""
    mean: NDArray[np.float64] = trim_mean(scores, 0.25, axis=-1)
    return mean


def bootstrap_interval(
    values: NDArray[np.float64],
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]] = iqm,
    *,
    level: float = 0.95,
    resamples: int = 2_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Stratified percentile bootstrap interval of a statistic of all values.

    Args:
        values: (seeds, SNRs); seeds are drawn with replacement, at every SNR on their own.
        statistic: takes an array and returns the statistic over its last axis.
        level: the coverage.
        resamples: the number of bootstrap replicates.
        seed: seed of the resampling.

    Returns:
        Lower and upper end of the interval.
    """
    rng = np.random.default_rng(seed)
    seeds, strata = values.shape
    drawn = rng.integers(seeds, size=(resamples, seeds, strata))
    return percentile_interval(statistic(values[drawn, np.arange(strata)].reshape(resamples, -1)), level=level)


def _means(rows: Table) -> dict[float, dict[str, float]]:
    """The mean latent MSE + 1e-6 of every policy at every SNR in one evaluation.

    Raises:
        ConfigurationError: if the optimum or Persistent-Q is not among the policies.
    """
    means: dict[float, dict[str, float]] = {}
    for row in rows:
        means.setdefault(row["snr_db"], {})[row["agent"]] = row["latent_mse"] + MSE_FLOOR
    for found in means.values():
        if OPTIMUM not in found or not set(PERSISTENT) & set(found):
            raise ConfigurationError(
                f"`--runs` must hold runs that were evaluated beside {OPTIMUM} and a Persistent-Q, got {sorted(found)}."
                " Train them with python -m train.rl.study."
            )
    return means


def normalized_scores(rows: Table) -> Scores:
    """Score and ratio to the optimum of the learned policy at every SNR.

    Args:
        rows: the rows of one evaluation, with the learned policy, the optimum and Persistent-Q.

    Raises:
        ConfigurationError: if one of these is missing.
    """
    scores = {}
    for snr_db, mean in _means(rows).items():
        worst = math.log(min(mean[name] for name in PERSISTENT if name in mean))
        best, own = math.log(mean[OPTIMUM]), math.log(mean["learned"])
        # Where Persistent-Q is as good as the optimum there is nothing to tell.
        scores[snr_db] = {
            "score": (worst - own) / (worst - best) if worst - best > 1e-3 else math.nan,
            "ratio": math.exp(own - best),
            "latent_mse": mean["learned"] - MSE_FLOOR,
        }
    return scores


# --- Runs ------------------------------------------------------------------------------------------


def run_variants(folder: Path, names: Sequence[str], seeds: int, base: Config, *, workers: int = 1) -> None:
    """Train what is not there yet, into ``folder/VARIANT/SEED``.

    Args:
        folder: of the runs.
        names: of the variants.
        seeds: every variant is trained with the seeds 0 … seeds − 1.
        base: the options that the variants change.
        workers: processes, each with a training of its own.

    Raises:
        ConfigurationError: if a variant is unknown, or a run is there with other options.
    """
    for name in names:
        if name not in VARIANTS:
            raise ConfigurationError(
                f"`--variants` must be among {', '.join(VARIANTS)}, got {name!r}. Choose among them."
            )
    wanted = [
        replace(base, out=folder / name / str(seed), seed=seed, **VARIANTS[name])
        for seed in range(seeds)
        for name in names
    ]
    missing = [config for config in wanted if not _is_there(config)]
    if workers == 1:
        for config in missing:
            log.info("%s", config.out)
            train(config)
        return
    with worker_pool(workers) as pool:
        for out in pool.map(train, missing):
            log.info("%s done", out)


def _is_there(config: Config) -> bool:
    """Whether a finished run with these options is in its folder.

    Raises:
        ConfigurationError: if there is one with others.
    """
    path = config.out / "run.json"
    if not path.is_file():
        return False
    options = json.loads(path.read_text(encoding="utf-8"))["options"]
    evaluated = {name: getattr(config, name) for name in ("test_episodes", "eval_seed", "rivals")}
    for name, value in {**config.trained_with(), **evaluated}.items():
        if options.get(name) != str(value):
            raise ConfigurationError(
                f"`--runs` must hold runs with the same options, got {config.out} with {name} {options.get(name)} in "
                f"place of {value}. Give another --runs."
            )
    return True


def summarize_runs(folder: Path, names: Sequence[str]) -> tuple[Table, Table, dict[str, Table]]:
    """The runs that are there.

    Returns:
        Rows with :data:`RUN_COLUMNS`, rows with :data:`VARIANT_COLUMNS`, and of each variant the learning curve on the
        train split: rows of ``steps``, ``seeds``, ``iqm``, ``ci_low`` and ``ci_high`` of the score, and ``ratio``,
        ``ratio_low`` and ``ratio_high``, the geometric mean of the MSE relative to the optimal schedule.

    Raises:
        ConfigurationError: if there are none.
    """
    runs: Table = []
    variants: Table = []
    curves: dict[str, Table] = {}
    for name in names:
        paths = sorted((folder / name).glob("*/run.json"))
        if not paths:
            continue
        tables = [read_evaluations(path.parent) for path in paths]
        scores = [normalized_scores([row for row in rows if row["split"] == "test"]) for rows in tables]
        runs += [
            {"variant": name, "seed": int(path.parent.name), "snr_db": snr_db, **values}
            for path, own in zip(paths, scores, strict=True)
            for snr_db, values in own.items()
        ]
        points: dict[int, list[Scores]] = {}  # on the train split, after so many steps
        for rows in tables:
            trained = [row for row in rows if row["split"] == "train"]
            for steps in sorted({row["steps"] for row in trained}):
                points.setdefault(steps, []).append(normalized_scores([r for r in trained if r["steps"] == steps]))
        curves[name] = [{"steps": steps, **_aggregate(points[steps])} for steps in sorted(points)]
        records = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
        seconds, mean_steps = (float(np.mean([record[key] for record in records])) for key in ("seconds", "steps"))
        variants.append(
            {
                "variant": name,
                **_aggregate(scores),
                "worst_ratio": float(gmean(_array(scores, "ratio").T, axis=-1).max()),
                "steps": int(mean_steps),
                "seconds": round(seconds, 1),
                "steps_per_second": round(int(mean_steps) / max(seconds, 1e-9)),
            }
        )
    if not variants:
        raise ConfigurationError(f"`--runs` must hold finished runs, got none in {str(folder)!r}. Train some first.")
    return runs, variants, curves


def _array(scores: Sequence[Scores], key: str) -> NDArray[np.float64]:
    """One number of every run at every SNR, (runs, SNRs)."""
    return np.array([[values[key] for values in own.values()] for own in scores])


def _aggregate(scores: Sequence[Scores]) -> dict[str, Any]:
    """Score and ratio over runs and SNRs, with intervals; SNRs without a score are left out of the score."""
    table, ratios = _array(scores, "score"), _array(scores, "ratio")
    table = table[:, np.isfinite(table).all(axis=0)]
    geometric_mean = partial(gmean, axis=-1)
    low, high = bootstrap_interval(table)
    ratio_low, ratio_high = bootstrap_interval(ratios, geometric_mean)
    return {
        "seeds": len(table),
        "iqm": float(iqm(table.ravel())),
        "ci_low": low,
        "ci_high": high,
        "ratio": float(geometric_mean(ratios.ravel())),
        "ratio_low": ratio_low,
        "ratio_high": ratio_high,
    }


# --- Figures ---------------------------------------------------------------------------------------


def _new_figure(width: float, height: float) -> Any:
    return import_extra("matplotlib.figure", "plot").Figure(figsize=(width, height), layout="constrained")


def _set_ticks(axes: Any, ticks: list[float]) -> None:
    """Have these ticks alone on a logarithmic vertical axis, as plain numbers."""
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


_LARGEST_RATIO = 10.0  # that the curves show


def draw_curves(curves: dict[str, Table], out: Path) -> list[Path]:
    """Learning curves on the train split, with intervals: the MSE relative to the optimum, and the normalized score."""
    figure = _new_figure(9.0, 4.4 if len(curves) == 1 else 5.0)
    ratios, scores = figure.subplots(1, 2)
    for k, (name, rows) in enumerate(curves.items()):
        x = np.array([row["steps"] for row in rows]) / 1e6
        line = {"color": f"C{k % 10}", "ls": "-" if k < 10 else "--", "marker": ".", "markersize": 4}
        for axes, key, low, high in (
            (ratios, "ratio", "ratio_low", "ratio_high"),
            (scores, "iqm", "ci_low", "ci_high"),
        ):
            axes.plot(x, [row[key] for row in rows], label=name if axes is ratios else None, **line)
            band = [[row[bound] for row in rows] for bound in (low, high)]
            axes.fill_between(x, *band, color=line["color"], alpha=0.15, lw=0)
    for axes, label in ((ratios, "MSE relative to dp\n(geometric mean"), (scores, "normalized score\n(IQM")):
        axes.axhline(1.0, color="black", lw=0.8, ls="--")
        axes.set_xlim(left=0.0)
        axes.set_xlabel("environment steps [10⁶]")
        axes.set_ylabel(f"{label} over the SNRs)")
        axes.grid(alpha=0.3)
    ratios.set_yscale("log")
    ratios.set_ylim(0.9, min(ratios.get_ylim()[1], _LARGEST_RATIO))
    top = ratios.get_ylim()[1]
    fine, coarse = (0.9, 0.95, 1.0, 1.05, 1.1, 1.15, 1.2, 1.3), (1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 10.0)
    _set_ticks(ratios, [tick for tick in (fine if top < 1.4 else coarse) if tick <= top])
    bottom = max(scores.get_ylim()[0], -0.2)
    scores.set_ylim(bottom, 1.0 + 0.05 * (1.0 - bottom))
    if len(curves) > 1:
        figure.legend(loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return save_figure(figure, out, "learning-curves")


def draw_scores(variants: Table, out: Path) -> list[Path]:
    """Interquartile mean of each variant with its interval."""
    figure = _new_figure(7.0, 0.6 + 0.4 * len(variants))
    axes = figure.add_subplot()
    for k, row in enumerate(variants):
        axes.plot([row["ci_low"], row["ci_high"]], [k, k], color=f"C{k % 10}", lw=6, alpha=0.35, solid_capstyle="butt")
        axes.plot(row["iqm"], k, color=f"C{k % 10}", marker="|", markersize=14, markeredgewidth=2)
    axes.set_yticks(range(len(variants)), [f"{row['variant']} ({row['seeds']} seeds)" for row in variants])
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", lw=0.8, ls="--")
    axes.set_xlabel("normalized score on the test split\n0: best Persistent-Q, 1: optimal schedule")
    axes.grid(alpha=0.3, axis="x")
    return save_figure(figure, out, "learning-scores")


def draw_ratios(name: str, folder: Path, out: Path) -> list[Path]:
    """Mean latent MSE of a variant's runs relative to the optimal schedule, by SNR, beside the other policies'."""
    figure = _new_figure(6.4, 3.8)
    axes = figure.add_subplot()
    paths = sorted((folder / name).glob("*/run.json"))
    others: dict[str, dict[float, float]] = {}
    for k, path in enumerate(paths):
        means = _means([row for row in read_evaluations(path.parent) if row["split"] == "test"])
        snrs_db = sorted(means)
        ratios = [means[snr_db]["learned"] / means[snr_db][OPTIMUM] for snr_db in snrs_db]
        label = f"{name}, each of {len(paths)} seeds" if k == 0 else None
        axes.plot(snrs_db, ratios, color="C0", lw=0.8, marker=".", alpha=0.7, label=label)
        others = {
            other: {snr_db: means[snr_db][other] / means[snr_db][OPTIMUM] for snr_db in snrs_db}
            for other in REFERENCES[1:3]
            if other in means[snrs_db[0]]
        }
    for k, (other, by_snr) in enumerate(others.items(), start=1):
        axes.plot(list(by_snr), list(by_snr.values()), color=f"C{k}", marker="x", ls="--", label=other)
    axes.axhline(1.0, color="black", lw=0.8)
    axes.set_yscale("log")
    _set_ticks(axes, [0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0])
    axes.set_xticks(snrs_db)
    axes.set_xlabel("SNR [dB]")
    axes.set_ylabel("mean latent MSE, relative to dp")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    return save_figure(figure, out, "learning-ratios")


@command
def main(
    out: Annotated[Path, typer.Option(help="Folder for tables and figures.")] = Path("results/learning"),
    runs: Annotated[Path, typer.Option(help="Folder of the runs.")] = Path("runs/study"),
    variants: Annotated[str, typer.Option(help="Comma-separated variants; 'all' for all of them.")] = "maskable-ppo",
    seeds: Annotated[int, typer.Option(help="Seeds of every variant; 0: train nothing.", min=0, max=1_000_000)] = 5,
    total_steps: Annotated[
        int, typer.Option(help="Steps of every run; 0: the default of train.ppo.", min=0, max=10**12)
    ] = 0,
    test_episodes: Annotated[
        int, typer.Option(help="Episodes of the evaluation on the test split.", min=1, max=10**7)
    ] = 4000,
    eval_seed: Annotated[int, typer.Option(help="Seed of the evaluations.", min=0)] = 1,
    workers: Annotated[int, typer.Option(help="Trainings at a time.", min=1, max=1024)] = 1,
    cache: Annotated[str, typer.Option(help="Name or folder of a trajectory cache.")] = "default",
) -> None:
    """Train the variants that are not trained yet, and write tables and figures.

    Exit codes: 0 done, 2 an argument is wrong, 3 a cache is missing or damaged, or the output cannot be written, 4 an
    extra is not installed.
    """
    show_log()
    names = list(VARIANTS)
    if variants != "all":
        names = list(parse_list("--variants", variants, str, advice="Give e.g. maskable-ppo,ppo, or all."))
    steps = total_steps or Config().total_steps
    base = Config(
        cache=cache,
        total_steps=steps,
        eval_every=max(1, steps // 12),
        test_episodes=test_episodes,
        eval_seed=eval_seed,
        rivals=",".join(REFERENCES),
        progress=False,
        tensorboard=False,
    )
    run_variants(runs, names, seeds, base, workers=workers)
    rows, summary, curves = summarize_runs(runs, names)
    write_table(out / "runs.csv", rows, RUN_COLUMNS)
    write_table(out / "variants.csv", summary, VARIANT_COLUMNS)
    draw_curves(curves, out)
    draw_scores(summary, out)
    draw_ratios(summary[0]["variant"], runs, out)
    for row in summary:
        typer.echo(
            f"{row['variant']}: IQM {row['iqm']:.3f} [{row['ci_low']:.3f}, {row['ci_high']:.3f}], "
            f"{row['ratio']:.3f} × {OPTIMUM}, {row['steps']} steps, {row['seconds']:.0f} s"
        )


if __name__ == "__main__":
    run(main)
