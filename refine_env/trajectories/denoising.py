"""The device's decoder, E[x_0 | what it holds], and how it is measured on a cache's train split.

The decoder is one evaluation of the network that drew the cache, asked at the noise that the device's latent has
(:mod:`refine_env.model.decoding`). Of ideal trajectories it is the linear estimate, whose network nobody has to train.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refine_env._files import write_atomically
from refine_env._validation import check_integer, shown
from refine_env.errors import ConfigurationError
from refine_env.model.decoding import DeviceObservation
from refine_env.trajectories.cache import TrajectoryCache
from refine_env.trajectories.files import disk_errors
from refine_env.trajectories.manifest import DECODED_PAYLOADS, MANIFEST_FILE, DecoderRecord
from refine_env.trajectories.pipeline import LatentDenoiser, open_recorded

__all__ = ["Denoiser", "LinearDenoiser", "denoise", "measure_decoder", "open_denoiser", "record_decoder"]

SHARES = (0.0, 0.001, 0.003, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)
"""Of the coding error in the power of what is sent; one bit per dimension leaves 0.36 of a Gaussian's."""

NOISES = tuple(float(f"{noise:.4g}") for noise in np.geomspace(1e-3, 1e2, 16))
"""ν of the white noise on x_0 on which the decoder is measured, too."""

_BATCH = 64
_MOST_DRAWS = 100


class Denoiser(Protocol):
    """What a device's decoder asks of a model.

    Attributes:
        guidance_scale: scale of the classifier-free guidance; 1 is none.
        versions: of the libraries that it depends on.
    """

    guidance_scale: float
    versions: dict[str, str]

    def __call__(
        self, samples: ArrayLike, noise_to_signal: ArrayLike, prompts: Sequence[str | None]
    ) -> NDArray[np.float32]:
        """E[x_0 | sample, prompt], see :class:`refine_env.trajectories.pipeline.LatentDenoiser`."""


class LinearDenoiser:
    """The linear estimate of an x_0 of unit power: x/√(1 + ν), the posterior mean of a Gaussian one."""

    guidance_scale = 1.0

    def __init__(self) -> None:
        self.versions: dict[str, str] = {}

    def __call__(
        self, samples: ArrayLike, noise_to_signal: ArrayLike, prompts: Sequence[str | None]
    ) -> NDArray[np.float32]:
        """E[x_0 | sample] of samples (N, …) with the noise-to-signal ratios ν (N,)."""
        values = np.asarray(samples, dtype=np.float32)
        factors = 1.0 / np.sqrt(1.0 + np.asarray(noise_to_signal, dtype=np.float64))
        return values * factors.astype(np.float32).reshape(-1, *(1,) * (values.ndim - 1))


def open_denoiser(cache: TrajectoryCache, model: str | None = None, *, device: str = "cpu") -> Denoiser:
    """The denoiser that belongs to a cache: its model's network, or the linear one of ideal trajectories.

    Without guidance, whatever the cache's: a guided estimate is no posterior mean, and where the noise is strong it is
    far from x_0.

    Args:
        cache: the trajectories.
        model: hub id or folder of the cache's model, where the name in the manifest does not lead to it.
        device: torch device.

    Raises:
        ConfigurationError: if the model's network is none that a latent, a noise and a prompt can be given to, or the
            cache has ideal trajectories and a model is named.
        CacheError: if the model is missing, or not the one that the manifest names.
        MissingExtraError: if torch or diffusers is not installed.
    """
    if cache.manifest.recipe.clean_estimates == "linear-mmse":
        if model is not None:
            raise ConfigurationError(
                f"`model` must be left out for ideal trajectories, whose decoder is linear, got {shown(model)}. "
                "Leave it out, or choose a cache that a model generated."
            )
        return LinearDenoiser()
    return open_recorded(LatentDenoiser, cache, model, device=device)


def denoise(
    denoiser: Denoiser,
    observation: DeviceObservation,
    held: NDArray[np.float32],
    steps: NDArray[np.int64],
    errors: NDArray[np.float64],
    prompts: Sequence[str | None],
    *,
    batch_size: int = _BATCH,
) -> NDArray[np.float32]:
    """E[x_0 | û_t] of what devices hold, a batch after the other.

    Args:
        denoiser: the model.
        observation: what is held of x_0 in û_t.
        held: û_t, float32 (N, C, H, W).
        steps: t, (N,); T where nothing was delivered.
        errors: e, (N,).
        prompts: (N,).
        batch_size: latents at once; results depend on it, if at all, in their last bits.

    Returns:
        float32 (N, C, H, W).
    """
    size = check_integer("batch_size", batch_size, 1, advice="Give for example 64.")
    noise = np.asarray(observation.noise_to_signal(steps, errors))
    factors = np.asarray(observation.normalization(steps, errors), dtype=np.float32)
    samples = held * factors.reshape(-1, *(1,) * (held.ndim - 1))
    decoded = np.empty_like(samples)
    for start in range(0, len(samples), size):
        part = slice(start, start + size)
        decoded[part] = denoiser(samples[part], noise[part], prompts[part])
    return decoded


