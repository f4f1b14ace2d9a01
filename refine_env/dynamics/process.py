"""The decision process that both environments present: draws, observations, rewards and infos of N episodes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from numpy.typing import ArrayLike, NDArray

from refine_env._compiled import kernel
from refine_env._validation import integer_array, real_array, shown
from refine_env.coding import LOSSLESS_BITS
from refine_env.config import SystemConfig
from refine_env.dynamics.settings import REWARDS, EnvSettings
from refine_env.dynamics.simulator import EpisodeBatch
from refine_env.errors import ActionError, ConfigurationError
from refine_env.link import draw_rates_of_many
from refine_env.trajectories import TrajectoryCache

__all__ = [
    "FULL_LATENT_MSE",
    "INFO_KEYS",
    "DecisionProcess",
    "Draws",
    "Observations",
    "draw_for_all",
    "make_observation_space",
]

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
FULL_LATENT_MSE = "full_latent_mse"
"""One key more, and a field of the simulator's state, where the cache has full runs."""

LOG_REWARD_FLOOR = 1e-8
TERMINAL, IMPROVEMENT, ANYTIME = map(REWARDS.index, ("terminal", "improvement", "anytime"))
_OPTION_KEYS = ("trajectory", "rates")


def largest_error(config: SystemConfig) -> float:
    """Value at which the observed coding error saturates; no model's chain of deliveries gets there."""
    return max(1.0, config.make_coder().max_error)


def make_observation_space(config: SystemConfig, history_length: int) -> spaces.Dict:
    """The observation space; it does not depend on the SNR, so that one policy can serve all."""
    ceiling = config.max_bits_per_dimension
    max_error = largest_error(config)
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


# Rows of the arrays in Observations.
INTEGERS, NUMBERS, FLOATS = 9, 3, 2
SLOT, SERVER_STEP, DEVICE_STEP, DEVICE_BITS, NUM_DELIVERIES = range(5)
UPLINK_SLOTS, TRAJECTORY, DELIVERED, ILLEGAL = range(5, INTEGERS)
BITS_SENT, LATENT_MSE, REWARD = range(NUMBERS)
REMAINING_BITS, DEVICE_ERROR = range(FLOATS)


class Observations(NamedTuple):
    """Observations, infos and rewards of N episodes, in few arrays that a kernel fills.

    Attributes:
        integers: int64 (INTEGERS, N), rows SLOT … ILLEGAL.
        numbers: float64 (NUMBERS, N), rows BITS_SENT, LATENT_MSE and REWARD, the reward of the last step.
        floats: float32 (FLOATS, N, 1), rows REMAINING_BITS, per dimension, and DEVICE_ERROR.
        history: channel history, float32 (N, history length).
        mask: legal actions, int8 (N, 1 + |𝓑|).
        full_latent_mse: float64 (N,), only where the cache has full runs.
    """

    integers: NDArray[np.int64]
    numbers: NDArray[np.float64]
    floats: NDArray[np.float32]
    history: NDArray[np.float32]
    mask: NDArray[np.int8]
    full_latent_mse: NDArray[np.float64] | None = None

    @classmethod
    def empty(cls, count: int, history_length: int, num_actions: int) -> Observations:
        """Arrays for N episodes, yet to be filled."""
        return cls(
            np.empty((INTEGERS, count), dtype=np.int64),
            np.empty((NUMBERS, count)),
            np.empty((FLOATS, count, 1), dtype=np.float32),
            np.empty((count, history_length), dtype=np.float32),
            np.empty((count, num_actions), dtype=np.int8),
        )

    def as_dicts(self) -> tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]:
        """Observations and infos; keys in the order of Gymnasium's spaces."""
        observations: dict[str, NDArray[Any]] = {
            "channel_history": self.history,
            "device_bits": self.integers[DEVICE_BITS],
            "device_error": self.floats[DEVICE_ERROR],
            "device_step": self.integers[DEVICE_STEP],
            "remaining_bits": self.floats[REMAINING_BITS],
            "server_step": self.integers[SERVER_STEP],
            "slot": self.integers[SLOT],
        }
        infos: dict[str, NDArray[Any]] = {
            "action_mask": self.mask,
            "bits_sent": self.numbers[BITS_SENT],
            "delivered": self.integers[DELIVERED].astype(np.bool_),
            "illegal_action": self.integers[ILLEGAL].astype(np.bool_),
            "latent_mse": self.numbers[LATENT_MSE],
            "num_deliveries": self.integers[NUM_DELIVERIES],
            "trajectory": self.integers[TRAJECTORY],
            "uplink_slots": self.integers[UPLINK_SLOTS],
        }
        if self.full_latent_mse is not None:
            infos[FULL_LATENT_MSE] = self.full_latent_mse
        return observations, infos


