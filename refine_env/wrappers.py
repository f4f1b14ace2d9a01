"""Observation encodings: flat vectors for policies, one encoder behind a wrapper of either environment.

The environment's observation is a dictionary; most libraries want a vector. :class:`ObservationEncoder` makes
one of it, from the observation and the public configuration alone: the SNR is never shown, and a policy that
serves all SNRs infers it from the channel history. :class:`EncodeObservation` puts the encoder around the
single environment, :class:`VectorEncodeObservation` around the vector environment, with the same numbers.

Importing this module needs nothing beyond the package's core.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from scipy import special

from refine_env._compiled import kernel
from refine_env._validation import check_choice, check_integer, shown
from refine_env.coding import LOSSLESS_BITS
from refine_env.config import SystemConfig
from refine_env.errors import ConfigurationError, NamesAdapter
from refine_env.link import rate_moments
from refine_env.model.distortion import RefinementModel
from refine_env.model.rules import distortion, residual_variance

__all__ = [
    "ENCODINGS",
    "ArrayInfo",
    "EncodeObservation",
    "MaskedObservation",
    "ObservationEncoder",
    "RefinementVectorWrapper",
    "VectorEncodeObservation",
    "VectorMaskedObservation",
    "check_same_step",
    "check_shows_dictionary",
]

if TYPE_CHECKING:
    _AnyVectorWrapper: TypeAlias = VectorWrapper[Any, Any, Any, Any, NDArray[Any]]
else:
    _AnyVectorWrapper = VectorWrapper  # which takes no parameters in Gymnasium 1.2


class RefinementVectorWrapper(_AnyVectorWrapper):
    """A wrapper of a vector environment of this package, which says what libraries ask of that environment."""

    @property
    def autoreset_mode(self) -> AutoresetMode:
        """When an environment begins its next episode."""
        mode: AutoresetMode = self.env.metadata["autoreset_mode"]
        return mode

    def action_masks(self) -> NDArray[np.bool_]:
        """Which actions are legal now, bool (N, n)."""
        masks: NDArray[np.bool_] = self.env.unwrapped.action_masks()  # type: ignore[attr-defined]
        return masks


ENCODINGS = ("summary", "normalized", "one-hot")
_SMALLEST_ERROR = 1e-8  # where the logarithms of errors end; that of the "log" reward
_SCALARS = ("slot", "server_step", "device_step", "device_bits", "remaining_bits", "device_error")
_NUM_SCALARS = len(_SCALARS)
_SUMMARY = (
    "slots_left",
    "channel_mean",
    "channel_log_mean",
    "channel_std",
    "current_rate",
    "capacity_left",
    "log_capacity_left",
    "clean_latent_in",
    "latent_distortion_server",
    "distortion_device",
    "residual_server",
    "residual_clean",
)
_PER_DEPTH = ("slots_needed", "margin", "probability_in_time", "margin_clean", "distortion_after")
_PER_QUANTILE = ("latency", "latency_left_over", "latency_aligned")
_QUANTILES = (0.9, 0.99)  # of the slots that a message takes
_NORMAL_QUANTILES = special.ndtri(np.array(_QUANTILES))
# SNRs [dB] between which the deviation of a rate is interpolated from its mean.
_SNR_GRID_DB = tuple(range(-20, 45, 4))


@kernel
def _clip(value: float) -> float:
    return min(max(value, -1.0), 1.0)


@kernel
def _log_error(value: float) -> float:
    """10⁻⁸ … 1 on a logarithmic scale -1 … 1."""
    return _clip(math.log10(max(value, _SMALLEST_ERROR)) / 4.0 + 1.0)


class _Rows(NamedTuple):
    """N observations, their fields as the environment has them."""

    slot: NDArray[Any]
    server_step: NDArray[Any]
    device_step: NDArray[Any]
    device_bits: NDArray[Any]
    remaining_bits: NDArray[Any]
    device_error: NDArray[Any]
    channel_history: NDArray[Any]


_fields = itemgetter(*_Rows._fields)


class _Summary(NamedTuple):
    """What the summary knows of the system.

    Attributes:
        sizes: of the messages [bit/dimension] (|𝓑|,).
        first_sizes: the same of the first message (|𝓑|,).
        first_device_step: t_p of what the device starts with, which it holds before the first delivery alone.
        base: D_base of every bit depth (|𝓑|,).
        model: how the distortion develops over a chain of deliveries.
        grid_means: mean rates of a slot [bit/dimension], ascending (G,).
        grid_deviations: the standard deviations of a slot's rate with these means (G,).
        quantiles: those of N(0, 1), for the slots that a message takes.
    """

    sizes: NDArray[np.float64]
    first_sizes: NDArray[np.float64]
    first_device_step: int
    base: NDArray[np.float64]
    model: RefinementModel
    grid_means: NDArray[np.float64]
    grid_deviations: NDArray[np.float64]
    quantiles: NDArray[np.float64]


@kernel
def _fill_scalars(rows: _Rows, deadline: int, num_steps: int, most_bits: float, out: NDArray[np.float32]) -> None:
    """The first columns of every encoding."""
    for i in range(rows.slot.size):
        out[i, 0] = _clip(2.0 * rows.slot[i] / (deadline + 1) - 1.0)
        out[i, 1] = _clip(2.0 * rows.server_step[i] / num_steps - 1.0)
        out[i, 2] = _clip(2.0 * rows.device_step[i] / num_steps - 1.0)
        out[i, 3] = _clip(2.0 * rows.device_bits[i] / LOSSLESS_BITS - 1.0)
        out[i, 4] = _clip(2.0 * rows.remaining_bits[i, 0] / most_bits - 1.0)
        out[i, 5] = _log_error(rows.device_error[i, 0])


@kernel
def _latency(
    size: float, current: float, mean: float, deviation: float, seen: int, normal_quantile: float, deadline: int
) -> int:
    """Slots after which a message begun now is through with the quantile's probability; T_d + 1 if that is more.

    The current slot's rate is known; the others' sum has their own deviation and, common to all, that of the mean.
    """
    slots = max(1, 1 + int((size - current) / mean))
    while slots <= deadline:
        later = slots - 1
        spread = deviation * math.sqrt(later + later * later / max(seen, 1))
        if current + later * mean - normal_quantile * spread >= size:
            break
        slots += 1
    return slots if slots <= deadline else deadline + 1


@kernel
def _fill_summary(
    rows: _Rows, deadline: int, most_bits: float, summary: _Summary, encoded: NDArray[np.float32]
) -> None:
    """All columns of the encoding ``summary``, but for the channel history."""
    model, history = summary.model, rows.channel_history
    _fill_scalars(rows, deadline, model.clean.size - 1, most_bits, encoded)
    out = encoded[:, _NUM_SCALARS:]
    length = history.shape[1]
    depths = summary.sizes.size
    most = float(LOSSLESS_BITS)
    for i in range(rows.slot.size):
        seen = min(rows.slot[i], deadline, length)
        total = 0.0
        for k in range(length - seen, length):
            total += history[i, k]
        mean = max(total / max(seen, 1), 1e-9)
        square = 0.0
        for k in range(length - seen, length):
            square += (history[i, k] - mean) ** 2
        current = float(history[i, length - 1])
        left = max(deadline - rows.slot[i] + 1, 0)
        later = max(left - 1, 0)  # slots after this one; of this one the rate is known
        capacity = later * mean + (current if left > 0 else 0.0)
        deviation = np.interp(mean, summary.grid_means, summary.grid_deviations)
        # The later slots' own deviation, and that of the mean that stands for theirs.
        spread = deviation * math.sqrt(later + later * later / max(seen, 1)) + 1e-9
        t, p, error = rows.server_step[i], rows.device_step[i], float(rows.device_error[i, 0])
        residual = residual_variance(model, t, p, error)
        residual_clean = residual_variance(model, 0, p, error)
        sizes = summary.first_sizes if p == summary.first_device_step else summary.sizes
        out[i, 0] = _clip(2.0 * left / deadline - 1.0)
        out[i, 1] = _clip(mean * deadline / most / 4.0 - 1.0)
        out[i, 2] = _clip(math.log2(mean * deadline / most) / 4.0)
        out[i, 3] = _clip(math.sqrt(square / max(seen, 1)) / mean * 5.0)
        out[i, 4] = _clip((current / mean - 1.0) * 5.0)
        out[i, 5] = _clip(capacity / most / 4.0 - 1.0)
        out[i, 6] = _clip(math.log2(capacity / most + 1e-3) / 4.0)
        out[i, 7] = _clip((left - t) / deadline)
        out[i, 8] = _log_error(model.clean[t])
        out[i, 9] = _log_error(distortion(model, p, error))
        out[i, 10] = _log_error(residual)
        out[i, 11] = _log_error(residual_clean)
        column = 12
        wait = min(t, later)  # slots until the clean latent is there
        capacity_clean = max(left - t, 0) * mean if t > 0 else capacity
        unknown = left - wait if t > 0 else later  # slots that carry it whose rates are not known
        spread_clean = deviation * math.sqrt(unknown + unknown * unknown / max(seen, 1)) + 1e-9
        for b in range(depths):
            margin = (capacity - sizes[b]) / spread
            out[i, column] = _clip(sizes[b] / mean / deadline - 1.0)
            out[i, column + depths] = _clip(margin / 5.0)
            out[i, column + 2 * depths] = _clip(math.erfc(-margin / math.sqrt(2.0)) - 1.0)
            out[i, column + 3 * depths] = _clip((capacity_clean - sizes[b]) / spread_clean / 5.0)
            # The formula of `distortion`, with its products in the order in which policies were trained with them.
            out[i, column + 4 * depths] = _log_error(model.clean[t] + model.error_slope[t] * residual * summary.base[b])
            place = column + 5 * depths
            for q in range(summary.quantiles.size):
                latency = _latency(sizes[b], current, mean, deviation, seen, summary.quantiles[q], deadline)
                over = left % latency
                out[i, place] = _clip(2.0 * latency / deadline - 1.0)
                out[i, place + depths] = 2.0 * over / latency - 1.0
                out[i, place + 2 * depths] = 1.0 if over == 0 else -1.0
                place += 3 * depths
            column += 1


class ObservationEncoder:
    """Observations as vectors in [-1, 1]^D, from the observation and the public configuration alone.

    ============== ===========================================================================================
    encoding       numbers, besides the last ``history`` entries of the channel history
    ============== ===========================================================================================
    ``summary``    ``normalized``, and what a policy would have to work out of it: slots left; mean (also its
                   logarithm), standard deviation and last value of the channel history; bits per dimension
                   that the rest of the episode carries at that mean (also its logarithm); the slots left once
                   the clean latent is there; distortions of the latents at server and device; what x_t and
                   x_0 hold that the device cannot predict; and for every bit depth the slots that it takes,
                   how surely it is through in time if sent now (in deviations, and as a probability) or with
                   the clean latent, the distortion that sending now would leave, and, of the slots that it
                   takes at most with probability 0.9 and 0.99, their number, how many slots are left over
                   when the rest of the episode is filled with such messages, and whether none is
    ``normalized`` slot, steps, bit depth and bits in flight on linear scales, coding error on a logarithmic one
    ``one-hot``    slot, steps and bit depth one-hot, bits in flight linear, coding error logarithmic
    ============== ===========================================================================================

    The deviation of a slot's rate is that of the link with fixed power
    (:func:`refine_env.link.rate_moments`) at the SNR whose mean rate is the history's.

    Args:
        config: the system, ``env.unwrapped.config``.
        encoding: one of :data:`ENCODINGS`.
        history: entries of the channel history to show, the most recent ones, scaled by the largest message;
            None: all but for ``summary``, which then shows none.
        history_length: of the environment's ``channel_history``; None: the deadline, as the environment has it.

    Attributes:
        names: what each number is, (D,).
        space: Box float32 (D,).

    Raises:
        ConfigurationError: if an argument is out of range.
    """

    def __init__(
        self,
        config: SystemConfig,
        encoding: str = "summary",
        *,
        history: int | None = None,
        history_length: int | None = None,
    ) -> None:
        self.config = config
        self.encoding = check_choice("encoding", encoding, ENCODINGS)
        self.history_length = config.deadline if history_length is None else history_length
        shown = 0 if encoding == "summary" else self.history_length
        if history is not None:
            shown = check_integer(
                "history", history, 0, self.history_length, advice="Give at most the environment's `history_length`."
            )
        self.history = shown
        self.names = (*self._state_names(), *(f"rate[{k - shown}]" for k in range(shown)))
        self.space = spaces.Box(-1.0, 1.0, (len(self.names),), np.float32)
        self._most_bits = config.max_bits_per_dimension
        if encoding == "summary":
            link = config.link
            grid = [
                rate_moments(
                    float(snr_db), link.num_subchannels, config.symbols_per_slot, link.snr_reference, link.channel
                )
                for snr_db in _SNR_GRID_DB
            ]
            means, deviations = np.array(grid).T.copy() / config.latent_dim
            self._summary = _Summary(
                config.message_bits / config.latent_dim,
                config.first_message_bits / config.latent_dim,
                config.first_device_step,
                config.base_distortion,
                config.refinement_model,
                means,
                deviations,
                _NORMAL_QUANTILES,
            )

    def _state_names(self) -> tuple[str, ...]:
        config = self.config
        if self.encoding == "one-hot":
            sizes = {
                "slot": config.deadline + 2,
                "server_step": config.num_steps + 1,
                "device_step": config.num_steps + 1,
                "device_bits": LOSSLESS_BITS + 1,
            }
            hot = [f"{key}={value}" for key, size in sizes.items() for value in range(size)]
            return (*hot, "remaining_bits", "device_error")
        if self.encoding == "normalized":
            return _SCALARS
        timed = [f"{name}@{quantile:g}" for quantile, name in itertools.product(_QUANTILES, _PER_QUANTILE)]
        depths = [f"{name}[{bits}]" for name, bits in itertools.product((*_PER_DEPTH, *timed), config.bit_depths)]
        return (*_SCALARS, *_SUMMARY, *depths)

    def to_dict(self) -> dict[str, Any]:
        """The arguments that, with a configuration, make this encoder again; JSON."""
        return {"encoding": self.encoding, "history": self.history, "history_length": self.history_length}

    def encode(self, observation: Mapping[str, Any]) -> NDArray[np.float32]:
        """Encode N observations; each row depends on its own observation alone.

        Args:
            observation: the environment's, batched: scalar fields (N,), others (N, ...).

        Returns:
            float32 (N, D).

        Raises:
            ConfigurationError: if the channel history has another length.
        """
        history = np.asarray(observation["channel_history"])
        if history.shape[-1] != self.history_length:
            raise ConfigurationError(
                f"`channel_history` must have length {self.history_length} for this encoder, got "
                f"{history.shape[-1]}. Make the encoder with the environment's `history_length`."
            )
        rows = _Rows(*map(np.asarray, _fields(observation)))
        config, num_rows = self.config, len(rows.slot)
        encoded = np.empty((num_rows, len(self.names)), dtype=np.float32)
        count = len(self.names) - self.history
        if self.history:
            recent = history[:, self.history_length - self.history :]
            np.clip(2.0 * recent / self._most_bits - 1.0, -1.0, 1.0, out=encoded[:, count:])
        if self.encoding == "summary":
            _fill_summary(rows, config.deadline, self._most_bits, self._summary, encoded)
            return encoded
        one_hot = self.encoding == "one-hot"
        scalars = np.empty((num_rows, _NUM_SCALARS), dtype=np.float32) if one_hot else encoded
        _fill_scalars(rows, config.deadline, config.num_steps, self._most_bits, scalars)
        if one_hot:
            encoded[:, :count] = 0.0
            encoded[:, count - 2 : count] = scalars[:, 4:]
            start = 0
            sizes = (config.deadline + 2, config.num_steps + 1, config.num_steps + 1, LOSSLESS_BITS + 1)
            for values, size in zip(rows[:4], sizes, strict=True):
                encoded[np.arange(num_rows), start + values] = 1.0
                start += size
        return encoded

    def encode_one(self, observation: Mapping[str, Any]) -> NDArray[np.float32]:
        """:meth:`encode` of one observation, float32 (D,)."""
        batch = {key: np.asarray(value)[None] for key, value in observation.items()}
        encoded: NDArray[np.float32] = self.encode(batch)[0]
        return encoded


def check_same_step(envs: VectorEnv[Any, Any, Any]) -> None:
    """Raise ConfigurationError unless a vector environment begins the next episode in the step that ends one."""
    if envs.metadata.get("autoreset_mode") != AutoresetMode.SAME_STEP:
        raise ConfigurationError(
            f"`envs` must have autoreset_mode 'SameStep', got {envs.metadata.get('autoreset_mode')}. "
            "Make them with gym.make_vec(..., autoreset_mode='SameStep')."
        )


def check_shows_dictionary(env: Any, instead: str | None = None) -> None:
    """Raise ConfigurationError unless an environment is one of this package that still shows its own dictionary.

    Args:
        env: single or vector, wrapped or not.
        instead: the wrapper for environments of its kind, where it is of the wrong one.
    """
    if instead is not None:
        wanted, kind = ("vector", "single") if isinstance(env, gym.Env) else ("single", "vector")
        raise ConfigurationError(
            f"`env` must be a {wanted} environment, got {env}. Use {instead} for a {kind} environment."
        )
    inner = env.unwrapped
    if not isinstance(getattr(inner, "config", None), SystemConfig):
        raise ConfigurationError(
            f"`env` must be an environment of this package, wrapped or not, got {inner}. "
            "Make it with gym.make(refine_env.ENV_ID), or gym.make_vec for a vector environment."
        )
    name = "single_observation_space" if isinstance(env, VectorEnv) else "observation_space"
    if getattr(env, name) != getattr(inner, name):
        raise ConfigurationError(
            f"`env` must show the environment's own dictionary, got the observation {shown(getattr(env, name))}. "
            "Put this around the environment first, once, and what changes observations around it."
        )


class EncodeObservation(
    gym.ObservationWrapper[NDArray[np.float32], Any, dict[str, Any]], gym.utils.RecordConstructorArgs
):
    """The single environment with vectors as observations.

    Args:
        env: a :class:`refine_env.LatentRefinementEnv`, wrapped or not, whose observation is still the dictionary.
        encoding: see :class:`ObservationEncoder`.
        history: see :class:`ObservationEncoder`.

    Attributes:
        encoder: the encoder.

    Raises:
        ConfigurationError: if the environment is another one, or its observation is not the dictionary.
    """

    def __init__(
        self, env: gym.Env[dict[str, Any], Any], encoding: str = "summary", history: int | None = None
    ) -> None:
        given: Any = env
        check_shows_dictionary(given, "VectorEncodeObservation" if isinstance(given, VectorEnv) else None)
        gym.utils.RecordConstructorArgs.__init__(self, encoding=encoding, history=history)
        super().__init__(env)
        length = given.unwrapped.settings.history_length
        self.encoder = ObservationEncoder(given.unwrapped.config, encoding, history=history, history_length=length)
        self.observation_space = self.encoder.space

    def observation(self, observation: dict[str, Any]) -> NDArray[np.float32]:
        """The vector of an observation, float32 (D,)."""
        return self.encoder.encode_one(observation)

    def action_masks(self) -> NDArray[np.bool_]:
        """Which actions are legal now, bool (n,)."""
        masks: NDArray[np.bool_] = self.env.get_wrapper_attr("action_masks")()
        return masks


class VectorEncodeObservation(RefinementVectorWrapper, metaclass=NamesAdapter):
    """The vector environment with vectors as observations, those in ``infos["final_obs"]`` included.

    Args:
        env: a :class:`refine_env.LatentRefinementVectorEnv`, wrapped or not, whose observation is still the
            dictionary.
        encoding: see :class:`ObservationEncoder`.
        history: see :class:`ObservationEncoder`.

    Attributes:
        encoder: the encoder.
        observations: the last observations as they were before, the dictionary.

    Raises:
        ConfigurationError: if the environment is another one, or its observation is not the dictionary.
    """

    def __init__(
        self,
        env: VectorEnv[dict[str, Any], Any, NDArray[Any]],
        encoding: str = "summary",
        history: int | None = None,
    ) -> None:
        given: Any = env
        check_shows_dictionary(given, "EncodeObservation" if isinstance(given, gym.Env) else None)
        super().__init__(env)
        length = given.unwrapped.settings.history_length
        self.encoder = ObservationEncoder(given.unwrapped.config, encoding, history=history, history_length=length)
        self.single_observation_space = self.encoder.space
        self.observation_space = spaces.Box(-1.0, 1.0, (self.num_envs, *self.encoder.space.shape), np.float32)
        self.observations: dict[str, Any] = {}

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        """Start episodes; the observations encoded."""
        self.observations, infos = self.env.reset(seed=seed, options=options)  # type: ignore[arg-type]  # a list, too
        return self.encoder.encode(self.observations), infos

    def step(
        self, actions: Any
    ) -> tuple[NDArray[np.float32], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Act; the observations encoded."""
        self.observations, rewards, terminated, truncated, infos = self.env.step(actions)
        if "final_obs" in infos:
            final = infos["final_obs"]
            ended = np.flatnonzero(infos["_final_obs"])
            last = {key: np.array([final[i][key] for i in ended]) for key in final[ended[0]]}
            for i, row in zip(ended, self.encoder.encode(last), strict=True):
                final[i] = row
        return self.encoder.encode(self.observations), rewards, terminated, truncated, infos


