"""A device that has the prior, too: at the deadline it applies its copy of the network once to what it holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refine_env.evaluation.rollout import Score
from refine_env.evaluation.tables import DECODED_COLUMN, Table
from refine_env.trajectories import TrajectoryCache
from refine_env.trajectories.denoising import Denoiser, denoise

__all__ = ["DecodingScorer", "DeviceDecoder"]


class DeviceDecoder:
    """E[x_0 | what the device holds], where the measured curve says that this is nearer to x_0.

    What it takes is known at the device: the step and the coding error of what it holds, and the prompt.

    Args:
        cache: the trajectories; it holds the curves.
        denoiser: the cache's model, see :func:`refine_env.trajectories.denoising.open_denoiser`.
        batch_size: latents that the network sees at once.

    Raises:
        ConfigurationError: if nobody has measured the cache's decoder.
    """

    def __init__(self, cache: TrajectoryCache, denoiser: Denoiser, *, batch_size: int = 64) -> None:
        self.cache = cache
        self._denoiser = denoiser
        self._batch_size = batch_size
        self._curves = {kind: cache.decoder_curve(kind) for kind in ("latent", "posterior_mean")}

    def __call__(
        self,
        held: NDArray[np.float32],
        payload: str,
        steps: NDArray[np.int64],
        errors: NDArray[np.float64],
        trajectories: NDArray[np.int64],
    ) -> NDArray[np.float32]:
        """What devices show.

        Args:
            held: what they hold, float32 (N, M).
            payload: what was sent to them.
            steps: t of what they hold, (N,); T where nothing was delivered.
            errors: its coding error, (N,).
            trajectories: whose prompts it is, (N,).

        Returns:
            float32 (N, M); unchanged where the decoder does not help.
        """
        shown = held.copy()
        chosen = np.flatnonzero(self._curves[payload].helps(steps, errors))
        shown[chosen] = denoise(
            self._denoiser,
            self.cache.device_observation(payload),
            held[chosen].reshape(-1, *self.cache.latent_shape),
            steps[chosen],
            errors[chosen],
            [self.cache.prompt(index) for index in trajectories[chosen].tolist()],
            batch_size=self._batch_size,
        ).reshape(len(chosen), self.cache.latent_dim)
        return shown


class DecodingScorer:
    """A :data:`refine_env.evaluation.Score` that decodes, and says how far from x_0 the devices end.

    Args:
        decoder: of the devices.
        score: what else to score, such as images; it is given what the devices show in place of what they hold.
    """

    def __init__(self, decoder: DeviceDecoder, score: Score | None = None) -> None:
        self._decoder = decoder
        self._score = score

    def __call__(self, rows: Table, latents: NDArray[np.float32]) -> list[Mapping[str, Any]]:
        """``decoded_latent_mse`` of every row, and the columns of the other score.

        Args:
            rows: one row for each episode.
            latents: what each device holds at the deadline, float32 (len(rows), M).
        """
        shown = np.empty_like(latents)
        for payload in dict.fromkeys(row["payload"] for row in rows):
            chosen = [k for k, row in enumerate(rows) if row["payload"] == payload]
            steps, errors, trajectories = (
                np.array([rows[k][name] for k in chosen]) for name in ("device_step", "device_error", "trajectory")
            )
            shown[chosen] = self._decoder(latents[chosen], payload, steps, errors, trajectories)
        clean = [self._decoder.cache.latents(row["trajectory"])[0].reshape(-1) for row in rows]
        columns = [
            {DECODED_COLUMN: float(np.square(image - x0, dtype=np.float64).mean())}
            for image, x0 in zip(shown, clean, strict=True)
        ]
        if self._score is None:
            return list(columns)
        return [{**own, **others} for own, others in zip(columns, self._score(rows, shown), strict=True)]