class Draws(NamedTuple):
    """All that is random in N episodes.

    Attributes:
        trajectories: int64 (N,).
        rates: bits per slot (N, T_d).
        snrs_db: SNR of the gains (N,).
    """

    trajectories: NDArray[np.int64]
    rates: NDArray[np.float64]
    snrs_db: NDArray[np.float64]


@kernel
def _reward(s: Any, kind: int, deadline: int) -> float:
    """Reward of an episode's last step; 0 where there was none."""
    if not s.acted:
        return 0.0
    if kind == IMPROVEMENT:
        return float(s.previous_mse - s.latent_mse)
    if kind == ANYTIME:
        return float(-(s.slots_before * s.previous_mse + s.slots_after * s.latent_mse) / deadline)
    if s.slot <= deadline:
        return 0.0
    return float(-s.latent_mse if kind == TERMINAL else -10.0 * np.log10(s.latent_mse + LOG_REWARD_FLOOR))


@kernel
def fill_observations(
    state: NDArray[Any],
    rates: NDArray[np.float64],
    latent_dim: int,
    ceiling: float,
    reward: int,
    integers: NDArray[np.int64],
    numbers: NDArray[np.float64],
    floats: NDArray[np.float32],
    history: NDArray[np.float32],
    mask: NDArray[np.int8],
    max_error: float,
) -> None:
    """Fill the arrays of :class:`Observations`.

    The history holds the rates of the slots up to the current one, per latent dimension, most recent last and 0
    before slot 1; after the last slot it ends with slot T_d.

    Args:
        state: ``simulator.STATE_DTYPE`` (N,).
        rates: bits per slot (N, T_d).
        latent_dim: M.
        ceiling: value at which the history saturates [bit/dimension].
        reward: position in ``settings.REWARDS``.
        integers, numbers, floats, history, mask: the fields of the observations.
        max_error: value at which the predicted coding error saturates.
    """
    length = history.shape[1]
    deadline = rates.shape[1]
    for i in range(state.size):
        s = state[i]
        integers[SLOT, i] = s.slot
        integers[SERVER_STEP, i] = s.server_step
        integers[DEVICE_STEP, i] = s.device_step
        integers[DEVICE_BITS, i] = s.device_bits
        integers[NUM_DELIVERIES, i] = s.num_deliveries
        integers[UPLINK_SLOTS, i] = s.uplink_slots
        integers[TRAJECTORY, i] = s.trajectory
        integers[DELIVERED, i] = s.delivered
        integers[ILLEGAL, i] = s.illegal
        floats[REMAINING_BITS, i, 0] = (s.message_size - s.message_sent) / latent_dim
        floats[DEVICE_ERROR, i, 0] = min(s.device_error, max_error)
        numbers[BITS_SENT, i] = s.bits_sent
        numbers[LATENT_MSE, i] = s.latent_mse
        numbers[REWARD, i] = _reward(s, reward, deadline)
        before = length - min(s.slot, deadline)  # entries before slot 1
        for k in range(min(before, length)):
            history[i, k] = 0.0
        for k in range(max(before, 0), length):
            history[i, k] = min(rates[i, k - before] / latent_dim, ceiling)
        mask[i, 0] = 1
        for action in range(1, mask.shape[1]):
            mask[i, action] = s.legal


