"""Checkpoints of a training of policies: numbers alone, from which it goes on to the same bits.

``checkpoint.safetensors`` holds arrays, and in its header one JSON text with everything else and a SHA-256 of all of
it. Nothing in it is executed: model and environments are made anew from the options, then filled. The checkpoint
before it stays beside it, as ``checkpoint.previous.safetensors``, and is used where the newer one is damaged.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from refine_env._files import replacing
from refine_env.errors import ConfigurationError, describe_error
from refine_env.learning import VectorRelativeReward
from refine_env.learning.policy import find_wrapper
from train.options import unreadable_checkpoint

if TYPE_CHECKING:
    from stable_baselines3.common.base_class import BaseAlgorithm

__all__ = ["Checkpoints"]

log = logging.getLogger("train.rl.checkpoint")

_REPLAY = ("observations", "next_observations", "actions", "rewards", "dones", "timeouts")

Arrays = dict[str, NDArray[Any]]


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: of the run.
        options: what the weights depend on; a run with others does not go on with these checkpoints.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any]) -> None:
        self._options = {name: str(value) for name, value in options.items()}
        self._folder = folder
        self._newest, self._previous = folder / "checkpoint.safetensors", folder / "checkpoint.previous.safetensors"
        self._damaged: Path | None = None

    def save(self, model: BaseAlgorithm, values: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write one; a kill or a power cut at any moment leaves a whole one.

        Args:
            model: the model, between two roll-outs, with its environments.
            values: what else the training depends on, JSON.
            arrays: likewise.
        """
        numbers, state = _model_state(model)
        state |= {f"training.{name}": array for name, array in arrays.items()}
        state = {name: np.require(array, requirements="C") for name, array in state.items()}
        text = json.dumps({"options": self._options, "training": values, **numbers})
        with replacing(self._newest) as temporary:
            save_file(state, temporary, {"state": text, "sha256": _digest(text, state)})
            if self._newest.exists() and self._newest != self._damaged:
                self._newest.replace(self._previous)
        self._damaged = None

    def restore(
        self, make_model: Callable[[], BaseAlgorithm], go_on: Callable[[dict[str, Any], Arrays], None]
    ) -> BaseAlgorithm | None:
        """The training as the newest checkpoint has it, or the one before where the newest is damaged.

        Args:
            make_model: makes the model and its environments, of the same options, not begun.
            go_on: takes the values and arrays that :meth:`save` was given.

        Returns:
            The model; None if there is no checkpoint.

        Raises:
            ConfigurationError: if there is none that can be read, or it is of a run with other options.
        """
        self._remove_temporary()
        if (self._folder / "checkpoint").exists():
            raise ConfigurationError(
                f"`--out` must not hold a checkpoint of an earlier version, got {str(self._folder / 'checkpoint')!r}, "
                "which is not read since it could run code. Delete that folder to begin anew, or give another --out."
            )
        for path in (self._newest, self._previous):
            if not path.exists():
                continue
            try:
                state, arrays = _read(path)
            except Exception as error:  # whatever is wrong with the file
                self._damaged = self._refuse(path, error)
                continue
            for name, value in self._options.items():
                saved = state["options"].get(name)
                if saved != value:
                    raise ConfigurationError(
                        f"`--{name.replace('_', '-')}` must be {saved!r:.200} to go on with {path}, got {value!r}. "
                        "Give the same options, or another --out."
                    )
            model = make_model()
            try:
                _fill_model(model, state, arrays)
                go_on(state["training"], _part(arrays, "training."))
            except Exception as error:  # a whole file, but of another version, or made by hand
                self._damaged = self._refuse(path, error)
                continue
            return model
        return None

    def _refuse(self, path: Path, error: Exception) -> Path:
        """The damaged file, if there is one before it to go on from."""
        why = describe_error(error)
        if path == self._previous or not self._previous.exists():
            raise unreadable_checkpoint("--out", path, why) from None
        log.warning("%s cannot be read (%s): going on from the one before it, %s", path, why, self._previous)
        return path

    def remove(self) -> None:
        """Remove them, since the training is done."""
        self._remove_temporary()
        for path in (self._newest, self._previous):
            path.unlink(missing_ok=True)

    def _remove_temporary(self) -> None:
        """What a run left that was killed while it wrote."""
        for path in self._folder.glob(f"{self._newest.name}*.tmp"):
            path.unlink()


def _digest(text: str, arrays: Mapping[str, NDArray[Any]]) -> str:
    sha256 = hashlib.sha256(text.encode())
    for name, array in sorted(arrays.items()):
        sha256.update(f"{name} {array.dtype} {array.shape}".encode())
        sha256.update(array.reshape(-1).view(np.uint8).data)
    return sha256.hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], Arrays]:
    if not path.is_file():
        raise ValueError("not a file")
    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
    if metadata["sha256"] != _digest(metadata["state"], arrays):
        raise ValueError("the content does not have the checksum that is written in it")
    state = json.loads(metadata["state"])
    if not isinstance(state["options"], dict):
        raise ValueError(f"options must be an object, got {state['options']!r:.80}")
    return state, arrays


