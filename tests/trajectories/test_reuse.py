"""Generation that starts at a midpoint: the same bits where it is the run's own, and the same noise where it is not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refine_env import ConfigurationError
from refine_env.trajectories.midpoints import MidpointStore
from refine_env.trajectories.pipeline import LatentSampler

from .conftest import LATENT_SHAPE

pytest.importorskip("diffusers")

STEPS = 5
PROMPTS = ["a cat", "dog"]
SEEDS = [3, 4]


def load(model: Path, scheduler: str, **kwargs: Any) -> LatentSampler:
    return LatentSampler(model, **{"num_steps": STEPS, "scheduler": scheduler, "guidance_scale": 2.0, **kwargs})


@pytest.fixture(scope="module")
def ddpm(tiny_model: Path) -> LatentSampler:
    return load(tiny_model, "ddpm")


class TestSampler:
    @pytest.mark.parametrize("scheduler", ["ddpm", "ddim", "dpmsolver++"])
    def test_a_run_that_goes_on_from_its_own_midpoint_is_the_run(
        self, tiny_model: Path, tmp_path: Path, scheduler: str
    ) -> None:
        """Bit for bit, at every m, by way of the store."""
        sampler = load(tiny_model, scheduler)
        latents, estimates = sampler.sample(PROMPTS, SEEDS)
        store = MidpointStore(tmp_path)
        for step in range(1, STEPS):
            for midpoint in sampler.sample_midpoints(PROMPTS, SEEDS, step):
                store.save(midpoint)
            keys = [sampler.midpoint_key(prompt, seed, step, 2) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
            start = [midpoint for midpoint in map(store.load, keys) if midpoint is not None]
            reported: list[float] = []
            found = sampler.sample(PROMPTS, SEEDS, reported.append, start)
            np.testing.assert_array_equal(found[0], latents[:, : step + 1])
            np.testing.assert_array_equal(found[1], estimates[:, :step])
            assert reported == [count / step for count in range(1, step + 1)]
        again = sampler.sample(PROMPTS, SEEDS)  # nothing is left behind
        np.testing.assert_array_equal(again[0], latents)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_in_other_number_formats(self, tiny_model: Path, dtype: str) -> None:
        sampler = load(tiny_model, "ddpm", dtype=dtype)
        start = sampler.sample_midpoints(PROMPTS, SEEDS, 2)
        assert start[0].tensors["latent"].dtype == (np.float16 if dtype == "float16" else np.float32)
        np.testing.assert_array_equal(
            sampler.sample(PROMPTS, SEEDS, start=start)[0], sampler.sample(PROMPTS, SEEDS)[0][:, :3]
        )

    def test_evaluations(self, ddpm: LatentSampler, monkeypatch: pytest.MonkeyPatch) -> None:
        """T − m to the midpoint, and m from there."""
        network = ddpm._pipeline.unet
        count = 0
        forward = network.forward

        def counting(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            return forward(*args, **kwargs)

        monkeypatch.setattr(network, "forward", counting)
        start = ddpm.sample_midpoints(PROMPTS, SEEDS, 2)
        assert count == STEPS - 2
        ddpm.sample(PROMPTS, SEEDS, start=start)
        assert count == STEPS

    def test_the_remaining_noise_is_the_targets_own(self, ddpm: LatentSampler) -> None:
        """What each step adds, x_{t−1} less its mean given x_t and y_{t−1}, whatever the midpoint."""
        full = [values.astype(np.float64) for values in ddpm.sample(PROMPTS, SEEDS)]
        for step in (1, 3, 4):
            start = ddpm.sample_midpoints(["the sun", "moon"], [8, 9], step)
            reused = [values.astype(np.float64) for values in ddpm.sample(PROMPTS, SEEDS, start=start)]
            assert not np.allclose(reused[0][:, step], full[0][:, step])
            ab, alpha = ddpm.schedule.alpha_bar, ddpm.schedule.alpha
            for t in range(2, step + 1):
                noise = [
                    x[:, t - 1]
                    - np.sqrt(ab[t - 1]) * (1 - alpha[t - 1]) / (1 - ab[t]) * y[:, t - 1]
                    - np.sqrt(alpha[t - 1]) * (1 - ab[t - 1]) / (1 - ab[t]) * x[:, t]
                    for x, y in (reused, full)
                ]
                np.testing.assert_allclose(noise[0], noise[1], atol=0.02)

    def test_midpoints_that_do_not_fit(self, tiny_model: Path, ddpm: LatentSampler) -> None:
        start = ddpm.sample_midpoints(PROMPTS, SEEDS, 2)

        def changed(**fields: Any) -> list[Any]:
            return [start[0], replace(start[1], key=replace(start[1].key, **fields))]

        for field, value in (("model", "sha256:other"), ("num_steps", 7), ("step", 3), ("scheduler", "{}")):
            with pytest.raises(
                ConfigurationError, match=rf"`start` must be midpoints with the {field} .* got .*{value}"
            ):
                ddpm.sample(PROMPTS, SEEDS, start=changed(**{field: value}))
        ddpm.sample(PROMPTS, SEEDS, start=changed(model="sha256:other"), of_another_model=True)
        with pytest.raises(ConfigurationError, match=r"`start` must be one midpoint for each sample, 2, got 1"):
            ddpm.sample(PROMPTS, SEEDS, start=start[:1])
        small = replace(start[0], tensors={"latent": np.zeros((1, 2, 2), np.float32)})
        with pytest.raises(ConfigurationError, match=r"with latent of shape \(4, 4, 4\), got .*\(1, 2, 2\)"):
            ddpm.sample(PROMPTS, SEEDS, start=[small, small])
        with pytest.raises(ConfigurationError, match=r"with what DPMSolverMultistepScheduler keeps, .* got \[\]"):
            load(tiny_model, "dpmsolver++").sample(PROMPTS, SEEDS, start=start, of_another_model=True)
        import diffusers

        euler = load(tiny_model, diffusers.EulerDiscreteScheduler())
        with pytest.raises(ConfigurationError, match=r"`scheduler` must keep x_t itself .* got EulerDiscreteScheduler"):
            euler.sample_midpoints(PROMPTS, SEEDS, 2)

    def test_initial_noise(self, ddpm: LatentSampler) -> None:
        noise = ddpm.initial_noise(SEEDS)
        assert noise.shape == (2, *LATENT_SHAPE)
        np.testing.assert_array_equal(noise.astype(np.float16), ddpm.sample(PROMPTS, SEEDS)[0][:, STEPS])
