"""Generation that starts at a midpoint: the same bits where it is the run's own, and the same noise where it is not."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from refine_env import CacheError, CacheFormatError, ConfigurationError, LatentRefinementEnv, TrajectoryCache
from refine_env.cli import app
from refine_env.trajectories import Reuse, generate_diffusers, sample_seed
from refine_env.trajectories.midpoints import MidpointStore
from refine_env.trajectories.pipeline import LatentSampler

from .conftest import LATENT_SHAPE
from .manifests import read_values, write_values
from .test_writer import content

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
                store.write(midpoint)
            keys = [sampler.midpoint_key(prompt, seed, step, 2) for prompt, seed in zip(PROMPTS, SEEDS, strict=True)]
            start = [midpoint for midpoint in map(store.read, keys) if midpoint is not None]
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


TARGETS = ["a cat", "dog", "the sun", "moon", "a red fish"]
STATIC = ["cat", "x", "x", "moon", "cat"]


def generate(path: Path, model: Path, reuse: Reuse | None, **kwargs: Any) -> TrajectoryCache:
    settings = {"num_steps": STEPS, "guidance_scale": 2.0, "seed": 3, "batch_size": 2, "shard_size": 2, **kwargs}
    return generate_diffusers(path, model, TARGETS, reuse=reuse, **settings)


def latents(cache: TrajectoryCache) -> Any:
    return np.stack([cache.latents(index) for index in cache.indices("all")])


@pytest.fixture(scope="module")
def full(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> TrajectoryCache:
    return generate(tmp_path_factory.mktemp("full") / "cache", tiny_model, None)


@pytest.fixture
def options(tmp_path: Path) -> dict[str, Any]:
    return {"ratio": 0.6, "static_prompts": STATIC, "midpoints": tmp_path / "store"}


class TestGeneration:
    def test_without_reuse_the_bytes_are_the_same(
        self, tiny_model: Path, tmp_path: Path, full: TrajectoryCache, options: dict[str, Any]
    ) -> None:
        cache = generate(tmp_path / "cache", tiny_model, Reuse(**{**options, "ratio": 0.0, "mode": "switch"}))
        assert content(cache.path) == content(full.path)
        assert b"reuse" not in (full.path / "manifest.json").read_bytes()
        assert not (tmp_path / "store").exists()

    @pytest.mark.parametrize("mode", ["vanilla", "switch"])
    @pytest.mark.parametrize("ratio", [0.2, 0.4, 0.8])
    def test_with_the_same_prompt_it_is_the_full_run(
        self, tiny_model: Path, tmp_path: Path, full: TrajectoryCache, options: dict[str, Any], ratio: float, mode: str
    ) -> None:
        reuse = Reuse(**{**options, "ratio": ratio, "mode": mode, "static_prompts": TARGETS})
        cache = generate(tmp_path / "cache", tiny_model, reuse)
        step = reuse.step(STEPS)
        assert cache.num_steps == step == round((1 - ratio) * STEPS)
        np.testing.assert_array_equal(latents(cache), latents(full)[:, : step + 1])
        for index in range(len(full)):
            expected = full.clean_estimates(index)[:step]
            np.testing.assert_array_equal(cache.clean_estimates(index), expected)
        cache.verify(deep=True)

    def test_modes(self, tiny_model: Path, tmp_path: Path, full: TrajectoryCache, options: dict[str, Any]) -> None:
        """m = 2. Switching begins with the target's own noise; a static prompt's runs are shared by its targets."""
        caches = {
            mode: generate(tmp_path / mode, tiny_model, Reuse(**options, mode=mode, mean_runs=3))
            for mode in ("vanilla", "switch", "mean", "mean-plain")
        }
        x = {mode: latents(cache).astype(np.float64) for mode, cache in caches.items()}
        static_runs = generate_diffusers(
            tmp_path / "runs", tiny_model, STATIC, num_steps=STEPS, guidance_scale=2.0, seed=3, batch_size=2
        )
        np.testing.assert_array_equal(x["switch"][:, 2], latents(static_runs)[:, 2])
        np.testing.assert_array_equal(x["vanilla"][:, 2], latents(static_runs)[[0, 1, 1, 3, 0], 2])
        np.testing.assert_array_equal(x["vanilla"][[0, 1, 3]], x["switch"][[0, 1, 3]])
        assert (x["vanilla"][:, 0] != x["switch"][:, 0]).any(axis=(1, 2, 3)).tolist() == [
            False,
            False,
            True,
            False,
            True,
        ]
        recorded = caches["mean"].manifest.recipe.reuse
        assert recorded is not None
        first = sample_seed(3, 1)
        assert recorded["sources"][2] == {"prompt": "x", "seeds": [first, sample_seed(first, 1), sample_seed(first, 2)]}
        sampler = load(tiny_model, "ddpm")
        runs = sampler.sample_midpoints(["x", "x"], recorded["sources"][2]["seeds"][:2], 2)
        runs += sampler.sample_midpoints(["x", "x"], recorded["sources"][2]["seeds"][1:], 2)[1:]
        mean = np.mean([run.tensors["latent"].astype(np.float64) for run in runs], axis=0)
        np.testing.assert_allclose(x["mean-plain"][2, 2], mean, atol=2e-3)
        added = np.sqrt((1 - 1 / 3) * (1 - full.schedule.alpha_bar[2])) * full.latents(2)[STEPS].astype(np.float64)
        np.testing.assert_allclose(x["mean"][2, 2], mean + added, atol=4e-3)
        for cache in caches.values():
            cache.verify(deep=True)

    def test_two_stages(self, tiny_model: Path, tmp_path: Path, full: TrajectoryCache, options: dict[str, Any]) -> None:
        other = tmp_path / "other"
        shutil.copytree(tiny_model, other)
        import diffusers

        network = diffusers.UNet2DConditionModel.from_pretrained(other / "unet")
        for value in network.parameters():
            value.data.mul_(0.9)
        network.save_pretrained(other / "unet")
        reuse = Reuse(**options, mode="two-stage", stage_one_model=other)
        cache = generate(tmp_path / "cache", tiny_model, reuse)
        record = cache.manifest.recipe.reuse
        assert record is not None
        first = LatentSampler(other, num_steps=STEPS, guidance_scale=2.0)
        assert record["stage_one_model"] == {"id": "other", "revision": first.revision}
        assert cache.manifest.recipe.model == full.manifest.recipe.model
        static_runs, _ = first.sample(STATIC[:2], [cache.seed(0), cache.seed(1)])
        np.testing.assert_array_equal(latents(cache)[:2, 2], static_runs[:, 2])
        again = generate(
            tmp_path / "again", tiny_model, replace(reuse, stage_one_model=tiny_model, midpoints=tmp_path / "b")
        )
        switched = generate(tmp_path / "switched", tiny_model, Reuse(**options, mode="switch"))
        np.testing.assert_array_equal(latents(again), latents(switched))
        wide = tmp_path / "wide"
        shutil.copytree(tiny_model, wide)
        config = json.loads((wide / "scheduler" / "scheduler_config.json").read_text())
        (wide / "scheduler" / "scheduler_config.json").write_text(json.dumps({**config, "beta_end": 0.02}))
        with pytest.raises(ConfigurationError, match=r"`stage_one_model` must have the same schedule as the model"):
            generate(tmp_path / "wrong", tiny_model, replace(reuse, stage_one_model=wide))

    def test_the_manifest_says_it(self, tiny_model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
        cache = generate(tmp_path / "cache", tiny_model, Reuse(**options))
        recipe = cache.manifest.recipe
        assert recipe.reuse is not None
        runs = [0, 1, 1, 3, 0]
        assert recipe.reuse == {
            "mode": "vanilla", "ratio": 0.6, "num_steps": STEPS, "step": 2, "stage_one_model": None, "with_full": False,
            "prompt_source": None,
            "sources": [{"prompt": text, "seeds": [cache.seed(run)]} for text, run in zip(STATIC, runs, strict=True)],
        }  # fmt: skip
        assert recipe.num_steps == 2
        assert [cache.seed(index) for index in range(5)] == [sample_seed(3, index) for index in range(5)]
        assert len(MidpointStore(tmp_path / "store").sizes()) == 3
        values = read_values(cache.path)
        for field, value in (("mode", "other"), ("step", 3), ("num_steps", 2), ("ratio", 1.5), ("sources", []),
                             ("with_full", None)):  # fmt: skip
            write_values(cache.path, {**values, "reuse": {**values["reuse"], field: value}})
            with pytest.raises(CacheFormatError, match=rf"`reuse\.{field}` in .* must be"):
                TrajectoryCache.open(cache.path)

    def test_with_full(self, tiny_model: Path, tmp_path: Path, full: TrajectoryCache, options: dict[str, Any]) -> None:
        plain = generate(tmp_path / "plain", tiny_model, Reuse(**options))
        cache = generate(tmp_path / "cache", tiny_model, Reuse(**options, with_full=True))
        np.testing.assert_array_equal(latents(cache), latents(plain))
        for index in range(len(cache)):
            np.testing.assert_array_equal(cache.full_latent(index), full.latents(index)[0])
        cache.verify(deep=True)
        with pytest.raises(ConfigurationError, match=r"`cache` must hold the x_0 of full runs, got 'plain'"):
            plain.full_latent(0)

    def test_a_damaged_midpoint_is_made_again(self, tiny_model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
        whole = content(generate(tmp_path / "a", tiny_model, Reuse(**options)).path)
        store = MidpointStore(tmp_path / "store")
        stored = content(store.folder)
        file = next(iter(store.sizes()))
        file.write_bytes(file.read_bytes()[:-4] + b"\0\1\2\3")
        with pytest.warns(RuntimeWarning, match=f"{file.name} is damaged"):
            cache = generate(tmp_path / "b", tiny_model, Reuse(**options))
        assert content(cache.path) == whole
        assert content(store.folder) == stored

    @pytest.mark.filterwarnings("default")
    @pytest.mark.parametrize("workers", [1, 2])
    def test_a_damaged_midpoint_is_one_line(
        self, tiny_model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], workers: int
    ) -> None:
        """A sentence on a line of its own, whatever process found it, and above the progress bar."""
        (tmp_path / "prompts.txt").write_text("a cat\ndog\nmoon\n")
        (tmp_path / "static.txt").write_text("cat\n")
        words = (
            f"generate diffusers --model {tiny_model} --prompts {tmp_path / 'prompts.txt'} --num-steps 2 --num-train 1 "
            f"--static-prompts {tmp_path / 'static.txt'} --reuse-ratio 0.5 --batch-size 1 --shard-size 1 "
            f"--midpoints {tmp_path / 'store'} --scheduler ddpm --workers {workers} --out"
        ).split()
        assert CliRunner().invoke(app, [*words, str(tmp_path / "a")], catch_exceptions=False).exit_code == 0
        (file,) = MidpointStore(tmp_path / "store").sizes()
        file.write_bytes(file.read_bytes()[:-4] + b"\0\1\2\3")
        capfd.readouterr()
        result = CliRunner().invoke(app, [*words, str(tmp_path / "b")], catch_exceptions=False)
        assert result.exit_code == 0
        lines = re.split(r"[\r\n]+", result.stderr + capfd.readouterr().err)
        told = [line for line in lines if "is damaged" in line]
        assert told == [f"warning: {file} is damaged (its hash does not fit its content): the midpoint is made again."]
        assert not any("RuntimeWarning" in line for line in lines)

    def test_the_environment_takes_it(self, tiny_model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
        cache = generate(tmp_path / "cache", tiny_model, Reuse(**options), num_train=3)
        env = LatentRefinementEnv(cache=str(cache.path), deadline=12, snr_db=20.0)
        observation, _ = env.reset(seed=0)
        assert observation["server_step"] == observation["device_step"] == 3  # noise, behind x_2
        terminated = False
        while not terminated:
            observation, _, terminated, _, _ = env.step(1)
        assert observation["device_step"] == 0

    def test_bad_input(self, tiny_model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
        for ratio in (-0.1, 1.0, 2):
            with pytest.raises(ConfigurationError, match=rf"`reuse_ratio` must be in \[0, 1\), got {ratio}\. Give"):
                Reuse(**{**options, "ratio": ratio})
        with pytest.raises(ConfigurationError, match=r"`reuse_ratio` must be a finite number, got nan"):
            Reuse(**{**options, "ratio": float("nan")})
        for ratio, step in ((0.95, 0), (0.01, 5)):
            with pytest.raises(
                ConfigurationError, match=rf"must leave m = .* in 1 … 4 of T = 5 steps, .* m = {step}\."
            ):
                generate(tmp_path / "cache", tiny_model, Reuse(**{**options, "ratio": ratio}))
        with pytest.raises(ConfigurationError, match=r"`reuse_mode` must be one of 'vanilla', .* got 'other'"):
            Reuse(**options, mode="other")
        with pytest.raises(ConfigurationError, match=r"`stage_one_model` must go with .* got 'vanilla' with it"):
            Reuse(**options, stage_one_model="emoji")
        with pytest.raises(ConfigurationError, match=r"`stage_one_model` must go with .* got 'two-stage' without it"):
            Reuse(**options, mode="two-stage")
        with pytest.raises(ConfigurationError, match=r"`with_full` must go with a reuse ratio above 0"):
            Reuse(**{**options, "ratio": 0.0, "with_full": True})
        with pytest.raises(
            ConfigurationError, match=r"`static_prompts` must be a sequence of at least one text, got \(\)"
        ):
            Reuse(**{**options, "static_prompts": ()})
        with pytest.raises(
            ConfigurationError, match=r"`static_prompts` must be one for each of the 5 prompts, .* got 2"
        ):
            generate(tmp_path / "cache", tiny_model, Reuse(**{**options, "static_prompts": ["x", "y"]}))
        (tmp_path / "file").touch()
        with pytest.raises(ConfigurationError, match=r"`midpoints` must be a folder, got the file"):
            generate(tmp_path / "cache", tiny_model, Reuse(**{**options, "midpoints": tmp_path / "file"}))
        with pytest.raises(ConfigurationError, match=r"`reuse_mode` must be another than 'mean' for DPMSolver"):
            generate(tmp_path / "cache", tiny_model, Reuse(**options, mode="mean"), scheduler="dpmsolver++")
        generate(tmp_path / "cache", tiny_model, Reuse(**options))
        with pytest.raises(CacheError, match=r"differs from the finished cache there: reuse"):
            generate(tmp_path / "cache", tiny_model, Reuse(**options, mode="switch"))

    def test_several_workers(self, tiny_model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
        """Two processes that share a store and make its midpoints: the same bytes as one with a store of its own."""
        here = generate(tmp_path / "here", tiny_model, Reuse(**options, with_full=True))
        reuse = Reuse(**{**options, "midpoints": tmp_path / "shared"}, with_full=True)
        there = generate(tmp_path / "there", tiny_model, reuse, workers=2)
        assert content(there.path) == content(here.path)
        assert content(tmp_path / "shared") == content(tmp_path / "store")
