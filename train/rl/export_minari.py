"""Offline data: roll-outs of any policy as a Minari dataset: ``python -m train.rl.export_minari``.

Every episode keeps its seed, so that ``env.reset(seed=...)`` replays it, and the dataset keeps the environment's spec::

    import minari
    import refine_env  # registers the environment that the dataset names

    dataset = minari.load_dataset("refine_env/latent-refinement/dp-6dB-v0")
    env = dataset.recover_environment()

Minari keeps datasets in the folder of ``MINARI_DATASETS_PATH``, by default ``~/.minari/datasets``.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Annotated, Any

import gymnasium as gym
import numpy as np
import typer
from numpy.typing import NDArray

import agents
import refine_env
from refine_env import ConfigurationError
from refine_env._validation import check_integer
from refine_env.commands import command, run
from refine_env.errors import import_extra
from refine_env.evaluation import episode_seeds
from train.options import parse_numbers

__all__ = ["export", "main", "roll_out_episodes"]

_LONGEST_ID = 200
_DATA_FORMAT = "hdf5"  # Minari 0.5.4 cannot read back scalar infos in its arrow format


def roll_out_episodes(
    name: str, env_kwargs: dict[str, Any], *, episodes: int, seed: int = 0, batch_size: int = 256
) -> list[dict[str, Any]]:
    """Whole episodes of a policy on the native vector environment.

    Args:
        name: of the policy, see :func:`agents.names`.
        env_kwargs: the environment's arguments, complete.
        episodes: how many.
        seed: of the roll-out; episode k has the seed that an evaluation gives it.
        batch_size: episodes played at once; what is played does not depend on it for a deterministic policy.

    Returns:
        Of each episode of L steps ``seed``; ``observations``, arrays (L + 1, ...) by key; ``actions``, ``rewards``,
        ``terminations``, ``truncations`` (L,); and ``infos``, arrays (L + 1, ...) by key.

    Raises:
        ConfigurationError: if an argument is out of range.
    """
    seeds = episode_seeds(seed, episodes)
    size = min(check_integer("batch_size", batch_size, 1, advice="Give for example 256."), episodes)
    played: list[dict[str, Any]] = []
    for start in range(0, episodes, size):
        batch = seeds[start : start + size]
        envs: Any = gym.make_vec(refine_env.ENV_ID, num_envs=len(batch), **env_kwargs)
        agent = agents.make(name, envs.unwrapped.config)
        agent.reset(len(batch))
        observations, infos = envs.reset(seed=batch)
        seen, known = [observations], [infos]
        acted: list[NDArray[Any]] = []
        paid: list[NDArray[Any]] = []
        lengths = np.zeros(len(batch), dtype=np.int64)
        while (lengths == 0).any():  # an ended episode is followed by another, which is left out
            actions = np.asarray(agent.select_action(observations, infos))
            observations, rewards, terminated, _, infos = envs.step(actions)
            for history, value in ((seen, observations), (known, infos), (acted, actions), (paid, rewards)):
                history.append(value)
            lengths[terminated & (lengths == 0)] = len(acted)
        envs.close()
        played.extend(_cut(i, length, seen, known, acted, paid) for i, length in enumerate(lengths.tolist()))
    for episode, own in zip(played, seeds, strict=True):
        episode["seed"] = own
    return played


def _cut(i: int, length: int, seen: list[Any], known: list[Any], acted: list[Any], paid: list[Any]) -> dict[str, Any]:
    """Episode ``i`` of a batch, its first ``length`` steps."""
    return {
        "observations": _stack(seen[: length + 1], i),
        "actions": np.array([values[i] for values in acted[:length]]),
        "rewards": np.array([values[i] for values in paid[:length]]),
        "terminations": np.arange(1, length + 1) == length,
        "truncations": np.zeros(length, dtype=np.bool_),
        "infos": _stack(known[: length + 1], i),
    }


def _stack(history: list[Any], i: int) -> dict[str, NDArray[Any]]:
    """The values of environment ``i`` over time, by key; keys that begin with ``_`` are the vector env's own."""
    return {key: np.array([values[key][i] for values in history]) for key in history[0] if key[0] != "_"}


