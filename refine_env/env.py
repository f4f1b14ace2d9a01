"""The single environment."""

from __future__ import annotations

import operator
import sys
import traceback
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.wrappers import TimeLimit
from numpy.typing import NDArray

from refine_env._validation import check_integer, shown
from refine_env.config import SystemConfig
from refine_env.dynamics.process import (
    BITS_SENT,
    DELIVERED,
    DEVICE_BITS,
    DEVICE_ERROR,
    DEVICE_STEP,
    FLOATS,
    FULL_LATENT_MSE,
    ILLEGAL,
    INTEGERS,
    LATENT_MSE,
    NUM_DELIVERIES,
    NUMBERS,
    REMAINING_BITS,
    REWARD,
    SERVER_STEP,
    SLOT,
    TRAJECTORY,
    UPLINK_SLOTS,
    DecisionProcess,
)
from refine_env.dynamics.settings import EnvSettings
from refine_env.errors import ConfigurationError, RenderModeError
from refine_env.render import EpisodeViewer, ansi_frame
from refine_env.trajectories import TrajectoryCache

__all__ = ["ENV_ID", "RENDER_MODES", "LatentRefinementEnv", "SystemProperties", "check_render_mode", "make_viewer"]

ENV_ID = "refine_env/LatentRefinement-v0"
"""The environment's id; a change of behavior gets a new version."""

RENDER_MODES = ("ansi", "human", "rgb_array")
PICTURE_MODES = ("human", "rgb_array")
_FLOAT32, _INT8 = np.dtype(np.float32), np.dtype(np.int8)
# `_observe` unpacks rows in their order, since looking them up one by one would be a twentieth of a step.
assert tuple(range(6)) == (SLOT, SERVER_STEP, DEVICE_STEP, DEVICE_BITS, NUM_DELIVERIES, UPLINK_SLOTS)
assert tuple(range(6, INTEGERS)) == (TRAJECTORY, DELIVERED, ILLEGAL)
assert tuple(range(NUMBERS)) == (BITS_SENT, LATENT_MSE, REWARD)


def check_render_mode(
    render_mode: str | None, known: tuple[str, ...] = RENDER_MODES, advice: str = "Choose one of them."
) -> str | None:
    """``render_mode`` if it is known; raises RenderModeError otherwise."""
    if render_mode is not None and (not isinstance(render_mode, str) or render_mode not in known):
        raise RenderModeError(
            f"`render_mode` must be one of {', '.join(map(repr, known))} or None, got {shown(render_mode)}. {advice}"
        )
    return render_mode


def make_viewer(render_mode: str | None, process: DecisionProcess, fps: float) -> EpisodeViewer | None:
    """The viewer that notes the past for pictures; None in the other render modes, which then cost nothing."""
    if render_mode not in PICTURE_MODES:
        return None
    return EpisodeViewer(process.episodes, process.cache, process.settings.render_decoder, fps)


class SystemProperties:
    """What the single and the vector environment alike say of the system that they simulate."""

    _process: DecisionProcess

    @property
    def config(self) -> SystemConfig:
        """The system: all that a policy may know in advance."""
        return self._process.config

    @property
    def cache(self) -> TrajectoryCache:
        """The trajectory cache."""
        return self._process.cache

    @property
    def settings(self) -> EnvSettings:
        """The arguments of the environment, or of each environment."""
        return self._process.settings