def measure_decoder(
    cache: TrajectoryCache,
    denoiser: Denoiser,
    *,
    draws: int = 1,
    seed: int = 0,
    batch_size: int = _BATCH,
    progress: Callable[[str, float, int], None] | None = None,
) -> DecoderRecord:
    """Measure a decoder on the train split of a cache.

    What every step sends, u_t, gets the error of a Gaussian test channel, û = k u_t + √(e k) z with k = 1 − e/E u_t²,
    at several e; and, for comparison, x_0 gets white noise. The noises z of a trajectory are the same at all points.

    Args:
        cache: the trajectories.
        denoiser: the model.
        draws: noises per trajectory.
        seed: of the noises.
        batch_size: latents that the network sees at once.
        progress: called with the phase, the points done and their number.

    Raises:
        ConfigurationError: if a count is out of range.
    """
    from refine_env import __version__

    check_integer("draws", draws, 1, _MOST_DRAWS, advice="1 will do where there are many trajectories.")
    check_integer("seed", seed, 0, advice="Give a non-negative seed, for example 0.")
    indices = np.tile(cache.indices("train"), draws)
    prompts = [cache.prompt(int(index)) for index in indices]
    clean = np.stack([cache.latents(int(index))[0] for index in indices]).astype(np.float32)
    noises = np.stack(
        [
            np.random.default_rng([seed, int(draw), int(index)]).standard_normal(cache.latent_shape, dtype=np.float32)
            for draw, index in zip(np.arange(draws).repeat(len(indices) // draws).tolist(), indices, strict=True)
        ]
    )
    number = len(NOISES) + len(DECODED_PAYLOADS) * (cache.num_steps * len(SHARES) + 1)
    done = 0

    def measure(observation: DeviceObservation, held: NDArray[np.float32], step: int, error: float) -> Any:
        """The errors before and after decoding, to six digits."""
        nonlocal done
        steps, errors = np.full(len(held), step), np.full(len(held), error)
        decoded = denoise(denoiser, observation, held, steps, errors, prompts, batch_size=batch_size)
        done += 1
        if progress is not None:
            progress("measuring", done, number)
        return [float(f"{np.square(values - clean, dtype=np.float64).mean():.6g}") for values in (held, decoded)]

    # White noise on x_0 is a step of a process of its own, one for every ν.
    ones = np.ones(len(NOISES))
    white = DeviceObservation(ones, np.array(NOISES), ones + NOISES)
    noise_decoded = [
        measure(white, clean + np.float32(np.sqrt(noise)) * noises, step, 0.0)[1] for step, noise in enumerate(NOISES)
    ]
    tables = {}
    for payload in DECODED_PAYLOADS:
        observation = cache.device_observation(payload)
        rows = []
        for step in range(cache.num_steps):
            sent = np.stack([cache.payload(int(index), payload)[step] for index in indices]).astype(np.float32)
            power = observation.power[step]
            rows.append(
                [
                    measure(
                        observation,
                        np.float32(1.0 - share) * sent + np.float32(np.sqrt(share * (1.0 - share) * power)) * noises,
                        step,
                        share * power,
                    )
                    for share in SHARES
                ]
            )
        initial = np.stack([cache.initial(int(index), payload) for index in indices]).astype(np.float32)
        rows.append([measure(observation, initial, cache.num_steps, 0.0)] * len(SHARES))
        tables[payload] = np.array(rows)
    return DecoderRecord(
        model=cache.manifest.recipe.model,
        generator={"refine-env": __version__, "numpy": np.__version__, **denoiser.versions},
        guidance_scale=denoiser.guidance_scale,
        draws=draws,
        seed=seed,
        noise_to_signal=NOISES,
        noise_decoded=tuple(noise_decoded),
        shares=SHARES,
        held={payload: table[..., 0] for payload, table in tables.items()},
        decoded={payload: table[..., 1] for payload, table in tables.items()},
    )


def record_decoder(cache: TrajectoryCache, record: DecoderRecord) -> TrajectoryCache:
    """Write into a cache's manifest what its decoder was measured to do, in place of what was there.

    Returns:
        The cache, opened anew.

    Raises:
        CacheError: if the manifest cannot be written.
    """
    manifest = replace(cache.manifest, decoder=record)
    with disk_errors(cache.path):
        write_atomically(cache.path / MANIFEST_FILE, manifest.to_bytes())
    return TrajectoryCache.open(cache.path)
