"""dp with the curve of the device's decoder: what it expects is what devices show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import agents
from refine_env.evaluation import DECODED_COLUMN, DecodingScorer, DeviceDecoder, roll_out
from refine_env.trajectories import generate_gaussian
from refine_env.trajectories.denoising import LinearDenoiser, measure_decoder, record_decoder


@pytest.mark.parametrize("payload", ["latent", "posterior_mean"])
def test_predicted_is_what_devices_show(payload: str, tmp_path: Path) -> None:
    """Ideal trajectories, M = 16384, the split on which the curve was measured: within 2 %, 400 episodes."""
    opened = generate_gaussian(tmp_path / "ideal", 4, (4, 64, 64), num_steps=50, seed=7, num_train=4)
    cache = record_decoder(opened, measure_decoder(opened, LinearDenoiser()))
    made: list[Any] = []

    def make(config: Any) -> Any:
        made.append(agents.make("dp", config))
        return made[-1]

    for snr_db in (-6.0, 0.0, 6.0):
        rows = roll_out(
            make,
            env_kwargs={
                "cache": str(cache.path),
                "split": "train",
                "snr_db": snr_db,
                "coder": "closed_loop",
                "payload": payload,
                "device_decoder": "denoise",
            },
            episodes=400,
            score=DecodingScorer(DeviceDecoder(cache, LinearDenoiser())),
        )
        values = np.array([row[DECODED_COLUMN] for row in rows])
        tolerance = 0.02 + 3.0 * values.std() / values.mean() / np.sqrt(values.size)
        assert made[-1].predicted_value == pytest.approx(values.mean(), rel=tolerance)
