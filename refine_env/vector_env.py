"""The natively vectorized environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import numpy as np
from gymnasium.error import ResetNeeded
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import ArrayLike, NDArray

from refine_env._validation import check_choice, check_integer, shown
from refine_env.dynamics.process import REWARD, DecisionProcess, Draws, Observations
from refine_env.dynamics.settings import EnvSettings
from refine_env.dynamics.simulator import NO_ACTION
from refine_env.env import RENDER_MODES, LatentRefinementEnv, SystemProperties, check_render_mode, make_viewer
from refine_env.errors import ConfigurationError, NamesAdapter
from refine_env.render import EpisodeViewer, ansi_frame

__all__ = ["LatentRefinementVectorEnv"]

VECTOR_RENDER_MODES = tuple(mode for mode in RENDER_MODES if mode != "human")
"""There is one window, and there are many environments."""

_MOST_ENVIRONMENTS = 1_000_000
_AUTORESET_MODES = {mode.value: mode for mode in AutoresetMode}


class LatentRefinementVectorEnv(
    SystemProperties, VectorEnv[dict[str, Any], NDArray[np.int64], NDArray[Any]], metaclass=NamesAdapter
):
    """N episodes of :class:`refine_env.env.LatentRefinementEnv` at once, in one compiled loop.

    Equal bit for bit to ``SyncVectorEnv`` over N single environments: each episode has its own generator,
    seeded with seed + i. It holds no single environments.

    Args:
        num_envs: N.
        autoreset_mode: ``"NextStep"`` (default), ``"SameStep"`` or ``"Disabled"``, as Gymnasium defines them; the
            metadata and the attribute of that name carry the enum. With ``"SameStep"`` a finished episode's last
            observation and info are in ``infos["final_obs"]`` and ``infos["final_info"]``; with ``"Disabled"`` finished
            episodes wait for ``reset(options={"reset_mask": ...})``.
        render_mode: ``None``, ``"ansi"`` or ``"rgb_array"``, a frame for each environment; there is no window.
        **kwargs: the single environment's arguments.
    """

    metadata = {  # noqa: RUF012 - as Gymnasium declares it
        **LatentRefinementEnv.metadata,
        "render_modes": list(VECTOR_RENDER_MODES),
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }

    _viewer: EpisodeViewer | None = None  # closing looks for it even where __init__ raised

    def __init__(
        self, num_envs: int = 1, *, autoreset_mode: str = "NextStep", render_mode: str | None = None, **kwargs: Any
    ) -> None:
        advice = "Give the number of environments."
        self.num_envs = check_integer("num_envs", num_envs, 1, advice=advice)
        check_integer("num_envs", self.num_envs, 1, _MOST_ENVIRONMENTS, advice=advice)
        # Accept the enum too, but document the string: the enum breaks EnvSpec.to_json.
        mode = autoreset_mode.value if isinstance(autoreset_mode, AutoresetMode) else autoreset_mode
        self.autoreset_mode = _AUTORESET_MODES[check_choice("autoreset_mode", mode, tuple(_AUTORESET_MODES))]
        self.metadata = {**type(self).metadata, "autoreset_mode": self.autoreset_mode}
        self.render_mode = check_render_mode(
            render_mode,
            VECTOR_RENDER_MODES,
            "A vector environment has no window: take 'rgb_array', or a single environment.",
        )
        self._process = DecisionProcess(EnvSettings.from_kwargs(kwargs), self.num_envs)
        self.single_observation_space = self._process.observation_space
        self.single_action_space = self._process.action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._viewer = make_viewer(render_mode, self._process, self.metadata["render_fps"])
        self._generators: list[np.random.Generator] = []
        self._seeds: list[int] = []
        self._ended = np.zeros(self.num_envs, dtype=np.bool_)

    @property
    def episode_rates(self) -> NDArray[np.float64]:
        """Bits that every slot of each episode carries, to its end, (N, T_d): for bounds and critics, not for policies.

        Raises:
            ResetNeeded: if some have not begun.
        """
        return self._copy_of(self._process.episodes.rates)

    @property
    def episode_snrs_db(self) -> NDArray[np.float64]:
        """SNR in dB that each episode's gains were drawn with, (N,): for rewards and critics, not for policies.

        Raises:
            ResetNeeded: if some have not begun.
        """
        return self._copy_of(self._process.snrs_db)

    @property
    def episode_trajectories(self) -> NDArray[np.int64]:
        """Index of each episode's trajectory in the cache, (N,).

        Raises:
            ResetNeeded: if some have not begun.
        """
        return self._copy_of(self._process.episodes.trajectory)

    def _copy_of(self, values: NDArray[Any]) -> NDArray[Any]:
        self._check_begun("have a channel")
        return values.copy()

    def _check_begun(self, purpose: str) -> None:
        if not self._process.episodes.begun():
            raise ResetNeeded(f"All episodes must have begun to {purpose}, got some that have not. Call reset().")

    @property  # type: ignore[misc]
    def np_random(self) -> tuple[np.random.Generator, ...]:  # type: ignore[override]
        """The generator of every episode."""
        self._ensure_generators()
        return tuple(self._generators)

    @property
    def np_random_seed(self) -> tuple[int, ...]:  # type: ignore[override]
        """The seed of every episode's generator."""
        self._ensure_generators()
        return tuple(self._seeds)

    def _ensure_generators(self) -> None:
        while len(self._generators) < self.num_envs:
            generator, seed = seeding.np_random()
            self._generators.append(generator)
            self._seeds.append(seed)

    def _reseed(self, seed: int | Sequence[int | None] | None, selected: NDArray[np.bool_]) -> None:
        self._ensure_generators()
        if seed is None:
            return
        if isinstance(seed, Integral):
            first = check_integer("seed", seed, 0, advice="Give a non-negative seed, or None.")
            seeds: list[Any] = [first + i for i in range(self.num_envs)]
        else:
            given: Any = seed
            several = given.ndim == 1 if isinstance(given, np.ndarray) else isinstance(given, (list, tuple))
            seeds = list(given) if several else []
        for one in seeds:
            if one is not None:
                check_integer("seed", one, 0, advice="Give a non-negative seed, or None.")
        if len(seeds) != self.num_envs:
            raise ConfigurationError(
                f"`seed` must be one integer or {self.num_envs} of them, got {shown(seed)}. Give one per environment."
            )
        for i in np.flatnonzero(selected):
            own = seeds[i]
            if own is not None:
                self._generators[i], self._seeds[i] = seeding.np_random(int(own))

    def reset(
        self,
        *,
        seed: int | Sequence[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Start an episode in every environment, or in those of ``options["reset_mask"]``.

        Args:
            seed: s seeds environment i with s + i; or one seed (or None) for each.
            options: ``"trajectory"`` (one, or one per environment), ``"rates"`` ((T_d,) or (N, T_d)) to replay, and
                ``"reset_mask"``, bool (N,).

        Raises:
            ConfigurationError: if an option or the seeds are not of that form.
        """
        given = options
        mask = None
        if isinstance(options, Mapping):
            given = {key: value for key, value in options.items() if key != "reset_mask"}
            mask = options.get("reset_mask")
        selected = np.ones(self.num_envs, dtype=np.bool_) if mask is None else mask
        if (
            not isinstance(selected, np.ndarray)
            or selected.dtype != np.bool_
            or selected.shape != (self.num_envs,)
            or not selected.any()
        ):
            raise ConfigurationError(
                f"`reset_mask` must be a bool array of shape ({self.num_envs},) with a True, got {shown(mask)}. "
                "Mark the environments to reset."
            )
        checked = self._process.check_options(given)
        self._reseed(seed, selected)
        self._ended[selected] = False
        self._begin(selected, checked)
        observations, infos = self._process.observe().as_dicts()
        return observations, self._masked_infos(infos, selected)

    def resume(
        self, trajectories: ArrayLike, rates: ArrayLike, snrs_db: ArrayLike, actions: NDArray[np.integer[Any]]
    ) -> None:
        """Put every environment into the middle of an episode, given what was drawn for it and the actions so far.

        The generators stay as they are; set them too where the episodes after this one are to be the same.

        Args:
            trajectories: :attr:`episode_trajectories` (N,).
            rates: :attr:`episode_rates` (N, T_d).
            snrs_db: :attr:`episode_snrs_db` (N,).
            actions: each episode's actions so far, integers (N, n), filled up with -1.

        Raises:
            ConfigurationError: if trajectories, rates or SNRs are none that such episodes can have.
            ActionError: if an action is not in the action space.
        """
        replayed = self._process.check_options({"trajectory": trajectories, "rates": rates})
        snrs = np.asarray(snrs_db, dtype=np.float64)
        low, high = self.config.snr_range_db
        if snrs.shape != (self.num_envs,) or not ((snrs >= low) & (snrs <= high)).all():
            raise ConfigurationError(
                f"`snrs_db` must be {self.num_envs} numbers in {low:g} … {high:g} dB, got {snrs_db!r:.100}. "
                "Give `episode_snrs_db` of such an environment."
            )
        everyone = range(self.num_envs)
        self._process.begin(everyone, Draws(replayed["trajectory"], replayed["rates"], snrs), replayed)
        if self._viewer is not None:
            for i in everyone:
                self._viewer.begin(i)
        for column in actions.T:
            waits = column == NO_ACTION
            taken = np.where(waits, NO_ACTION, self._process.check_actions(np.where(waits, 0, column)))
            self._process.step(taken)
            if self._viewer is not None:
                self._viewer.follow(taken)
        self._ended = self._process.episodes.finished() & (self.autoreset_mode != AutoresetMode.SAME_STEP)

    def step(
        self, actions: ArrayLike
    ) -> tuple[dict[str, NDArray[Any]], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]]:
        """Act in every environment.

        Args:
            actions: integers (N,); ignored, under ``"NextStep"``, where an episode has just ended.

        Raises:
            ActionError: if an action is not in the action space, or illegal under ``illegal_action="raise"``.
            ResetNeeded: if no episode has begun, or, under ``"Disabled"``, one is over.
        """
        values = self._process.check_actions(actions)
        self._check_begun("step")
        if self.autoreset_mode == AutoresetMode.DISABLED and self._ended.any():
            raise ResetNeeded(
                f"Every episode must be running to step, got finished ones in the environments "
                f"{np.flatnonzero(self._ended).tolist()!s:.60}. Call reset(options={{'reset_mask': terminated}})."
            )
        everywhere = np.ones(self.num_envs, dtype=np.bool_)
        fresh = self._ended
        taken = np.where(fresh, NO_ACTION, values)
        self._process.step(taken)
        if self._viewer is not None:
            self._viewer.follow(taken)
        if fresh.any():
            self._begin(fresh, {})
        terminated = self._process.episodes.finished()
        infos: dict[str, Any] = {}
        current = self._process.observe()
        rewards = current.numbers[REWARD]
        if self.autoreset_mode != AutoresetMode.SAME_STEP:
            self._ended = terminated.copy()
        elif terminated.any():
            infos = self._final(current, terminated)
            self._begin(terminated, {})
            current = self._process.observe()
        observations, current_infos = current.as_dicts()
        infos.update(self._masked_infos(current_infos, everywhere))
        return observations, rewards, terminated, np.zeros(self.num_envs, dtype=np.bool_), infos

    def action_masks(self) -> NDArray[np.bool_]:
        """Which actions are legal now, bool (N, n)."""
        return self._process.episodes.legal_actions()

    def render(self) -> tuple[str, ...] | tuple[NDArray[np.uint8], ...] | None:
        """The episodes so far, each as the single environment renders it; None without a render mode.

        Raises:
            ResetNeeded: if some have not begun.
            MissingExtraError: if what draws pictures is not installed.
            ConfigurationError, CacheError: if ``render_decoder`` names a model that cannot be used.
        """
        if self.render_mode is None:
            return None
        self._check_begun("render them")
        if self._viewer is not None:
            return tuple(self._viewer.frame(i) for i in range(self.num_envs))
        return tuple(ansi_frame(self._process.episodes, i) for i in range(self.num_envs))

    def _begin(self, selected: NDArray[np.bool_], options: dict[str, Any]) -> None:
        chosen = np.flatnonzero(selected).tolist()
        self._process.begin(chosen, self._process.draw([self._generators[i] for i in chosen]), options)
        if self._viewer is not None:
            for i in chosen:
                self._viewer.begin(i)

    def close_extras(self, **kwargs: Any) -> None:
        """Let go of what draws frames."""
        if self._viewer is not None:
            self._viewer.close()

    @staticmethod
    def _masked_infos(infos: dict[str, NDArray[Any]], selected: NDArray[np.bool_]) -> dict[str, Any]:
        """Gymnasium's batched form: every key with its values, 0 where not selected, and ``_key``, who has it."""
        masked: dict[str, Any] = {}
        everyone = selected.all()
        for key, values in infos.items():
            if not everyone:
                values[~selected] = 0
            masked[key], masked[f"_{key}"] = values, selected.copy()
        return masked

    def _final(self, last: Observations, ended: NDArray[np.bool_]) -> dict[str, Any]:
        """The last observations and infos of the episodes that just ended."""
        observations, infos = last.as_dicts()
        final_obs = np.full(self.num_envs, None, dtype=object)
        for i in np.flatnonzero(ended):
            final_obs[i] = {
                key: values[i] if values.ndim > 1 else values[i].item() for key, values in observations.items()
            }
        return {
            "final_obs": final_obs,
            "_final_obs": ended.copy(),
            "final_info": self._masked_infos(infos, ended),
            "_final_info": ended.copy(),
        }