def _fill(target: NDArray[Any], values: NDArray[Any], name: str) -> None:
    if (target.shape, target.dtype) != (values.shape, values.dtype):
        raise ValueError(f"{name} must be {target.dtype} {target.shape}, got {values.dtype} {values.shape}")
    target[...] = values


def _part(arrays: Arrays, prefix: str) -> Arrays:
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _model_state(model: Any) -> tuple[dict[str, Any], Arrays]:
    """Everything that the rest of a training depends on, apart from the options: JSON, and arrays."""
    import torch

    envs = model.get_env()
    arrays: Arrays = {f"envs.{name}": array for name, array in envs.arrays().items()}
    relative = find_wrapper(envs.envs, VectorRelativeReward)
    if relative is not None:
        arrays |= {f"relative.{name}": array for name, array in relative.cost.arrays().items()}
    arrays |= {f"policy.{name}": tensor.numpy() for name, tensor in model.policy.state_dict().items()}
    for k, entry in model.policy.optimizer.state_dict()["state"].items():
        arrays |= {f"optimizer.{k}.{name}": tensor.numpy() for name, tensor in entry.items()}
    arrays |= {"last_obs": model._last_obs, "last_starts": model._last_episode_starts}
    arrays["torch"] = torch.get_rng_state().numpy()
    legacy = np.random.get_state(legacy=False)  # noqa: NPY002 - what Stable-Baselines3 draws from
    arrays["numpy"] = legacy["state"].pop("key")
    state = {
        "numbers": {name: value for name, value in vars(model).items() if _is_number(value)},
        "episodes": list(model.ep_info_buffer),
        "generators": [generator.bit_generator.state for generator in envs.envs.unwrapped.np_random],
        "actions": model.action_space.np_random.bit_generator.state,
        "numpy": legacy,
        "python": random.getstate(),
    }
    buffer = getattr(model, "replay_buffer", None)
    if buffer is not None:
        state["replay"] = {"pos": buffer.pos, "full": buffer.full}
        arrays |= {f"replay.{name}": getattr(buffer, name)[: buffer.size()] for name in _REPLAY}
    return state, arrays


def _fill_model(model: Any, state: dict[str, Any], arrays: Arrays) -> None:
    """Put what :func:`_model_state` returned into a fresh model and its environments."""
    import torch

    envs = model.get_env()
    envs.resume(_part(arrays, "envs."))
    for generator, saved in zip(envs.envs.unwrapped.np_random, state["generators"], strict=True):
        generator.bit_generator.state = saved
    relative = find_wrapper(envs.envs, VectorRelativeReward)
    if relative is not None:
        for name, target in relative.cost.arrays().items():
            _fill(target, arrays[f"relative.{name}"], name)
    model.policy.load_state_dict({name: torch.from_numpy(array) for name, array in _part(arrays, "policy.").items()})
    optimizer = model.policy.optimizer.state_dict()
    for name, array in _part(arrays, "optimizer.").items():
        k, key = name.split(".")
        optimizer["state"].setdefault(int(k), {})[key] = torch.from_numpy(array)
    model.policy.optimizer.load_state_dict(optimizer)
    for name, value in vars(model).items():
        if _is_number(value):
            setattr(model, name, type(value)(state["numbers"][name]))
    episodes = [{"r": float(e["r"]), "l": int(e["l"]), "t": float(e["t"])} for e in state["episodes"]]
    model.ep_info_buffer = deque(episodes, maxlen=model._stats_window_size)
    model.ep_success_buffer = deque(maxlen=model._stats_window_size)
    model._last_obs = np.empty((envs.num_envs, *envs.observation_space.shape), envs.observation_space.dtype)
    model._last_episode_starts = np.empty(envs.num_envs, dtype=np.bool_)
    _fill(model._last_obs, arrays["last_obs"], "last_obs")
    _fill(model._last_episode_starts, arrays["last_starts"], "last_starts")
    buffer = getattr(model, "replay_buffer", None)
    if buffer is not None:
        buffer.pos, buffer.full = int(state["replay"]["pos"]), bool(state["replay"]["full"])
        if not 0 <= buffer.pos < buffer.buffer_size:
            raise ValueError(f"replay.pos must be in 0 … {buffer.buffer_size - 1}, got {buffer.pos}")
        for name in _REPLAY:
            _fill(getattr(buffer, name)[: buffer.size()], arrays[f"replay.{name}"], f"replay.{name}")
    model.action_space.np_random.bit_generator.state = state["actions"]
    if not 0 <= state["numpy"]["state"]["pos"] <= 624:  # NumPy does not look: it would read beyond the key
        raise ValueError(f"pos of the Mersenne Twister must be in 0 … 624, got {state['numpy']['state']['pos']}")
    state["numpy"]["state"]["key"] = arrays["numpy"]
    np.random.set_state(state["numpy"])  # noqa: NPY002
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    torch.set_rng_state(torch.from_numpy(arrays["torch"]))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
