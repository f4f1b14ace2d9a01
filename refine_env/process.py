"""The decision process that both environments present: draws, observations, rewards and infos of N episodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray

from refine_env._compiled import kernel
from refine_env.coding import LOSSLESS_BITS
from refine_env.config import SystemConfig
from refine_env.errors import ActionError, ConfigurationError
from refine_env.link import draw_rates
from refine_env.settings import REWARDS, EnvSettings
from refine_env.simulator import NO_ACTION, EpisodeBatch, fill_channel_history
from refine_env.trajectories import TrajectoryCache

__all__ = ["INFO_KEYS", "DecisionProcess", "make_observation_space"]

INFO_KEYS = (
    "action_mask",
    "bits_sent",
    "delivered",
    "illegal_action",
    "latent_mse",
    "num_deliveries",
    "trajectory",
    "uplink_slots",
)
LOG_REWARD_FLOOR = 1e-8
TERMINAL, IMPROVEMENT = REWARDS.index("terminal"), REWARDS.index("improvement")
_OPTION_KEYS = ("trajectory", "rates")


def make_observation_space(config: SystemConfig, history_length: int) -> spaces.Dict:
    """The observation space; it does not depend on the SNR, so that one policy can serve all."""
    ceiling = config.max_bits_per_dimension
    max_error = max(1.0, config.make_coder().max_error)
    return spaces.Dict(
        {
            "slot": spaces.Discrete(config.deadline + 2),
            "server_step": spaces.Discrete(config.num_steps + 1),
            "device_step": spaces.Discrete(config.num_steps + 1),
            "channel_history": spaces.Box(0.0, ceiling, (history_length,), np.float32),
            "remaining_bits": spaces.Box(0.0, ceiling, (1,), np.float32),
            "device_error": spaces.Box(0.0, max_error, (1,), np.float32),
            "device_bits": spaces.Discrete(LOSSLESS_BITS + 1),
        }
    )


@kernel
def fill_rewards(
    kind: int,
    actions: NDArray[np.int64],
    slots: NDArray[np.int64],
    deadline: int,
    before: NDArray[np.float64],
    after: NDArray[np.float64],
    out: NDArray[np.float64],
) -> None:
    """Rewards of one step, (N,).

    Args:
        kind: position in ``settings.REWARDS``.
        actions: what was done; ``NO_ACTION`` earns 0.
        slots: n after the step.
        deadline: T_d.
        before: latent MSE before the step.
        after: latent MSE after it.
        out: the rewards.
    """
    for i in range(out.size):
        out[i] = 0.0
        if actions[i] == NO_ACTION:
            continue
        if kind == IMPROVEMENT:
            out[i] = before[i] - after[i]
        elif slots[i] > deadline:
            out[i] = -after[i] if kind == TERMINAL else -10.0 * np.log10(after[i] + LOG_REWARD_FLOOR)


class DecisionProcess:
    """N episodes of one environment, without Gymnasium's single or vector interface.

    Args:
        settings: the environment's arguments.
        num_envs: N.

    Attributes:
        settings, cache, config: what the arguments describe.
        episodes: the dynamics.
        observation_space, action_space: of one episode.
    """

    def __init__(self, settings: EnvSettings, num_envs: int) -> None:
        self.settings = settings
        self.cache: TrajectoryCache = settings.open_cache()
        self.config = settings.config_for(self.cache)
        self.history_length = settings.history_length or self.config.deadline
        self.observation_space = make_observation_space(self.config, self.history_length)
        self.action_space = spaces.Discrete(self.config.num_actions)
        self._ceiling = self.config.max_bits_per_dimension
        self._reward = REWARDS.index(settings.reward)
        self.episodes = EpisodeBatch(self.config, self.cache, num_envs)
        self._indices = self.cache.indices(settings.split)
        if self._indices.size == 0:
            raise ConfigurationError(
                f"`split` must have trajectories in the cache {settings.cache!r}, got the empty {settings.split!r}. "
                "Choose another split or cache."
            )

    def check_options(self, options: Mapping[str, Any] | None) -> dict[str, Any]:
        """What ``reset(options=...)`` may hold, for all N episodes.

        Returns:
            ``"trajectory"``: int64 (N,), and ``"rates"``: float64 (N, T_d), each only where given.

        Raises:
            ConfigurationError: if a key is unknown, an index out of range, or rates are not of that form.
        """
        if options is not None and (not isinstance(options, Mapping) or not set(options) <= set(_OPTION_KEYS)):
            raise ConfigurationError(
                f"`options` must be a dict with keys among {', '.join(_OPTION_KEYS)}, got {options!r:.100}. "
                "Correct the spelling or leave it out."
            )
        given = dict(options or {})
        count = len(self.episodes)
        checked: dict[str, Any] = {}
        if given.get("trajectory") is not None:
            try:
                wanted = np.asarray(given["trajectory"])
            except ValueError:  # ragged
                wanted = np.empty(0)
            if not np.issubdtype(wanted.dtype, np.integer) or wanted.shape not in ((), (count,)):
                raise ConfigurationError(
                    f"`trajectory` must be an integer (or one per environment), got {given['trajectory']!r}. "
                    "Give an index of the cache."
                )
            if (wanted < 0).any() or (wanted >= len(self.cache)).any():
                raise ConfigurationError(
                    f"`trajectory` must be in 0 … {len(self.cache) - 1}, got {given['trajectory']!r}. "
                    f"The cache {self.settings.cache!r} has {len(self.cache)} trajectories."
                )
            checked["trajectory"] = np.broadcast_to(wanted, (count,))
        if given.get("rates") is not None:
            try:
                rates = np.asarray(given["rates"], dtype=np.float64)
            except (TypeError, ValueError):
                rates = np.empty(0)
            deadline = self.config.deadline
            if rates.shape not in ((deadline,), (count, deadline)):
                raise ConfigurationError(
                    f"`rates` must have length T_d = {deadline}, got shape {rates.shape}. "
                    "Give the bits that every slot carries."
                )
            if not (np.isfinite(rates).all() and (rates >= 0.0).all()):
                raise ConfigurationError(
                    "`rates` must be finite and >= 0, got a value that is not. Give bits per slot."
                )
            checked["rates"] = np.broadcast_to(rates, (count, deadline))
        return checked

    def begin(self, i: int, rng: np.random.Generator, options: Mapping[str, Any]) -> None:
        """Start episode ``i``: draw everything random in it, then put in what the options replay.

        Always drawn, in this order: trajectory, SNR (only of a range), gains; a replayed part never changes
        what else is drawn.

        Args:
            i: which of the N.
            rng: the episode's own generator.
            options: as :meth:`check_options` returned them.
        """
        config = self.config
        trajectory = int(self._indices[rng.integers(self._indices.size)])
        snr_db = rng.uniform(*config.snr_db) if isinstance(config.snr_db, tuple) else config.snr_db
        rates = draw_rates(
            rng,
            config.deadline,
            config.link.num_subchannels,
            config.total_power(snr_db),
            config.symbols_per_slot,
        )
        if "trajectory" in options:
            trajectory = int(options["trajectory"][i])
        if "rates" in options:
            rates = options["rates"][i]
        self.episodes.begin(i, trajectory, rates)
        if self.settings.decision_epochs:
            self.episodes.skip_forced_slots(i)

    def step(self, actions: NDArray[np.int64]) -> NDArray[np.float64]:
        """Act in every episode whose action is not ``NO_ACTION``.

        Args:
            actions: int64 (N,), each ``NO_ACTION`` or in the action space.

        Returns:
            Rewards (N,); 0 for the others.

        Raises:
            ActionError: if an action is illegal where the settings raise on these.
        """
        if self.settings.illegal_action == "raise":
            self._refuse_illegal(actions)
        before = self.episodes.latent_mse.copy()
        self.episodes.advance(actions, until_decision=self.settings.decision_epochs)
        rewards = np.empty(actions.size)
        fill_rewards(
            self._reward,
            actions,
            self.episodes.state["slot"],
            self.config.deadline,
            before,
            self.episodes.latent_mse,
            rewards,
        )
        return rewards

    def action_outside(self, name: str, value: Any) -> ActionError:
        """The error for a value that is not in the action space."""
        return ActionError(
            f"`{name}` must be in 0 … {self.config.num_actions - 1}, got {value!r}. "
            "0 is WAIT, i is TRANSMIT(bit_depths[i - 1])."
        )

    def _refuse_illegal(self, actions: NDArray[np.int64]) -> None:
        mask = self.episodes.action_mask()
        illegal = np.flatnonzero((actions > 0) & (mask[np.arange(actions.size), actions] == 0))
        if illegal.size:
            i = int(illegal[0])
            s = self.episodes.state[i]
            raise ActionError(
                f"`action` must be legal in slot {s['slot']}, got {actions[i]} "
                f"(TRANSMIT with x_{s['server_step']} at the server, x_{s['device_step']} at the device, "
                f"{self.episodes.remaining_bits()[i]:.0f} bits in flight). Use the action mask."
            )

    def look(self) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """Observations and infos of all N episodes, in fresh arrays; keys in the order of Gymnasium's spaces."""
        episodes = self.episodes
        integers, floats, bits_sent = episodes.snapshot()
        history = np.empty((len(episodes), self.history_length), dtype=np.float32)
        fill_channel_history(integers[0], episodes.rates, self.config.latent_dim, self._ceiling, history)
        slot, server_step, device_step, device_bits, num_deliveries, uplink_slots = integers
        observations: dict[str, NDArray[Any]] = {
            "channel_history": history,
            "device_bits": device_bits,
            "device_error": floats[1],
            "device_step": device_step,
            "remaining_bits": floats[0],
            "server_step": server_step,
            "slot": slot,
        }
        infos: dict[str, NDArray[Any]] = {
            "action_mask": episodes.action_mask(),
            "bits_sent": bits_sent,
            "delivered": episodes.delivered.copy(),
            "illegal_action": episodes.illegal.copy(),
            "latent_mse": episodes.latent_mse.copy(),
            "num_deliveries": num_deliveries,
            "trajectory": episodes.trajectory.copy(),
            "uplink_slots": uplink_slots,
        }
        return observations, infos
