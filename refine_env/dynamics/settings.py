"""The keyword arguments of the environments, validated once, and what follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike, fspath
from typing import Any

import numpy as np

from refine_env._validation import check_choice, check_flag, check_integer, did_you_mean, shown
from refine_env.coding import CoderConfig
from refine_env.config import (
    PAPER_BIT_DEPTHS,
    PAPER_DEADLINE,
    PAPER_LATENCY_QUANTILE,
    LinkConfig,
    SystemConfig,
    WarmStart,
)
from refine_env.errors import ConfigurationError, UnexpectedArgumentError
from refine_env.model.distortion import SecondMoments
from refine_env.trajectories import SPLITS, TrajectoryCache

__all__ = ["DEVICE_DECODERS", "ILLEGAL_ACTIONS", "MOMENTS", "REWARDS", "EnvSettings"]

DEVICE_DECODERS = ("none", "denoise")
MOMENTS = ("model", "measured")
REWARDS = ("terminal", "improvement", "log", "anytime")
ILLEGAL_ACTIONS = ("wait", "raise")


@dataclass(frozen=True, kw_only=True)
class EnvSettings(CoderConfig):
    """Arguments of the environments; see the table in :class:`refine_env.env.LatentRefinementEnv`.

    All values are JSON, so an environment's spec can be written out and read back.

    Raises:
        ConfigurationError: if a value is out of range or does not fit the cache.
        CacheError: if the cache is missing or damaged.
    """

    snr_db: float | Sequence[float] = 6.0
    cache: str = "default"
    split: str = "train"
    deadline: int = PAPER_DEADLINE
    bit_depths: Sequence[int] = PAPER_BIT_DEPTHS
    latency_quantile: float = PAPER_LATENCY_QUANTILE
    latency_model: str = "paper"
    link: Mapping[str, Any] | None = None
    latent_dim: int | None = None
    moments: str = "model"
    device_decoder: str = "none"
    warm_start: Mapping[str, Any] | None = None
    reward: str = "terminal"
    illegal_action: str = "wait"
    history_length: int | None = None
    decision_epochs: bool = False
    render_decoder: str = "auto"

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any]) -> EnvSettings:
        """The settings given by keyword.

        Raises:
            UnexpectedArgumentError: if a keyword is unknown.
        """
        known = [item.name for item in fields(cls)]
        unknown = sorted(set(kwargs) - set(known))
        if unknown:
            of_link = {item.name: f"link={{'{item.name}': …}}" for item in fields(LinkConfig)}
            of_others = {"max_episode_steps": "`deadline`"}
            likely = did_you_mean(unknown, {**of_others, **of_link, **{name: f"`{name}`" for name in known}})
            raise UnexpectedArgumentError(  # with the words of Python's own error, which TorchRL looks for
                f"Environment arguments must be among {', '.join(known)}, got an unexpected keyword argument "
                f"{', '.join(map(repr, unknown))}. {likely}Correct the spelling or leave it out."
            )
        return cls(**kwargs)

    def __post_init__(self) -> None:
        if isinstance(self.cache, PathLike):
            object.__setattr__(self, "cache", fspath(self.cache))
        if not isinstance(self.cache, str):
            raise ConfigurationError(
                f"`cache` must be a cache's name or folder, got {shown(self.cache)}. Give for example 'default'."
            )
        super().__post_init__()
        check_choice("split", self.split, SPLITS)
        check_choice("reward", self.reward, REWARDS)
        check_choice("illegal_action", self.illegal_action, ILLEGAL_ACTIONS)
        check_choice("moments", self.moments, MOMENTS)
        check_choice("device_decoder", self.device_decoder, DEVICE_DECODERS)
        check_flag("decision_epochs", self.decision_epochs)
        if not isinstance(self.render_decoder, str) or not self.render_decoder:
            raise ConfigurationError(
                f"`render_decoder` must be 'auto', 'none' or a model, got {shown(self.render_decoder)}. "
                "Give a model's folder or hub id, or 'none' to show no images."
            )
        if self.latent_dim is not None:
            check_integer("latent_dim", self.latent_dim, 1, 2**62, advice="Give the cache's M, or leave it out.")
        if self.history_length is not None:
            check_integer(
                "history_length",
                self.history_length,
                1,
                100_000,
                advice="Give a number of slots, or None for the deadline.",
            )

    def open_cache(self) -> TrajectoryCache:
        """The trajectory cache, its structure checked."""
        return TrajectoryCache.open(self.cache)

    def config_for(self, cache: TrajectoryCache) -> SystemConfig:
        """The system that these settings describe on that cache's schedule and latents.

        Raises:
            ConfigurationError: if ``latent_dim`` is not the cache's, or nobody has measured the device's decoder.
        """
        if self.latent_dim is not None and self.latent_dim != cache.latent_dim:
            raise ConfigurationError(
                f"`latent_dim` must be that of the cache, {cache.latent_dim}, got {self.latent_dim!r}. "
                f"Leave it out, or choose a cache of that size (this one is {self.cache!r})."
            )
        if cache.midpoint is not None:
            for name, known in (("device_decoder", "none"), ("payload", "latent")):
                if getattr(self, name) != known:
                    raise ConfigurationError(
                        f"`{name}` must be {known!r} on a cache whose trajectories start at midpoints, got "
                        f"{getattr(self, name)!r}. Leave it out, or choose a cache of full runs (this one is "
                        f"{self.cache!r})."
                    )
        return SystemConfig(
            snr_db=self.snr_db,  # type: ignore[arg-type]  # a pair is checked and made a tuple there
            latent_dim=cache.latent_dim,
            schedule=cache.payload_schedule,
            bit_depths=self.bit_depths,  # type: ignore[arg-type]  # likewise
            deadline=self.deadline,
            latency_quantile=self.latency_quantile,
            latency_model=self.latency_model,
            link=LinkConfig.from_mapping(self.link),
            **self.coder_options(),
            second_moments=self._second_moments(cache),
            decoder_curve=None if self.device_decoder == "none" else cache.decoder_curve(self.payload),
            warm_start=self._warm_start(cache),
        )

    def _warm_start(self, cache: TrajectoryCache) -> WarmStart | None:
        """As given; on a cache that starts at midpoints there, and shared only where that is asked for."""
        given, step = self.warm_start, cache.midpoint
        if step is not None and (given is None or isinstance(given, Mapping)):
            given = {"step": step, **(given or {})}
        start = WarmStart.from_mapping(given)
        if start is not None and step not in (None, start.step):
            raise ConfigurationError(
                f"`warm_start.step` must be that of the cache, whose trajectories start at x_{step}, got {start.step}. "
                f"Leave it out, or choose another cache (this one is {self.cache!r})."
            )
        return start

    def _second_moments(self, cache: TrajectoryCache) -> SecondMoments | None:
        """What the closed-loop coder predicts with; None where the noise schedule says it."""
        if self.coder != "closed_loop" or (self.payload == "latent" and self.moments == "model"):
            return None
        if self.payload == "latent":
            return SecondMoments(cache.payload_moments)
        if self.moments == "model":
            return SecondMoments.martingale(cache.mmse)
        return SecondMoments(np.pad(cache.clean_second_moments, (0, 1)))  # y_T := 0
