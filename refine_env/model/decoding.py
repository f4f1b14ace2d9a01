"""What a device holds as a noisy observation of x_0, and what a decoder that has the prior makes of it.

The device holds û_t = u_t + η, where u_t is what was sent and η the coding error, of E η² = e per dimension. A
quantizer whose levels are centroids leaves E[η (u_t + η)] = 0, and prediction from what the device holds keeps it so
along a chain of deliveries: the coefficient G[t,t_p]/G[t_p,t_p] is the one that makes the residual orthogonal to
û_{t_p}. So û_t relates to u_t as the output of a Gaussian test channel does to its input,

    û_t = k u_t + w,    k = 1 − e/E u_t²,    E w² = e k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refine_env.errors import ConfigurationError
from refine_env.model.distortion import SecondMoments
from refine_env.model.schedule import NoiseSchedule

__all__ = ["DecoderCurve", "DeviceObservation"]

_LARGEST_SHARE = 1.0 - 1e-9  # of the coding error in the power of what is sent; at 1 nothing of it is left


class DeviceObservation(NamedTuple):
    """What is sent as u_t = a_t x_0 + n_t, with n_t uncorrelated with x_0, by step t.

    With the coding error e the device's û_t is then (k a_t)(x_0 + noise), and the noise has the variance

        ν(t, e) = E n_t²/a_t² + e/(a_t² k),    k = 1 − e/E u_t².

    Attributes:
        signal: a_t, shape (T+1,).
        noise: E n_t² per dimension, shape (T+1,).
        power: E u_t² per dimension, shape (T+1,).
    """

    signal: NDArray[np.float64]
    noise: NDArray[np.float64]
    power: NDArray[np.float64]

    @classmethod
    def of_latents(cls, schedule: NoiseSchedule, power: ArrayLike = 1.0) -> DeviceObservation:
        """Of the payload x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε.

        Args:
            schedule: the noise schedule.
            power: E x_t² per dimension, (T+1,) or a number: 1 under the forward process of an x_0 of unit power.
        """
        ab = schedule.alpha_bar
        return cls(np.sqrt(ab), 1.0 - ab, np.broadcast_to(np.asarray(power, dtype=np.float64), ab.shape))

    @classmethod
    def of_moments(cls, moments: SecondMoments) -> DeviceObservation:
        """Of any payload with these second moments: a_t = G[0,t]/G[0,0], E n_t² = G[t,t] − G[0,t]²/G[0,0].

        Under the forward process that is :meth:`of_latents`. What is sent as a posterior mean is a shrunk estimate:
        of a martingale a_t = 1 − mmse(t)/mmse(T), and with D = mmse(t) + e the noise is ν = P D/(P − D), P = mmse(T).
        """
        values = moments.values
        power = np.diag(values)
        signal = values[0] / values[0, 0]
        return cls(signal, np.maximum(0.0, power - signal * values[0]), power)

    def shrinkage(self, step: Any, device_error: Any) -> Any:
        """k = 1 − e/E u_t², what coding leaves of u_t; arrays are broadcast. 1 without an error, even of u_t = 0."""
        return 1.0 - np.minimum(_share(self.power[step], device_error), _LARGEST_SHARE)

    def noise_to_signal(self, step: Any, device_error: Any) -> Any:
        """ν, the variance of the noise on x_0 in what the device holds; inf where that says nothing of x_0.

        Args:
            step: t of what the device holds; T where nothing was delivered. Arrays are broadcast.
            device_error: its coding error e, which both ends know.
        """
        kept = self.shrinkage(step, device_error)
        signal = self.signal[step] ** 2 * kept
        noise = self.noise[step] * kept + device_error
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(signal > 0.0, noise / signal, np.inf)

    def normalization(self, step: Any, device_error: Any) -> Any:
        """What û_t has to be multiplied with to become √ᾱ x_0 + √(1 − ᾱ) ε, ᾱ = 1/(1 + ν), as a network takes it.

        0 where what the device holds says nothing of x_0.
        """
        kept = self.shrinkage(step, device_error)
        variance = kept**2 * (self.signal[step] ** 2 + self.noise[step]) + kept * device_error
        with np.errstate(divide="ignore"):
            return np.where((variance > 0.0) & (self.signal[step] != 0.0), 1.0 / np.sqrt(variance), 0.0)


@dataclass(frozen=True, eq=False)
class DecoderCurve:
    """The mean squared errors of what a device holds and of what its decoder makes of that, as they were measured.

    A curve over ν for every step t, on the train split of a cache: at the coding errors e = share · E u_t², which lead
    from the ν of u_t itself to one at which little of it is left. Between them both are interpolated linearly in e.
    The decoder is applied where its error is the smaller one, so the curve is never above ``held``.

    Args:
        power: E u_t² per dimension, (T+1,).
        shares: of the coding error in it, ascending from 0, below 1 (E,).
        held: (1/M) E‖û_t − x_0‖², (T+1, E).
        decoded: (1/M) E‖E[x_0 | û_t] − x_0‖² of the decoder, (T+1, E).

    Raises:
        ConfigurationError: if the arrays are not of these shapes, not finite, or negative, or shares do not ascend
            from 0 to less than 1.
    """

    power: NDArray[np.float64]
    shares: NDArray[np.float64]
    held: NDArray[np.float64]
    decoded: NDArray[np.float64]

    def __init__(self, power: ArrayLike, shares: ArrayLike, held: ArrayLike, decoded: ArrayLike) -> None:
        advice = "Take it from a trajectory cache that has one: TrajectoryCache.decoder_curve."
        try:
            arrays = [np.array(values, dtype=np.float64) for values in (power, shares, held, decoded)]
        except (TypeError, ValueError, OverflowError):
            arrays = [np.empty(())] * 4
        shapes = [values.shape for values in arrays]
        steps, errors = arrays[0].size, arrays[1].size
        if shapes != [(steps,), (errors,), (steps, errors), (steps, errors)] or steps < 2 or errors < 2:
            raise ConfigurationError(
                f"`decoder_curve` must have the shapes (T+1,), (E,), (T+1, E), (T+1, E), got {shapes}. {advice}"
            )
        if not all((np.isfinite(values) & (values >= 0.0)).all() for values in arrays):
            raise ConfigurationError(f"`decoder_curve` must be finite and not negative, got others. {advice}")
        if arrays[1][0] != 0.0 or arrays[1][-1] >= 1.0 or not (np.diff(arrays[1]) > 0.0).all():
            raise ConfigurationError(
                f"`decoder_curve` must have shares that ascend from 0 to less than 1, got others. {advice}"
            )
        for name, values in zip(("power", "shares", "held", "decoded"), arrays, strict=True):
            values.setflags(write=False)
            object.__setattr__(self, name, values)

    def _arrays(self) -> tuple[NDArray[np.float64], ...]:
        return self.power, self.shares, self.held, self.decoded

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DecoderCurve) and all(map(np.array_equal, self._arrays(), other._arrays()))

    def __hash__(self) -> int:
        return hash(tuple(values.tobytes() for values in self._arrays()))

    @property
    def num_steps(self) -> int:
        """T."""
        return self.power.size - 1

    def helps(self, step: Any, device_error: Any) -> Any:
        """Whether the decoder is applied to what a device holds at step t with the coding error e; broadcast."""
        held, decoded = self._at(step, device_error)
        return decoded < held

    def distortion(self, step: Any, device_error: Any) -> Any:
        """The mean squared error per dimension of what a device with the decoder ends with.

        Args:
            step: t of what it holds; arrays are broadcast.
            device_error: its coding error e.
        """
        return np.minimum(*self._at(step, device_error))

    def _at(self, step: Any, device_error: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Both errors, by linear interpolation; beyond the largest share they are that share's."""
        share = _share(self.power[step], device_error)
        right = np.clip(np.searchsorted(self.shares, share, side="right"), 1, self.shares.size - 1)
        left = right - 1
        weight = np.clip((share - self.shares[left]) / (self.shares[right] - self.shares[left]), 0.0, 1.0)
        held, decoded = (
            values[step, left] * (1.0 - weight) + values[step, right] * weight for values in (self.held, self.decoded)
        )
        return held, decoded

    def to_dict(self) -> dict[str, Any]:
        """A JSON object."""
        return {name: getattr(self, name).tolist() for name in ("power", "shares", "held", "decoded")}

    @classmethod
    def from_dict(cls, values: Any) -> DecoderCurve:
        """The curve that :meth:`to_dict` wrote.

        Raises:
            ConfigurationError: if it is not one.
        """
        names = ("power", "shares", "held", "decoded")
        if not isinstance(values, Mapping) or set(values) != set(names):
            raise ConfigurationError(
                f"`decoder_curve` must be an object with the keys {', '.join(names)}, got {values!r:.80}. "
                "Write it with DecoderCurve.to_dict."
            )
        return cls(**values)


def _share(power: Any, error: Any) -> NDArray[np.float64]:
    """Of the coding error in the power of what is sent; 0 of what has none."""
    powers, errors = np.broadcast_arrays(np.asarray(power, dtype=np.float64), np.asarray(error, dtype=np.float64))
    shares: NDArray[np.float64] = np.divide(errors, powers, out=np.zeros(errors.shape), where=powers > 0.0)
    return shares
