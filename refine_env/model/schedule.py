"""The noise schedule: ᾱ_t and the relations of the forward process."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refine_env._validation import check_integer
from refine_env.errors import ConfigurationError

__all__ = ["NoiseSchedule", "alphas_cumprod"]


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Cumulative signal fractions ᾱ_0 … ᾱ_T of a diffusion process ([K] Eq. 2).

    Args:
        alpha_bar: ᾱ_t, shape (T+1,), indexed by the step t; t = 0 is the clean latent (ᾱ_0 = 1
            exactly), t = T only noise. Strictly decreasing, in (0, 1].

    Raises:
        ConfigurationError: if ``alpha_bar`` is not of that form.
    """

    alpha_bar: NDArray[np.float64]

    def __init__(self, alpha_bar: ArrayLike) -> None:
        try:
            values = np.array(alpha_bar, dtype=np.float64)
        except (TypeError, ValueError, OverflowError):
            values = np.empty(())
        if values.ndim != 1 or values.size < 2:
            raise ConfigurationError(
                f"`alpha_bar` must be a sequence of T+1 >= 2 numbers, got shape {values.shape}. "
                "Give one value per step t = 0 … T."
            )
        if not (np.isfinite(values).all() and values[0] == 1.0 and values[-1] > 0.0):
            raise ConfigurationError(
                f"`alpha_bar` must be finite, begin with exactly 1 and stay above 0, got "
                f"{values[0]!r} … {values[-1]!r}. Index it by the step t, clean latent first."
            )
        if not (np.diff(values) < 0).all():
            step = int(np.flatnonzero(np.diff(values) >= 0)[0]) + 1
            raise ConfigurationError(
                f"`alpha_bar` must be strictly decreasing, got alpha_bar[{step}] = {values[step]!r} "
                f"after {values[step - 1]!r}. Index it by the step t, clean latent first."
            )
        values.setflags(write=False)
        object.__setattr__(self, "alpha_bar", values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NoiseSchedule) and np.array_equal(self.alpha_bar, other.alpha_bar)

    def __hash__(self) -> int:
        return hash(self.alpha_bar.tobytes())

    @property
    def num_steps(self) -> int:
        """T, the number of reverse diffusion steps."""
        return self.alpha_bar.size - 1

    @property
    def alpha(self) -> NDArray[np.float64]:
        """One-step factors α_t = ᾱ_t / ᾱ_{t−1} for t = 1 … T, shape (T,); ``alpha[t - 1]`` is α_t."""
        return self.alpha_bar[1:] / self.alpha_bar[:-1]

    @property
    def posterior_variance(self) -> NDArray[np.float64]:
        """β̃_t = (1 − ᾱ_{t−1})/(1 − ᾱ_t) · (1 − α_t) of [K] Eq. (3) for t = 1 … T, shape (T,)."""
        ab = self.alpha_bar
        return (1.0 - ab[:-1]) / (1.0 - ab[1:]) * (1.0 - self.alpha)

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: ArrayLike, timesteps: Sequence[int]) -> NoiseSchedule:
        """Respace a training schedule to the inference timesteps.

        Args:
            alphas_cumprod: the training schedule's cumulative products, shape (train steps,).
            timesteps: the inference timesteps τ_T > … > τ_1, as a scheduler lists them.

        Returns:
            The schedule with ``alpha_bar[t] = alphas_cumprod[τ_t]`` and ``alpha_bar[0] = 1``.

        Raises:
            ConfigurationError: if the timesteps do not fall strictly.
        """
        table = np.asarray(alphas_cumprod, dtype=np.float64)
        taus = np.asarray(timesteps, dtype=np.int64)
        if taus.ndim != 1 or taus.size < 1 or (np.diff(taus) >= 0).any():
            raise ConfigurationError(
                f"`timesteps` must be strictly decreasing, got {list(map(int, np.ravel(taus)))[:6]} …. "
                "Pass a scheduler's own `timesteps`, one network evaluation each."
            )
        if taus[-1] < 0 or taus[0] >= table.size:
            raise ConfigurationError(
                f"`timesteps` must lie in 0 … {table.size - 1}, got {int(taus[-1])} … {int(taus[0])}. "
                "Use the scheduler that `alphas_cumprod` comes from."
            )
        return cls(np.concatenate([[1.0], table[taus[::-1]]]))

    @classmethod
    def from_scheduler(cls, scheduler: Any, num_steps: int) -> NoiseSchedule:
        """The schedule that a diffusers scheduler follows with ``num_steps`` inference steps.

        Args:
            scheduler: any object with diffusers' ``alphas_cumprod``, ``set_timesteps`` and ``timesteps``.
            num_steps: T.

        Raises:
            ConfigurationError: if the scheduler has no ``alphas_cumprod``, or its timesteps are not T
                strictly decreasing ones (PNDM, for one, evaluates the network T+1 times).
        """
        table = getattr(scheduler, "alphas_cumprod", None)
        name = type(scheduler).__name__
        if table is None:
            raise ConfigurationError(
                f"`scheduler` must have `alphas_cumprod`, got {name}. Use a discrete-time "
                "scheduler such as DDPMScheduler (the paper's) or DDIMScheduler."
            )
        try:
            scheduler.set_timesteps(num_steps)
        except ValueError:  # diffusers' own limit, in sentences of its own
            limit = getattr(getattr(scheduler, "config", None), "num_train_timesteps", "unknown")
            raise ConfigurationError(
                f"`num_steps` must be a number of timesteps that {name} has, of {limit}, got {num_steps}. [K] takes 50."
            ) from None
        timesteps = [int(tau) for tau in scheduler.timesteps]
        if len(timesteps) != num_steps or any(a <= b for a, b in itertools.pairwise(timesteps)):
            raise ConfigurationError(
                f"`scheduler` must evaluate the network once at each of {num_steps} falling timesteps, got "
                f"{len(timesteps)} from {name}. Use DDPMScheduler (the paper's) or DDIMScheduler."
            )
        return cls.from_alphas_cumprod(np.asarray(table, dtype=np.float64), timesteps)

    @classmethod
    def stable_diffusion(cls, num_steps: int = 50) -> NoiseSchedule:
        """Stable Diffusion v1-5's schedule: scaled-linear β from 0.00085 to 0.012 over 1000 steps.

        Leading spacing with offset 1: τ_t = ⌊1000/T⌋ (t − 1) + 1.

        Raises:
            ConfigurationError: if ``num_steps`` is not in 1 … 999.
        """
        num_steps = check_integer("num_steps", num_steps, 1, 999, advice="The schedule has 1000 training steps.")
        taus = np.arange(num_steps - 1, -1, -1) * (1000 // num_steps) + 1
        return cls.from_alphas_cumprod(alphas_cumprod(0.00085, 0.012, 1000, 0.5), taus.tolist())


def alphas_cumprod(beta_start: float, beta_end: float, num_train_steps: int, power: float) -> NDArray[np.float64]:
    """A training schedule's cumulative products of 1 − β.

    Args:
        beta_start: the first β.
        beta_end: the last β.
        num_train_steps: their number.
        power: β to this power are equally spaced: 1 is diffusers' ``linear``, 0.5 its ``scaled_linear``.

    Returns:
        Shape (num_train_steps,).
    """
    beta = np.linspace(beta_start**power, beta_end**power, num_train_steps) ** (1.0 / power)
    return np.cumprod(1.0 - beta, dtype=np.float64)