class LatentRefinementEnv(SystemProperties, gym.Env[dict[str, Any], np.int64]):
    """Deadline-aware transmission of a diffusion model's intermediate latents over a fading channel.

    ## Description

    An edge server generates a latent x_0 by T reverse diffusion steps, one a slot, after a prompt of B_s
    bits has come up the link. A device shows what it holds when the deadline, slot T_d, has passed. In any
    slot in which the channel is idle the server may send its newest latent x_t, quantized to b bits per
    dimension and coded relative to what the device already holds; the message occupies the link, K Rayleigh
    block-fading subchannels under waterfilling, until M·b bits have flowed. The score is the mean square
    error between the latent at the device and x_0.

    The problem and the model are those of Kalør and Ohtsuki, *Progressive Latent Refinement for
    Deadline-Aware Generative AI over Wireless Channels*; ``docs/model.md`` has the mathematics and every
    reading of the paper that is made here. Latents come from a cache of recorded trajectories.

    ## Action Space

    ``Discrete(1 + len(bit_depths))``: 0 is WAIT, i is TRANSMIT(bit_depths[i-1]). TRANSMIT is legal while
    the channel is idle, at least one diffusion step is done, and the server's latent is fresher than the
    device's; under the closed-loop coder also while they are the same and the device's has a coding error. :meth:`action_masks` gives the legal actions as bool ``(n,)``, ``info["action_mask"]`` as int8.

    ## Observation Space

    A ``Dict``; every observation, the terminal one too, lies in it, and it does not depend on the SNR.

    | key | space | meaning |
    |---|---|---|
    | ``slot`` | Discrete(T_d+2) | n, 1-based; T_d+1 after the last slot |
    | ``server_step`` | Discrete(T+1) | t(n), newest latent at the server; T = only noise, 0 = clean; with a warm start m as soon as the prompt is there |
    | ``device_step`` | Discrete(T+1) | t_p, latent that the device has decoded; T = the shared noise; with a shared midpoint it starts from m |
    | ``channel_history`` | Box float32 (history_length,) | bits per latent dimension of the slots up to the current one, most recent last, 0 before slot 1; saturates at what carries the largest message in one slot |
    | ``remaining_bits`` | Box float32 (1,) | bits per dimension still to flow of the message in flight, the prompt included; 0 = idle |
    | ``device_error`` | Box float32 (1,) | predicted coding error per dimension of what the device holds; with the `forward` coder D_quant of the last delivery, which neglects the errors before it; saturates at the largest that the model knows |
    | ``device_bits`` | Discrete(17) | bit depth of the last delivery, 0 = none |

    ## Rewards

    With M dimensions and ŷ what the device holds:

    - ``"terminal"`` (default): −(1/M)‖ŷ − x_0‖² after the last slot, 0 before; the return is the paper's objective.
    - ``"improvement"``: the drop of (1/M)‖ŷ − x_0‖² at each delivery.
    - ``"log"``: −10·log10((1/M)‖ŷ − x_0‖² + 1e-8) after the last slot, 0 before.
    - ``"anytime"``: after every slot −(1/M)‖ŷ − x_0‖²/T_d of what the device then holds; the return is minus the mean
      over the slots of what the device shows. A step that runs through several slots (``decision_epochs``) pays for
      all of them, the first step also for those that the reset ran through.

    ## Starting State

    Slot 1 with the prompt still to be sent, the device with x_T, or with what ``payload`` or ``warm_start`` say. ``reset(seed=)`` fixes the whole episode: the trajectory, the SNR
    where it is a range, and the gains of all slots are drawn at reset, in that order.
    ``reset(options={"trajectory": i, "rates": [...]})`` replays a trajectory (an index of the cache) or a channel
    (bits per slot, length T_d); what is replayed never changes what else is drawn.

    ## Episode End

    The episode terminates after slot T_d: the deadline is part of the problem. It is never truncated; a
    ``TimeLimit`` below the deadline (``gym.make(..., max_episode_steps=...)``), under which nothing would be paid,
    is refused at the first reset.

    ## Arguments

    | argument | default | meaning |
    |---|---|---|
    | ``snr_db`` | 6.0 | mean SNR per subchannel [dB], or [low, high] to draw it for every episode; never observed |
    | ``cache`` | "default" | name or folder of a trajectory cache; sets T, M and the noise schedule |
    | ``split`` | "train" | "train", "test" or "all": which trajectories are drawn |
    | ``deadline`` | 60 | T_d [slots] |
    | ``bit_depths`` | [3, 4, 8, 10, 16] | 𝓑, ascending, 1 … 16; 16 is lossless |
    | ``latency_quantile`` | 0.9 | q of the latency model, for policies that use it |
    | ``latency_model`` | "paper" | the law of which they take the quantile: "paper", the Gaussian one with a fixed cutoff, or "exact", that of the link as it is |
    | ``link`` | None | object of :class:`refine_env.LinkConfig` arguments; ℓ and B_s scale with M unless told otherwise |
    | ``latent_dim`` | None | M, only to insist on it: must be the cache's |
    | ``coder`` | "forward" | the refinement coder: the paper's, or "closed_loop": MMSE prediction from what the device holds, its error tracked |
    | ``payload`` | "latent" | what is sent: x_t, or with "posterior_mean" y_t = E[x_0 given x_{t+1}], closed loop only; the device then starts from 0 |
    | ``moments`` | "model" | what the closed-loop coder predicts with: the forward process (of y_t: a martingale with the cache's mmse), or "measured" on the cache's train split |
    | ``device_decoder`` | "none" | what policies are told of the device: with "denoise" it applies the cache's model once to what it holds at the deadline, and their configuration has the measured curve of that; rewards and scores here stay those of what it holds |
    | ``warm_start`` | None | object with ``step`` m, ``shared`` and ``name_bits``: generation starts from a stored midpoint x_m, 1 … T − 1, in place of noise; where it is ``shared`` (default False) the device starts with it, too, and the first message carries its name, ``name_bits`` (default 32) more; `latent` payload only. A cache that starts at midpoints says m itself: None is there ``{"step": m}``, and m the only step |
    | ``rotation`` | True | closed loop: rotate residuals before they are quantized |
    | ``sent_scale`` | True | closed loop: send the root mean square of every residual, 16 bits a message |
    | ``same_step_refinement`` | True | closed loop: the step that the device holds with an error may be sent again |
    | ``entropy_coding`` | False | closed loop with rotation and sent scale: entropy-code the indices; a message of b bits then has a fixed, smaller size |
    | ``reward`` | "terminal" | see Rewards |
    | ``illegal_action`` | "wait" | an illegal TRANSMIT is a WAIT (and marked in info), or with "raise" an error |
    | ``history_length`` | None | slots in ``channel_history``; None: the deadline |
    | ``decision_epochs`` | False | run through the slots in which only WAIT is legal |
    | ``render_mode`` | None | "ansi": one line of text a slot; "rgb_array": a picture of the episode so far, uint8 (540, 960, 3); "human": the same in a window |
    | ``render_decoder`` | "auto" | what decodes the images in pictures: "auto": the cache's own model, where it is at hand; "none": nothing; or a model's folder or hub id |

    ## Info

    The same keys after every step and reset:

    | key | type | meaning |
    |---|---|---|
    | ``action_mask`` | int8 (n,) | legal actions now |
    | ``bits_sent`` | float | bits that the downlink has carried |
    | ``delivered`` | bool | a delivery completed in this step |
    | ``illegal_action`` | bool | this step's action was an illegal TRANSMIT, treated as WAIT |
    | ``latent_mse`` | float | (1/M)‖ŷ − x_0‖² of what the device holds; unknown to a real server |
    | ``full_latent_mse`` | float | the same against the x_0 of the full run; only where the cache has it (``--with-full``) |
    | ``num_deliveries`` | int | deliveries so far |
    | ``trajectory`` | int | index in the cache |
    | ``uplink_slots`` | int | T_ul, 0 while the uplink runs |

    ## Vectorized Environment

    ``gymnasium.make_vec(id, num_envs=N)`` gives :class:`refine_env.vector_env.LatentRefinementVectorEnv`,
    equal bit for bit to ``SyncVectorEnv`` over N of these; it also takes ``autoreset_mode``.

    ## Version History

    - v0: initial version
    """

    metadata = {"render_modes": list(RENDER_MODES), "render_fps": 4}  # noqa: RUF012 - as Gymnasium declares it

    def __init__(self, *, render_mode: str | None = None, **kwargs: Any) -> None:
        self.render_mode = check_render_mode(render_mode)
        self._process = DecisionProcess(EnvSettings.from_kwargs(kwargs), num_envs=1)
        self._viewer = make_viewer(render_mode, self._process, self.metadata["render_fps"])
        self._action = np.zeros(1, dtype=np.int64)
        self._wrappers_checked = False
        self._num_actions = self._process.config.num_actions
        self._integers = np.empty((INTEGERS, 1), dtype=np.int64)
        self._numbers = np.empty((NUMBERS, 1))
        self._history_shape = (1, self._process.history_length)
        self._mask_shape = (1, self._num_actions)
        self._deadline = self._process.config.deadline
        self._slot = 0  # n, as the last observation has it; 0 before the first episode
        self.observation_space = self._process.observation_space
        self.action_space = self._process.action_space

    @property
    def episode_rates(self) -> NDArray[np.float64]:
        """Bits that every slot of the episode carries, to its end, (T_d,): for bounds and pictures, not for policies.

        Raises:
            ResetNeeded: if no episode has begun.
        """
        self._check_begun("have a channel")
        rates: NDArray[np.float64] = self._process.episodes.rates[0].copy()
        return rates

    @property
    def episode_snr_db(self) -> float:
        """SNR in dB that the episode's gains were drawn with: for bounds and pictures, not for policies.

        Raises:
            ResetNeeded: if no episode has begun.
        """
        self._check_begun("have a channel")
        return float(self._process.snrs_db[0])

    def _check_begun(self, purpose: str) -> None:
        if not self._process.episodes.begun():
            raise ResetNeeded(f"An episode must have begun to {purpose}, got none. Call reset().")

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Start an episode.

        Args:
            seed: fixes the whole episode.
            options: ``"trajectory"`` and ``"rates"`` to replay, see Starting State.

        Raises:
            ConfigurationError: if the seed or an option is unknown or out of range, or a ``TimeLimit`` around the
                environment would end the episode before the deadline.
        """
        if seed is not None:
            seed = check_integer("seed", seed, 0, advice="Give a non-negative seed, or None.")
        if not self._wrappers_checked:  # it takes as long as two steps, and wrappers stay
            self._refuse_time_limit()
            self._wrappers_checked = True
        checked = self._process.check_options(options)
        super().reset(seed=seed)
        self._process.begin((0,), self._process.draw((self.np_random,)), checked)
        if self._viewer is not None:
            self._viewer.begin(0)
            self._show()
        observation, info, _ = self._observe()
        return observation, info

    def _refuse_time_limit(self) -> None:
        """Raise ConfigurationError if a wrapper ends episodes before the deadline, where they would pay nothing.

        An environment does not know the wrappers around it, and its ``spec`` names only the limit of ``gym.make``, not
        one that was put around it later. But a reset passes through all of them: so they are the callers, from the
        innermost to the outermost, with nothing but Gymnasium's own functions between them.
        """
        for frame, _ in traceback.walk_stack(sys._getframe(2)):
            wrapper = frame.f_locals.get("self")
            if isinstance(wrapper, gym.Wrapper) and wrapper.unwrapped is self:
                if isinstance(wrapper, TimeLimit) and wrapper._max_episode_steps < self.config.deadline:
                    raise ConfigurationError(
                        f"`max_episode_steps` must be at least the deadline, {self.config.deadline}, got "
                        f"{wrapper._max_episode_steps}: cut off before it, an episode pays nothing. Leave it out, or "
                        "make the environment with another `deadline`."
                    )
            elif not frame.f_globals.get("__name__", "").startswith("gymnasium."):
                return

    def step(self, action: np.int64 | int) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Act in the current slot and pass to the next.

        Raises:
            ActionError: if the action is not in the action space, or illegal under ``illegal_action="raise"``.
            ResetNeeded: if the episode is over or none has begun.
        """
        process = self._process
        if not 1 <= self._slot <= self._deadline:
            raise ResetNeeded("The episode must be running to step, got a finished or unstarted one. Call reset().")
        self._action[0] = self._check_action(action)
        process.step(self._action)
        if self._viewer is not None:
            self._viewer.follow(self._action)
            self._show()
        observation, info, reward = self._observe()
        return observation, reward, observation["slot"] > self._deadline, False, info

    def _check_action(self, action: Any) -> int:
        try:
            number = -1 if isinstance(action, (bool, np.bool_)) else operator.index(action)
        except TypeError:
            number = -1
        if not 0 <= number < self._num_actions:
            raise self._process.action_outside("action", action)
        return number

    def action_masks(self) -> NDArray[np.bool_]:
        """Which actions are legal now, bool (n,)."""
        legal: NDArray[np.bool_] = self._process.episodes.legal_actions()[0]
        return legal

    def render(self) -> str | NDArray[np.uint8] | None:
        """The episode so far.

        Returns:
            Under ``"ansi"`` the current slot as one line of text; under ``"rgb_array"`` a picture, uint8
            (540, 960, 3); under ``"human"`` None: every reset and step shows the picture in a window.

        Raises:
            ResetNeeded: if no episode has begun.
            MissingExtraError: if what draws pictures is not installed.
            ConfigurationError, CacheError: if ``render_decoder`` names a model that cannot be used.
        """
        self._check_begun("render it")
        if self._viewer is None:
            return ansi_frame(self._process.episodes, 0) if self.render_mode == "ansi" else None
        if self.render_mode == "rgb_array":
            return self._viewer.frame(0)
        self._show()
        return None

    def _show(self) -> None:
        """Under ``"human"``, bring the window up to date."""
        if self.render_mode == "human" and self._viewer is not None:
            self._viewer.show(0)

    def close(self) -> None:
        """Close the window, if there is one; the environment itself holds nothing that must be closed."""
        if self._viewer is not None:
            self._viewer.close()

    def _observe(self) -> tuple[dict[str, Any], dict[str, Any], float]:
        """Observation, info and reward, with plain numbers (``Observations.as_dicts`` has the same keys for N)."""
        floats = np.empty((FLOATS, 1, 1), _FLOAT32)
        history = np.empty(self._history_shape, _FLOAT32)
        mask = np.empty(self._mask_shape, _INT8)
        self._process.observe_into(self._integers, self._numbers, floats, history, mask)
        slot, server_step, device_step, device_bits, num_deliveries, uplink_slots, trajectory, delivered, illegal = (
            self._integers.ravel().tolist()
        )
        bits_sent, latent_mse, reward = self._numbers.ravel().tolist()
        self._slot = slot
        observation = {
            "channel_history": history[0],
            "device_bits": device_bits,
            "device_error": floats[DEVICE_ERROR, 0],
            "device_step": device_step,
            "remaining_bits": floats[REMAINING_BITS, 0],
            "server_step": server_step,
            "slot": slot,
        }
        info = {
            "action_mask": mask[0],
            "bits_sent": bits_sent,
            "delivered": delivered == 1,
            "illegal_action": illegal == 1,
            "latent_mse": latent_mse,
            "num_deliveries": num_deliveries,
            "trajectory": trajectory,
            "uplink_slots": uplink_slots,
        }
        if self._process.episodes.has_full:
            info[FULL_LATENT_MSE] = float(self._process.episodes.state[FULL_LATENT_MSE][0])
        return observation, info, reward