def _masked_space(space: spaces.Space[Any], num_actions: int, observation_key: str, mask_key: str) -> spaces.Dict:
    return spaces.Dict({observation_key: space, mask_key: spaces.Box(0, 1, (num_actions,), np.int8)})


class MaskedObservation(gym.Wrapper[dict[str, Any], Any, Any, Any], gym.utils.RecordConstructorArgs):
    """The single environment with the action mask in the observation, where many RL libraries look for it.

    Args:
        env: a :class:`refine_env.LatentRefinementEnv`, wrapped or not.
        observation_key: of what is observed otherwise; RLlib wants ``"observations"``, Tianshou ``"obs"``.
        mask_key: of the mask, int8 (n,); Tianshou wants ``"mask"``.
    """

    def __init__(
        self, env: gym.Env[Any, Any], observation_key: str = "observations", mask_key: str = "action_mask"
    ) -> None:
        gym.utils.RecordConstructorArgs.__init__(self, observation_key=observation_key, mask_key=mask_key)
        super().__init__(env)
        self._keys = observation_key, mask_key
        actions: Any = env.action_space
        self.observation_space = _masked_space(env.observation_space, int(actions.n), *self._keys)

    def _with_mask(self, observation: Any, info: dict[str, Any]) -> dict[str, Any]:
        return dict(zip(self._keys, (observation, info["action_mask"].copy()), strict=True))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode."""
        observation, info = self.env.reset(seed=seed, options=options)
        return self._with_mask(observation, info), info

    def step(self, action: Any) -> tuple[dict[str, Any], Any, bool, bool, dict[str, Any]]:
        """Act."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return self._with_mask(observation, info), reward, terminated, truncated, info

    def action_masks(self) -> NDArray[np.bool_]:
        """Which actions are legal now, bool (n,)."""
        masks: NDArray[np.bool_] = self.env.get_wrapper_attr("action_masks")()
        return masks


