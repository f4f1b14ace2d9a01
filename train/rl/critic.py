"""A privileged critic: in training alone, the critic knows the channel to come.

The return of an episode depends on its channel far more than on one action. The channel does not depend on the
actions, so the critic may know it: a baseline of what is exogenous leaves the policy gradient unbiased and takes the
channel's part out of its variance (Mao et al., *Variance Reduction for Reinforcement Learning in Input-Driven
Environments*, 2019). The actor never sees these numbers: it reads the first columns of the observation, and the
exported policy has no others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from sb3_contrib.common.maskable.policies import MaskableActorCriticPolicy
from stable_baselines3.common.policies import ActorCriticPolicy
from torch import nn

from refine_env._compiled import kernel
from refine_env.wrappers import RefinementVectorWrapper, VectorEncodeObservation

__all__ = ["AsymmetricPolicy", "MaskableAsymmetricPolicy", "PrivilegedObservation"]


@kernel
def _fill(
    starts: NDArray[np.int64],
    rates: NDArray[np.float64],
    latent_dim: int,
    bit_depths: NDArray[np.float64],
    out: NDArray[np.float32],
) -> None:
    """What the slots to come carry, and how late each bit depth is through, sent now or as clean latent.

    Args:
        starts: the slots from which on the two could be sent, now and with the clean latent (2, N).
        rates: bits per slot (N, T_d).
        latent_dim: M.
        bit_depths: sizes of the messages per dimension (|𝓑|,).
        out: the columns, overwritten (N, 1 + 2 (|𝓑| + 1)).
    """
    deadline = rates.shape[1]
    depths = bit_depths.size
    for i in range(out.shape[0]):
        total = 0.0
        for k in range(deadline):
            total += rates[i, k]
        out[i, 0] = np.log2(total / latent_dim / 16.0 + 1e-3) / 4.0
        for kind in range(2):
            column = 1 + kind * (depths + 1)
            carried, b = 0.0, 0
            for n in range(starts[kind, i], deadline + 1):
                carried += rates[i, n - 1] / latent_dim
                while b < depths and carried >= bit_depths[b]:
                    out[i, column + b] = (deadline - n + 1.0) / 20.0
                    b += 1
            while b < depths:
                out[i, column + b] = max((carried - bit_depths[b]) / 16.0, -1.0)
                b += 1
            out[i, column + depths] = np.log2(carried / 16.0 + 1e-3) / 4.0


class PrivilegedObservation(RefinementVectorWrapper):
    """The encoded observation with, at its end, columns on the channel to come.

    Args:
        env: the vector environment with encoded observations.

    Attributes:
        actor_features: columns that the actor may see.
    """

    def __init__(self, env: VectorEncodeObservation) -> None:
        super().__init__(env)
        self._encoded = env
        self.actor_features = env.encoder.space.shape[0]
        config = env.encoder.config
        self._depths = config.message_bits / config.latent_dim
        self._latent_dim = config.latent_dim
        self.num_columns = 1 + 2 * (len(self._depths) + 1)
        width = self.actor_features + self.num_columns
        self.single_observation_space = spaces.Box(-10.0, 10.0, (width,), np.float32)
        self.observation_space = spaces.Box(-10.0, 10.0, (self.num_envs, width), np.float32)

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start episodes."""
        observations, infos = self.env.reset(seed=seed, options=options)
        return self._widen(observations), infos

    def step(
        self, actions: Any
    ) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Act."""
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        if "final_obs" in infos:  # nothing is to come
            padding = np.zeros(self.num_columns, dtype=np.float32)
            for i in np.flatnonzero(infos["_final_obs"]):
                infos["final_obs"][i] = np.concatenate([infos["final_obs"][i], padding])
        return self._widen(observations), rewards, terminated, truncated, infos

    def _widen(self, observations: NDArray[np.float32]) -> NDArray[np.float32]:
        seen = self._encoded.observations
        wide = np.empty((len(observations), self.actor_features + self.num_columns), dtype=np.float32)
        wide[:, : self.actor_features] = observations
        slots, rates = seen["slot"], self.env.unwrapped.episode_rates  # type: ignore[attr-defined]
        with_clean_latent = np.minimum(slots + seen["server_step"], rates.shape[1] + 1)
        starts = np.stack([slots, with_clean_latent])
        _fill(starts, rates, self._latent_dim, self._depths, wide[:, self.actor_features :])
        return wide


class _Extractor(nn.Module):
    """Two separate networks: the actor's on the first columns, the critic's on all."""

    def __init__(
        self, width: int, actor_features: int, actor: list[int], critic: list[int], activation: type[nn.Module]
    ) -> None:
        super().__init__()
        self.actor_features = actor_features
        self.policy_net = self._network([actor_features, *actor], activation)
        self.value_net = self._network([width, *critic], activation)
        self.latent_dim_pi, self.latent_dim_vf = [actor_features, *actor][-1], [width, *critic][-1]

    @staticmethod
    def _network(sizes: list[int], activation: type[nn.Module]) -> nn.Sequential:
        layers: list[nn.Module] = []
        for k, size in enumerate(sizes[1:]):
            layers += [nn.Linear(sizes[k], size), activation()]
        return nn.Sequential(*layers)

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.forward_actor(features), self.forward_critic(features)

    def forward_actor(self, features: torch.Tensor) -> torch.Tensor:
        latent: torch.Tensor = self.policy_net(features[:, : self.actor_features])
        return latent

    def forward_critic(self, features: torch.Tensor) -> torch.Tensor:
        latent: torch.Tensor = self.value_net(features)
        return latent


class _Asymmetric:
    """Mixin: the actor sees ``actor_features`` columns, the critic all of them."""

    def __init__(self, *args: Any, actor_features: int, **kwargs: Any) -> None:
        self.actor_features = actor_features
        super().__init__(*args, **kwargs)

    def _build_mlp_extractor(self) -> None:
        arch: Any = self.net_arch  # type: ignore[attr-defined]
        actor, critic = (arch["pi"], arch["vf"]) if isinstance(arch, dict) else (arch, arch)
        self.mlp_extractor: Any = _Extractor(
            self.features_dim,  # type: ignore[attr-defined]
            self.actor_features,
            actor,
            critic,
            self.activation_fn,  # type: ignore[attr-defined]
        )

    def _get_constructor_parameters(self) -> dict[str, Any]:
        return {**super()._get_constructor_parameters(), "actor_features": self.actor_features}  # type: ignore[misc]


class AsymmetricPolicy(_Asymmetric, ActorCriticPolicy):
    """Actor and critic of PPO, the critic with more columns."""


class MaskableAsymmetricPolicy(_Asymmetric, MaskableActorCriticPolicy):
    """Actor and critic of MaskablePPO, the critic with more columns."""
