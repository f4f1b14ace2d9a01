"""The training of a policy: roll-outs and updates, checkpoints, evaluations, and the files of the result."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from refine_env import ConfigurationError, __version__
from refine_env.evaluation import Table, write_atomically, write_table
from train.options import require_extra, show_log
from train.rl.config import EXTRA, Config
from train.rl.evaluation import EVALUATION_COLUMNS, Evaluation

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from stable_baselines3.common.base_class import BaseAlgorithm

__all__ = ["Clock", "WeightAverage", "train", "worker_pool"]

log = logging.getLogger("train.ppo")

_VERSIONS = ("numpy", "gymnasium", "torch", "stable_baselines3", "sb3_contrib")
_LEAST_ENTROPY = 1e-12  # added to both ends, since a geometric schedule cannot end at 0


def train(config: Config, on_rollout: Callable[[int], None] | None = None) -> Path:
    """Train, or go on training, and write policy and tables.

    Args:
        config: the options.
        on_rollout: called with the number of steps done before every roll-out, after its checkpoint.

    Returns:
        The folder, ``config.out``.

    Raises:
        MissingExtraError: if a package of the ``train`` extra is not installed.
        ConfigurationError: if an option cannot be used, or differs from the checkpoint's.
        CacheError: if the cache is missing or damaged.
    """
    require_extra("train", EXTRA)
    import torch

    torch.set_num_threads(config.threads)
    config.out.mkdir(parents=True, exist_ok=True)
    _Training(config, on_rollout).run()
    return config.out


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """Fresh processes for trainings side by side, which log as this one does."""
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"), initializer=show_log)


class WeightAverage:
    """The mean of a network's weights over the last part of a training.

    What a minibatch does to the weights at the end is noise, which costs most where a rare miss does; the mean of many
    has less of it (Izmailov et al., *Averaging Weights Leads to Wider Optima and Better Generalization*, 2018).

    Args:
        count: how many weights the mean is of so far.
        weights: the mean so far, float64 (number of parameters,).
    """

    def __init__(self, count: int = 0, weights: Any = 0.0) -> None:
        self.count = count
        self.weights = weights

    def arrays(self) -> dict[str, NDArray[np.float64]]:
        """The mean so far by name; nothing before the first weights are taken into it."""
        return {"average": self.weights.numpy()} if self.count else {}

    def add(self, policy: Any) -> None:
        """Take a policy's weights, as they are now, into the mean."""
        import torch

        self.count += 1
        now = torch.nn.utils.parameters_to_vector(policy.parameters()).detach().double()
        self.weights = self.weights + (now - self.weights) / self.count

    def put_into(self, policy: Any) -> None:
        """Set a policy's weights to the mean."""
        import torch

        torch.nn.utils.vector_to_parameters(self.weights.float(), policy.parameters())


class Clock:
    """Wall time of a training in seconds, without the time for which it is stopped.

    Args:
        seconds: what was measured before an interruption.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._before = seconds
        self._since: float | None = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return self._before + (0.0 if self._since is None else time.monotonic() - self._since)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Do not count what is done in this context."""
        self._before, self._since = self.seconds, None
        try:
            yield
        finally:
            self._since = time.monotonic()