class VectorMaskedObservation(RefinementVectorWrapper):
    """The vector environment with the action masks in the observation, those in ``infos["final_obs"]`` included.

    Args:
        env: a :class:`refine_env.LatentRefinementVectorEnv`, wrapped or not.
        observation_key, mask_key: see :class:`MaskedObservation`.
    """

    def __init__(
        self,
        env: VectorEnv[Any, Any, NDArray[Any]],
        observation_key: str = "observations",
        mask_key: str = "action_mask",
    ) -> None:
        super().__init__(env)
        self._keys = observation_key, mask_key
        actions: Any = env.single_action_space
        self.single_observation_space = _masked_space(env.single_observation_space, int(actions.n), *self._keys)
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)

    def _with_mask(self, observations: Any, masks: NDArray[np.int8]) -> dict[str, Any]:
        return dict(zip(self._keys, (observations, masks.copy()), strict=True))

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start episodes."""
        observations, infos = self.env.reset(seed=seed, options=options)  # type: ignore[arg-type]  # a list, too
        return self._with_mask(observations, self.action_masks().astype(np.int8)), infos

    def step(self, actions: Any) -> tuple[dict[str, Any], NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Act."""
        observations, rewards, terminated, truncated, infos = self.env.step(actions)
        for i in np.flatnonzero(infos.get("_final_obs", ())):
            infos["final_obs"][i] = self._with_mask(infos["final_obs"][i], infos["final_info"]["action_mask"][i])
        masks = self.action_masks().astype(np.int8)
        return self._with_mask(observations, masks), rewards, terminated, truncated, infos


class ArrayInfo(gym.Wrapper[Any, Any, Any, Any], gym.utils.RecordConstructorArgs):
    """The single environment with arrays alone in ``info``: what is a number becomes one of shape ().

    For libraries that read types off ``info``, as TorchRL's ``auto_register_info_dict`` does.

    Args:
        env: a :class:`refine_env.LatentRefinementEnv`, wrapped or not.
    """

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        gym.utils.RecordConstructorArgs.__init__(self)
        super().__init__(env)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode."""
        observation, info = self.env.reset(seed=seed, options=options)
        return observation, {key: np.asarray(value) for key, value in info.items()}

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Act."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, reward, terminated, truncated, {key: np.asarray(value) for key, value in info.items()}
