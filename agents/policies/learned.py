"""A policy that was learned: a small network on the encoded observation, evaluated with NumPy.

A learned policy is a folder of two files, which ``python -m train.ppo`` writes: ``policy.json``, with the system and
the encoding that it was trained for and a hash of the weights, and ``policy.safetensors``, the weights. (``model.zip``
beside them is Stable-Baselines3's own, for whoever wants the critic; nothing here reads it, and neither torch nor
Stable-Baselines3 is needed.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load

from agents.base import Agent
from refine_env import ConfigurationError, SystemConfig
from refine_env.wrappers import ObservationEncoder

__all__ = ["ACTIVATIONS", "FORMAT", "SHIPPED", "Learned", "PolicyFiles", "read_policy"]

FORMAT = 2
"""Format version of ``policy.json``; version 1 has no ``weights_sha256``, and is still read."""

SHIPPED = Path(__file__).parent / "shipped"
"""Folder of the policy that ``learned`` names."""

ACTIVATIONS = ("tanh", "relu")
_FREE = ("snr_db", "latency_quantile", "decoder_curve")  # fields of the system that the policy does not depend on
_COMMAND = "python -m train.ppo"


class PolicyFiles(NamedTuple):
    """What the folder of a learned policy holds.

    Attributes:
        description: of ``policy.json``.
        layers: weights (outputs, inputs) and biases (outputs,) of every layer, float32.
    """

    description: dict[str, Any]
    layers: list[tuple[NDArray[np.float32], NDArray[np.float32]]]


def read_policy(folder: str | Path) -> PolicyFiles:
    """Read the folder of a learned policy.

    Raises:
        ConfigurationError: if a file is missing, is not of that form, or the weights are not those described.
    """
    folder = Path(folder)
    remedy = f"Train one with: {_COMMAND} --out {folder}"
    for name in ("policy.json", "policy.safetensors"):
        if not (folder / name).is_file():
            raise ConfigurationError(
                f"`learned:PATH` must name the folder of a learned policy, got {str(folder)!r} without {name}. {remedy}"
            )
    try:
        description = json.loads((folder / "policy.json").read_text(encoding="utf-8"))
        if description["format"] not in (1, FORMAT) or description["activation"] not in ACTIVATIONS:
            raise ValueError(f"format {description['format']}, activation {description['activation']}")
        for key in ("system", "encoder", "env_kwargs"):
            if not isinstance(description[key], dict):
                raise ValueError(f"{key} {description[key]!r}")
        content = (folder / "policy.safetensors").read_bytes()
        arrays = load(content)
        if description["format"] > 1 and hashlib.sha256(content).hexdigest() != description["weights_sha256"]:
            raise ValueError("policy.safetensors does not have the SHA-256 that policy.json says")
        layers = _layers(arrays)
    except Exception as error:
        raise ConfigurationError(
            f"`learned:PATH` must name the folder of a learned policy of format {FORMAT}, got {str(folder)!r}, which "
            f"cannot be read ({type(error).__name__}: {error!s:.200}). {remedy}"
        ) from None
    return PolicyFiles(description, layers)


def _layers(arrays: dict[str, NDArray[Any]]) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Weights and biases of every layer.

    Raises:
        ValueError: if one is missing, not finite float32, or does not fit the layer before it.
    """
    layers = []
    inputs: int | None = None
    for k in range(max(1, len(arrays) // 2)):
        weight, bias = arrays[f"{k}.weight"], arrays[f"{k}.bias"]
        if weight.ndim != 2 or inputs not in (None, weight.shape[1]):
            raise ValueError(f"{k}.weight must have shape (outputs, {inputs or 'inputs'}), got {weight.shape}")
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{k}.bias must have shape {weight.shape[:1]}, got {bias.shape}")
        for name, array in (("weight", weight), ("bias", bias)):
            if array.dtype != np.float32 or not np.isfinite(array).all():
                wrong = array[~np.isfinite(array)][0] if array.dtype == np.float32 else array.dtype
                raise ValueError(f"{k}.{name} must be finite float32, got {wrong}")
        layers.append((weight, bias))
        inputs = len(bias)
    return layers


class Learned(Agent):
    """The most likely legal action of a trained network.

    One policy may serve a range of SNRs: it is not told the SNR, and infers it from the channel history.

    Args:
        config: the system; but for SNR and latency quantile it has to be the one that the policy was trained for.
        path: the policy's folder, default the shipped one.
        policy: what was read of it, where that is at hand.

    Raises:
        ConfigurationError: if there is no such policy, or it was trained for another system.
    """

    def __init__(self, config: SystemConfig, *, path: str | Path = SHIPPED, policy: PolicyFiles | None = None) -> None:
        path = Path(path)
        super().__init__(config, name="learned" if path == SHIPPED else f"learned:{path}")
        files = read_policy(path) if policy is None else policy
        # A field that is younger than the policy had its default when the policy was trained.
        trained = {**SystemConfig(snr_db=0.0).to_dict(), **files.description["system"]}
        mine = config.to_dict()
        for key in sorted({*trained, *mine} - set(_FREE)):
            if trained.get(key) != mine.get(key):
                short = f"got {mine.get(key)!r}" if len(repr(mine.get(key))) < 80 else "got another"
                wanted = repr(trained.get(key)) if len(repr(trained.get(key))) < 80 else "its own"
                raise ConfigurationError(
                    f"`config` must be the system that {self.name} was trained for ({key} {wanted}), {short}. "
                    f"Train a policy for it with: {_COMMAND}"
                )
        self.encoder = ObservationEncoder(config, **files.description["encoder"])
        self._history_length = None  # the encoder knows it
        self.layers = files.layers
        self._tanh = files.description["activation"] == "tanh"
        widths = [len(self.encoder.names), *(len(bias) for _, bias in self.layers)]
        if [weight.shape[1] for weight, _ in self.layers] != widths[:-1] or widths[-1] != config.num_actions:
            raise ConfigurationError(
                f"`path` must hold weights from {len(self.encoder.names)} numbers to {config.num_actions} actions, got "
                f"{[weight.shape for weight, _ in self.layers]} in {str(path)!r}. Train it anew with: {_COMMAND}"
            )

    def logits(self, encoded: NDArray[np.float32]) -> NDArray[np.float32]:
        """The network: logits of the actions, (N, n), for encoded observations (N, D)."""
        hidden = encoded
        for k, (weight, bias) in enumerate(self.layers):
            hidden = hidden @ weight.T + bias
            if k < len(self.layers) - 1:
                hidden = np.tanh(hidden) if self._tanh else np.maximum(hidden, 0.0)
        return hidden

    def decide(self, observation: Mapping[str, NDArray[Any]], legal: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The most likely action, where there is a choice."""
        actions = np.zeros(len(legal), dtype=np.int64)
        if legal.any():
            chosen = {key: np.asarray(values)[legal] for key, values in observation.items()}
            actions[legal] = self.logits(self.encoder.encode(chosen)).argmax(axis=1)
        return actions