class DecisionProcess:
    """N episodes of one environment, without Gymnasium's single or vector interface.

    Args:
        settings: the environment's arguments.
        num_envs: N.
        latents: False plays without latents, for who only wants to know what is delivered.
        cache: what ``settings.cache`` names, where it is open already.

    Attributes:
        settings, cache, config: what the arguments describe.
        episodes: the dynamics.
        snrs_db: SNR of each episode's gains, which no observation and no info tells (N,).
        observation_space, action_space: of one episode.
    """

    def __init__(
        self, settings: EnvSettings, num_envs: int, *, latents: bool = True, cache: TrajectoryCache | None = None
    ) -> None:
        self.settings = settings
        self.cache: TrajectoryCache = settings.open_cache() if cache is None else cache
        self.config = settings.config_for(self.cache)
        self.history_length = settings.history_length or self.config.deadline
        self.observation_space = make_observation_space(self.config, self.history_length)
        self.action_space = spaces.Discrete(self.config.num_actions)
        # Properties that every step needs, computed once.
        self._ceiling = self.config.max_bits_per_dimension
        self._max_error = largest_error(self.config)
        self._latent_dim = self.config.latent_dim
        self._reward = REWARDS.index(settings.reward)
        self._raises = settings.illegal_action == "raise"
        self._until_decision = settings.decision_epochs
        self._power = 0.0 if isinstance(self.config.snr_db, tuple) else self.config.total_power(self.config.snr_db)
        self.snrs_db = np.full(num_envs, np.nan)
        self.episodes = EpisodeBatch(self.config, self.cache if latents else None, num_envs)
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
                f"`options` must be a dict with keys among {', '.join(_OPTION_KEYS)}, got {shown(options)}. "
                "Correct the spelling or leave it out."
            )
        given = dict(options or {})
        count = len(self.episodes)
        checked: dict[str, Any] = {}
        if given.get("trajectory") is not None:
            wanted = integer_array(given["trajectory"])
            if wanted is None or wanted.shape not in ((), (count,)):
                raise ConfigurationError(
                    f"`trajectory` must be an integer (or one per environment), got {shown(given['trajectory'])}. "
                    "Give an index of the cache."
                )
            if (wanted < 0).any() or (wanted >= len(self.cache)).any():
                raise ConfigurationError(
                    f"`trajectory` must be in 0 … {len(self.cache) - 1}, got {shown(given['trajectory'])}. "
                    f"The cache {self.settings.cache!r} has {len(self.cache)} trajectories."
                )
            checked["trajectory"] = np.broadcast_to(wanted, (count,))
        if given.get("rates") is not None:
            rates = real_array(given["rates"])
            deadline = self.config.deadline
            if rates is None or rates.shape not in ((deadline,), (count, deadline)):
                got = "what is no array of numbers" if rates is None else f"shape {rates.shape}"
                raise ConfigurationError(
                    f"`rates` must have length T_d = {deadline}, got {got}. Give the bits that every slot carries."
                )
            if not (np.isfinite(rates).all() and (rates >= 0.0).all()):
                raise ConfigurationError(
                    "`rates` must be finite and >= 0, got a value that is not. Give bits per slot."
                )
            checked["rates"] = np.broadcast_to(rates, (count, deadline))
        return checked

    def draw(self, rngs: Sequence[np.random.Generator]) -> Draws:
        """Draw all that is random in episodes, each from its own generator.

        The order is always: trajectory, SNR (only of a range), gains.
        """
        config = self.config
        count = self._indices.size
        trajectories, snrs_db, powers = [], [], []
        for rng in rngs:
            trajectories.append(self._indices[rng.integers(count)])
            if isinstance(config.snr_db, tuple):
                snrs_db.append(rng.uniform(*config.snr_db))
                powers.append(config.total_power(snrs_db[-1]))
            else:
                snrs_db.append(config.snr_db)
                powers.append(self._power)
        rates = draw_rates_of_many(
            rngs,
            config.deadline,
            config.link.num_subchannels,
            np.array(powers),
            config.symbols_per_slot,
            config.link.channel,
        )
        return Draws(np.array(trajectories, dtype=np.int64), rates, np.array(snrs_db))

    def begin(self, selected: Sequence[int], draws: Draws, options: Mapping[str, Any]) -> None:
        """Begin episodes with what was drawn for them, but for what the options replay.

        A replayed part is drawn all the same, so that it never changes what else is drawn.

        Args:
            selected: which of the N.
            draws: of each of these, as :meth:`draw` returned them.
            options: as :meth:`check_options` returned them.
        """
        chosen = list(selected)
        trajectories = np.array(options["trajectory"][chosen]) if "trajectory" in options else draws.trajectories
        rates = options["rates"][chosen] if "rates" in options else draws.rates
        self.snrs_db[chosen] = draws.snrs_db
        self.episodes.begin(chosen, trajectories, rates, skip_forced_slots=self.settings.decision_epochs)

    def step(self, actions: NDArray[np.int64]) -> None:
        """Act in every episode whose action is not ``simulator.NO_ACTION``.

        Args:
            actions: int64 (N,), each ``NO_ACTION`` or in the action space.

        Raises:
            ActionError: if an action is illegal where the settings raise on these.
        """
        if self._raises:
            self._refuse_illegal(actions)
        self.episodes.advance(actions, until_decision=self._until_decision)

    def check_actions(self, actions: ArrayLike) -> NDArray[np.int64]:
        """Actions of all N episodes as int64 (N,).

        Raises:
            ActionError: if they are not N integers, or one is not in the action space.
        """
        values = integer_array(actions)
        count = len(self.episodes)
        if values is None or values.shape != (count,):
            raise ActionError(
                f"`actions` must be {count} integers in 0 … {self.config.num_actions - 1}, got {shown(actions)}. "
                "Give one action per environment."
            )
        outside = (values < 0) | (values >= self.config.num_actions)
        if outside.any():
            raise self.action_outside("actions", values[outside][0].item())
        return values.astype(np.int64)

    def action_outside(self, name: str, value: Any) -> ActionError:
        """The error for a value that is not in the action space."""
        integer = isinstance(value, Integral) and not isinstance(value, bool)
        kind = "" if integer else f", a {type(value).__name__}"
        return ActionError(
            f"`{name}` must be in 0 … {self.config.num_actions - 1}, got {shown(value)}{kind}. "
            "Give an integer: 0 is WAIT, i is TRANSMIT(bit_depths[i - 1])."
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

    def observe(self) -> Observations:
        """What all N episodes show, in fresh arrays; rewards are those of the last step, 0 for who took none."""
        observations = Observations.empty(len(self.episodes), self.history_length, self.config.num_actions)
        self.observe_into(*observations[:-1])
        if self.episodes.has_full:
            observations = observations._replace(full_latent_mse=self.episodes.state[FULL_LATENT_MSE].copy())
        return observations

    def observe_into(
        self,
        integers: NDArray[np.int64],
        numbers: NDArray[np.float64],
        floats: NDArray[np.float32],
        history: NDArray[np.float32],
        mask: NDArray[np.int8],
    ) -> None:
        """Fill the given arrays, the fields of :class:`Observations`."""
        episodes = self.episodes
        fill_observations(
            episodes.state,
            episodes.rates,
            self._latent_dim,
            self._ceiling,
            self._reward,
            integers,
            numbers,
            floats,
            history,
            mask,
            self._max_error,
        )


_CHUNK = 8  # episodes whose gains are drawn before they are used: they stay in the second-level cache


def draw_for_all(processes: Sequence[DecisionProcess], rngs: Sequence[np.random.Generator]) -> list[Draws]:
    """What :meth:`DecisionProcess.draw` draws for each process from equal generators, with every gain drawn once.

    Args:
        processes: of one cache, split, deadline and link, each with a single SNR, which alone may differ.
        rngs: one generator an episode (N,); they advance as in one :meth:`DecisionProcess.draw`.
    """
    process = processes[0]
    config, indices = process.config, process._indices
    trajectories = np.empty(len(rngs), dtype=np.int64)
    rates = {other._power: np.empty((len(rngs), config.deadline)) for other in processes}
    channel = config.link.channel
    gains = np.empty((_CHUNK, config.deadline + channel.csi_delay, config.link.num_subchannels))
    for first in range(0, len(rngs), _CHUNK):
        part = rngs[first : first + _CHUNK]
        for i, rng in enumerate(part):
            trajectories[first + i] = indices[rng.integers(indices.size)]
            channel.draw_gains(rng, gains.shape[1], config.link.num_subchannels, out=gains[i])
        for power, table in rates.items():
            own = table[first : first + len(part)]
            channel.fill_rates(gains[: len(part)], np.full(len(part), power), config.symbols_per_slot, own)
    return [Draws(trajectories, rates[other._power], np.full(len(rngs), other.config.snr_db)) for other in processes]