class _Training:
    """One training: the model, what it scored so far, and what is done before every roll-out."""

    def __init__(self, config: Config, on_rollout: Callable[[int], None] | None) -> None:
        from refine_env.learning import VectorRelativeReward
        from refine_env.learning.policy import find_wrapper
        from train.rl.checkpoint import Checkpoints
        from train.rl.envs import make_envs
        from train.rl.models import make_model

        self.config, self.on_rollout = config, on_rollout
        self.evaluation = Evaluation(config)
        self.checkpoints = Checkpoints(config.out, config.trained_with())
        self.rows: Table = []
        self.average = WeightAverage()
        self.clock = Clock()
        found = self.checkpoints.restore(lambda: make_model(config, make_envs(config)), self._go_on)
        self.is_new = found is None
        self.model: BaseAlgorithm = make_model(config, make_envs(config)) if found is None else found
        if found is not None:
            log.info("going on after %d steps", self.steps)
        elif config.clone:
            _begin_with_a_clone(config, self.model)
        self.bar = tqdm(total=config.total_steps, initial=self.steps, unit="step", disable=not config.progress)
        adapter: Any = self.model.get_env()
        self.relative = find_wrapper(adapter.envs, VectorRelativeReward)
        self._saved = time.monotonic()
        self._evaluated = self.steps // max(config.eval_every, 1)

    @property
    def steps(self) -> int:
        """Steps of the environment done so far, over all copies."""
        return int(self.model.num_timesteps)

    def _go_on(self, values: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
        """Take what :meth:`before_rollout` put into the checkpoint."""
        import torch

        self.rows = [{name: kind(row[name]) for name, kind in EVALUATION_COLUMNS.items()} for row in values["rows"]]
        if values["averaged"]:
            self.average = WeightAverage(int(values["averaged"]), torch.from_numpy(arrays["average"]))
        self.clock = Clock(float(values["seconds"]))

    def run(self) -> None:
        """Train to the last step, evaluate, and write the result."""
        from stable_baselines3.common.callbacks import BaseCallback

        training = self

        class BeforeRollout(BaseCallback):
            def _on_rollout_start(self) -> None:
                training.before_rollout()

            def _on_step(self) -> bool:
                return True

        config, model = self.config, self.model
        try:
            model.learn(
                config.total_steps - self.steps,
                callback=BeforeRollout(),
                reset_num_timesteps=self.is_new,
                tb_log_name=config.algorithm,
                log_interval=1,
            )
        except ValueError:  # of a distribution whose parameters are no numbers any more
            if all(bool(weights.isfinite().all()) for weights in model.policy.parameters()):
                raise
            raise ConfigurationError(
                f"`learning_rate` must keep the weights finite, got some that are not after {self.steps} steps. "
                "Take a smaller one, or a smaller `reward_scale` or `max_grad_norm`."
            ) from None
        self.average.add(model.policy)
        self.average.put_into(model.policy)
        self._finish(self.clock.seconds)

    def before_rollout(self) -> None:
        """Between two roll-outs, when all is settled: schedules, evaluation, checkpoint."""
        config, model, done = self.config, self.model, self.steps
        self.bar.update(done - self.bar.n)
        share = min(done / config.total_steps, 1.0)
        if hasattr(model, "ent_coef"):
            first, last = config.entropy + _LEAST_ENTROPY, config.final_entropy + _LEAST_ENTROPY
            model.ent_coef = first ** (1.0 - share) * last**share
        if self.relative is not None:
            part = min(share / config.relative_until, 1.0)
            self.relative.cost.power = config.relative_power + (1.0 - config.relative_power) * part
        if config.eval_every and done // config.eval_every > self._evaluated:
            self._evaluated = done // config.eval_every
            self.evaluate("train", config.eval_episodes)
        if time.monotonic() - self._saved >= config.checkpoint_every:
            with self.clock.stopped():
                values = {"seconds": self.clock.seconds, "rows": self.rows, "averaged": self.average.count}
                self.checkpoints.save(model, values, self.average.arrays())
            self._saved = time.monotonic()
        # After the checkpoint, since a training that goes on with it does this anew.
        if done >= config.average_from * config.total_steps:
            self.average.add(model.policy)
        if self.on_rollout is not None:
            self.on_rollout(done)

    def evaluate(self, split: str, episodes: int) -> None:
        """Score the policy as it is now, and write the table anew."""
        from train.rl.models import policy_files

        with self.clock.stopped():
            files = policy_files(self.config, self.model)
            fresh = self.evaluation.rows(files, split, episodes, self.steps, self.clock.seconds)
            self.rows.extend(fresh)
            write_table(self.config.out / "evaluations.csv", self.rows, EVALUATION_COLUMNS)
        described = self.evaluation.describe(fresh)
        log.info("%d steps, %.0f s, %s: %s", self.steps, self.clock.seconds, split, described)
        self.bar.set_postfix_str(described)
        for name, (mean, worst) in self.evaluation.ratios(fresh).items():
            self.model.logger.record(f"eval/ratio_{name}", mean)
            self.model.logger.record(f"eval/worst_{name}", worst)

    def _finish(self, seconds: float) -> None:
        """Write the policy, its last scores and the record of the run."""
        from train.rl.models import export_policy, policy_files

        config, model = self.config, self.model
        self.bar.update(self.steps - self.bar.n)
        export_policy(config.out, policy_files(config, model))
        model.save(config.out / "model.zip")
        self.evaluate("train", config.eval_episodes)
        self.evaluate("test", config.test_episodes)
        self.bar.close()
        model.logger.dump(self.steps)
        run = {
            "command": config.command(),
            "options": {key: str(value) for key, value in dataclasses.asdict(config).items()},
            "steps": self.steps,
            "seconds": round(seconds, 1),
            "ratios": self.evaluation.ratios([row for row in self.rows if row["split"] == "test"]),
            "versions": {"refine-env": __version__, **{name: metadata.version(name) for name in _VERSIONS}},
        }
        write_atomically(config.out / "run.json", json.dumps(run, indent=1) + "\n")
        self.checkpoints.remove()


def _begin_with_a_clone(config: Config, model: BaseAlgorithm) -> None:
    from train.rl.cloning import clone, demonstrate
    from train.rl.envs import make_envs

    low, high = config.snr_range
    demonstration = demonstrate(
        lambda snr_db: make_envs(dataclasses.replace(config, snr_db=str(snr_db))),
        np.linspace(low, high, math.ceil(high - low) + 1).tolist(),
        config.clone,
        config.clone_decisions,
        config.seed,
    )
    share = clone(model, *demonstration, seed=config.seed)
    log.info("repeats %.1f %% of the decisions of %s", 100.0 * share, config.clone)
