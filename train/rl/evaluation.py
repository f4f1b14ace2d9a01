"""How good a policy is, beside reference policies on common random numbers: the rows of ``evaluations.csv``."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

import agents
from agents.policies.learned import Learned, PolicyFiles
from refine_env.commands import parse_list
from refine_env.evaluation import Table, read_table, roll_out
from train.rl.config import Config

__all__ = ["EVALUATION_COLUMNS", "MSE_FLOOR", "Evaluation", "geometric_mean_ratio", "read_evaluations"]

MSE_FLOOR = 1e-6
"""Added to both means where two policies are compared: differences below it do not count."""

EVALUATION_COLUMNS: dict[str, type] = {
    "steps": int,
    "seconds": float,
    "split": str,
    "agent": str,
    "snr_db": float,
    "episodes": int,
    "latent_mse": float,
}
"""Columns of ``evaluations.csv``: mean latent MSE at the deadline, after so many steps of the environment."""


def geometric_mean_ratio(rows: Table, agent: str, reference: str) -> tuple[float, float]:
    """How much worse one policy is than another over the SNRs that both were evaluated at.

    Returns:
        Geometric mean and largest of (MSE + 1e-6)/(the reference's MSE + 1e-6); NaN where there is nothing to compare.
    """
    means = {(row["agent"], row["snr_db"]): row["latent_mse"] for row in rows}
    snrs_db = [snr_db for name, snr_db in means if name == agent and (reference, snr_db) in means]
    if not snrs_db:
        return math.nan, math.nan
    ratios = [(means[agent, s] + MSE_FLOOR) / (means[reference, s] + MSE_FLOOR) for s in snrs_db]
    return float(np.exp(np.mean(np.log(ratios)))), max(ratios)


class Evaluation:
    """Evaluate a policy beside others on common draws; what the others score is computed once in a process."""

    _known: ClassVar[dict[tuple[str, str, int, int], float]] = {}

    def __init__(self, config: Config) -> None:
        self.config = config
        self.references: tuple[str, ...] = ()
        if config.rivals:
            self.references = parse_list("--rivals", config.rivals, str, advice="Give e.g. dp,lookahead, or nothing.")
        for name in self.references:
            agents.env_kwargs(name)  # an unknown name is known before the training

    def rows(self, files: PolicyFiles, split: str, episodes: int, steps: int, seconds: float) -> Table:
        """A row for the policy and for each reference policy at every SNR."""
        rows = []
        for snr_db in self.config.eval_snrs_db:
            kwargs = {**self.config.system_kwargs(), "snr_db": snr_db, "split": split}
            learner = partial(Learned, policy=files)
            scores = {"learned": self._score(learner, kwargs, episodes)}
            for name in self.references:
                key = (name, repr(kwargs), episodes, self.config.eval_seed)
                if key not in self._known:
                    reference = partial(agents.make, name)
                    self._known[key] = self._score(reference, {**kwargs, **self.reference_kwargs(name)}, episodes)
                scores[name] = self._known[key]
            rows += [
                {
                    "steps": steps,
                    "seconds": round(seconds, 1),
                    "split": split,
                    "agent": name,
                    "snr_db": snr_db,
                    "episodes": episodes,
                    "latent_mse": mse,
                }
                for name, mse in scores.items()
            ]
        return rows

    def reference_kwargs(self, name: str) -> dict[str, Any]:
        """Environment arguments of a reference policy: the training's, but the paper's policies keep their coder."""
        own = agents.env_kwargs(name)
        if own["coder"] == "forward":
            return own
        return {**own, "coder": self.config.coder, "payload": self.config.payload}

    def ratios(self, rows: Table) -> dict[str, tuple[float, float]]:
        """For each reference policy, :func:`geometric_mean_ratio` of the learned policy."""
        return {name: geometric_mean_ratio(rows, "learned", name) for name in self.references}

    def describe(self, rows: Table) -> str:
        """How the policy compares with each reference, whose coder is named where it is not the training's."""
        parts = []
        for name, (mean, worst) in self.ratios(rows).items():
            coder = self.reference_kwargs(name)["coder"]
            other = f" ({coder})" if coder != self.config.coder else ""
            parts.append(f"{mean:.3f} × {name}{other} (worst {worst:.3f})")
        return ", ".join(parts)

    def _score(self, make_policy: Callable[..., Any], kwargs: dict[str, Any], episodes: int) -> float:
        table = roll_out(make_policy, env_kwargs=kwargs, episodes=episodes, seed=self.config.eval_seed)
        return float(np.mean([row["latent_mse"] for row in table]))


def read_evaluations(folder: Path) -> Table:
    """The table ``evaluations.csv`` of a run.

    Raises:
        ConfigurationError: if it is missing or damaged.
    """
    return read_table(folder / "evaluations.csv", EVALUATION_COLUMNS, command="python -m train.ppo")