def export(
    dataset_id: str,
    name: str,
    env_kwargs: dict[str, Any],
    *,
    episodes: int,
    seed: int = 0,
    description: str | None = None,
) -> Any:
    """Roll a policy out and keep its episodes as a Minari dataset.

    Args:
        dataset_id: ``(namespace/)(environment/)name-vN``; must not exist yet.
        name: of the policy, see :func:`agents.names`.
        env_kwargs: the environment's arguments; the policy's own ``agents.env_kwargs`` come on top.
        episodes: how many.
        seed: of the roll-out.
        description: what the dataset is; None: a sentence that says it.

    Returns:
        The dataset.

    Raises:
        MissingExtraError: if Minari is not installed.
        ConfigurationError: if the dataset exists or an argument is out of range.
        CacheError: if the cache is missing or damaged.
    """
    minari = import_extra("minari", "train")
    buffers = import_extra("minari.data_collector.episode_buffer", "train")
    import_extra("h5py", "train")
    parse_dataset_id = import_extra("minari.dataset.minari_dataset", "train").parse_dataset_id
    try:
        if len(dataset_id) > _LONGEST_ID:  # which Minari would take very long to look at
            raise ValueError(f"more than {_LONGEST_ID} characters")
        parse_dataset_id(dataset_id)
    except (TypeError, ValueError) as error:  # the former of a name without a version
        raise ConfigurationError(
            f"`dataset_id` must be of the form (namespace/)(environment/)name-vN, got {dataset_id!r} ({error}). "
            "Give for example refine_env/latent-refinement/dp-6dB-v0."
        ) from None
    try:
        existing = minari.list_local_datasets()
    except ValueError as error:  # of a folder that is no dataset's
        raise ConfigurationError(
            f"`--out` must be a folder of Minari datasets alone, got one with something else ({error}). Give another."
        ) from None
    if dataset_id in existing:
        raise ConfigurationError(
            f"`dataset_id` must be a new dataset, got {dataset_id!r}, which exists. Choose another name or version."
        )
    kwargs = {**env_kwargs, **agents.env_kwargs(name)}
    played = roll_out_episodes(name, kwargs, episodes=episodes, seed=seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* is set to None", UserWarning)  # address and permanent link
        return minari.create_dataset_from_buffers(
            dataset_id,
            [buffers.EpisodeBuffer(id=k, **episode) for k, episode in enumerate(played)],
            env=gym.make(refine_env.ENV_ID, **kwargs),
            algorithm_name=name,
            author="The refine-env developers",
            description=description or f"{episodes} episodes of {name}, seed {seed}, arguments {kwargs}.",
            requirements=[f"refine-env=={refine_env.__version__}"],
            data_format=_DATA_FORMAT,
            jpeg_encoding=False,
        )


@command
def main(
    dataset_id: Annotated[str, typer.Argument(help="Name, e.g. refine_env/latent-refinement/dp-6dB-v0.")],
    agent: Annotated[str, typer.Option(help="The policy.")] = "dp",
    snr_db: Annotated[str, typer.Option(help="SNR in dB, or low,high to draw it for every episode.")] = "6",
    episodes: Annotated[int, typer.Option(help="Number of episodes.", min=1)] = 1000,
    seed: Annotated[int, typer.Option(help="Seed of the roll-out.", min=0)] = 0,
    cache: Annotated[str, typer.Option(help="Name or folder of a trajectory cache.")] = "default",
    split: Annotated[str, typer.Option(help="Trajectories: train, test or all.")] = "train",
    decision_epochs: Annotated[bool, typer.Option(help="Run through the slots in which only WAIT is legal.")] = False,
    reward: Annotated[str, typer.Option(help="Reward: terminal, improvement, log or anytime.")] = "terminal",
    out: Annotated[Path | None, typer.Option(help="Folder of datasets.", show_default="Minari's own")] = None,
) -> None:
    """Write roll-outs of a policy as a Minari dataset.

    Exit codes: 0 done, 2 an argument is wrong, 3 a cache is missing or damaged, or the output cannot be written, 4 the
    train extra is not installed.
    """
    snrs_db = parse_numbers("snr_db", snr_db, float)
    if out is not None:
        os.environ["MINARI_DATASETS_PATH"] = str(out.resolve())  # Minari joins a relative one twice
    kwargs = {
        "cache": cache,
        "split": split,
        "snr_db": snrs_db[0] if len(snrs_db) == 1 else list(snrs_db),
        "decision_epochs": decision_epochs,
        "reward": reward,
    }
    dataset = export(dataset_id, agent, kwargs, episodes=episodes, seed=seed)
    typer.echo(f"wrote {dataset_id}: {dataset.total_episodes} episodes, {dataset.total_steps} steps")


if __name__ == "__main__":
    run(main)
