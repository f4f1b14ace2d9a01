"""Conditions: images that the network sees beside the latent, from files into samples, midpoints and caches."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file
from typer.testing import CliRunner

from refine_env import CacheFormatError, ConfigurationError, TrajectoryCache
from refine_env.cli import app
from refine_env.trajectories import Reuse, generate_diffusers
from refine_env.trajectories.conditions import (
    Conditions,
    decode_truth,
    encode_conditions,
    hash_condition,
    read_conditions,
)
from refine_env.trajectories.midpoints import MidpointStore
from refine_env.trajectories.pipeline import LatentDecoder, LatentDenoiser, LatentSampler

from .conftest import LATENT_SHAPE
from .manifests import read_values, write_values
from .models import CONDITION_SHAPE

STEPS = 5
PROMPTS, SEEDS = ["a", ""], [3, 4]
NUMBER = 5


def images(count: int = NUMBER, seed: int = 0) -> NDArray[np.float32]:
    """Images (count, 3, 8, 8), which the tiny model sees folded into 12 channels of 4 by 4."""
    return np.random.default_rng(seed).random((count, 3, 8, 8), dtype=np.float32)


class TestFiles:
    def test_formats(self, tmp_path: Path) -> None:
        values = images()
        np.save(tmp_path / "a.npy", values)
        np.savez(tmp_path / "a.npz", conditions=values, names=[f"scene {k}" for k in range(NUMBER)], other=np.zeros(2))
        save_file({"x": values.astype(np.float16)}, tmp_path / "a.safetensors")
        for suffix in ("npy", "npz"):
            np.testing.assert_array_equal(read_conditions(tmp_path / f"a.{suffix}").values, values)
        half = read_conditions(tmp_path / "a.safetensors")
        assert half.values.dtype == np.float16
        assert hash_condition(half.values) == hash_condition(half.values.astype(np.float32))
        assert hash_condition(half.values) != hash_condition(values)
        assert read_conditions(tmp_path / "a.npz").names[1] == "scene 1"
        np.save(tmp_path / "double.npy", values.astype(np.float64))
        np.testing.assert_array_equal(read_conditions(tmp_path / "double.npy").values, values)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (
                images()[0],
                r"`conditions` must be float16 or float32 images \(N, C, H, W\), N >= 1, got float32 of shape",
            ),
            ((images() * 255).astype(np.uint8), r"must be float16 or float32 images .* got uint8 of shape"),
            (images() * 2, r"`conditions` must be in \[0, 1\], got values in \[0\.\d+, 1\.9\d+\]\. Scale them"),
            (
                np.full((1, 1, 1, 1), np.nan, np.float32),
                r"`conditions` must be in \[0, 1\], got values in \[nan, nan\]",
            ),
        ],
    )
    def test_arrays_that_cannot_be_used(self, tmp_path: Path, values: Any, message: str) -> None:
        np.save(tmp_path / "a.npy", values)
        with pytest.raises(ConfigurationError, match=message):
            read_conditions(tmp_path / "a.npy")

    def test_truth(self, tmp_path: Path) -> None:
        truth = np.arange(NUMBER * 64, dtype=np.uint16).reshape(NUMBER, 8, 8).astype(np.uint8)
        np.savez(tmp_path / "a.npz", pictures=images(), truth=truth)
        read = read_conditions(tmp_path / "a.npz")
        assert read.truth is not None
        np.testing.assert_array_equal(read.truth, truth)
        kept = decode_truth(encode_conditions(read, None))
        assert kept is not None
        np.testing.assert_array_equal(kept, truth)
        assert decode_truth(encode_conditions(Conditions(values=images()), None)) is None
        one = Conditions(values=images(1), truth=truth[:1]).for_all(3, "conditions")
        assert one.truth is not None
        np.testing.assert_array_equal(one.truth, truth[[0, 0, 0]])
        for wrong in (truth[:2], truth[0], truth.astype(np.float32)):
            np.savez(tmp_path / "a.npz", conditions=images(), truth=wrong)
            with pytest.raises(
                ConfigurationError, match=r"`truth` must be a gray image of bytes for each of the 5 con"
            ):
                read_conditions(tmp_path / "a.npz")

    def test_files_that_cannot_be_used(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"`conditions` must be an existing file, got '.*none\.npz'"):
            read_conditions(tmp_path / "none.npz")
        for name in ("a.npz", "a.npy", "a.safetensors"):
            (tmp_path / name).write_bytes(b"nothing of the kind")
            with pytest.raises(
                ConfigurationError, match=r"`conditions` must be a readable \.npz, \.npy or \.safetensors"
            ):
                read_conditions(tmp_path / name)
        np.savez(tmp_path / "two.npz", a=images(), b=images())
        with pytest.raises(ConfigurationError, match=r"one array, or one called 'conditions', got \['a', 'b'\]"):
            read_conditions(tmp_path / "two.npz")
        np.savez(tmp_path / "names.npz", conditions=images(), names=["x"])
        with pytest.raises(ConfigurationError, match=r"`conditions` must have one name each, 5, got 1"):
            read_conditions(tmp_path / "names.npz")


pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def sampler(conditioned_model: Path) -> LatentSampler:
    return load(conditioned_model)


def load(model: Path, scheduler: str = "ddpm", **kwargs: Any) -> LatentSampler:
    return LatentSampler(model, **{"num_steps": STEPS, "scheduler": scheduler, "guidance_scale": 1.0, **kwargs})


class TestSampler:
    def test_it_is_what_the_pipeline_computes(self, sampler: LatentSampler, conditioned_model: Path) -> None:
        import torch
        from diffusers import DiffusionPipeline

        assert (sampler.latent_shape, sampler.condition_shape) == (LATENT_SHAPE, CONDITION_SHAPE)
        seen = images(2)
        latents, _ = sampler.sample(PROMPTS, SEEDS, conditions=seen)
        pipeline = DiffusionPipeline.from_pretrained(conditioned_model)
        pipeline.scheduler = sampler._scheduler
        pipeline.set_progress_bar_config(disable=True)
        folded = torch.nn.functional.pixel_unshuffle(torch.from_numpy(seen), 2)
        expected = pipeline(
            PROMPTS,
            image=folded,
            noise_level=0,
            num_inference_steps=STEPS,
            guidance_scale=1.0,
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
            output_type="latent",
        ).images
        np.testing.assert_array_equal(latents[:, 0], expected.numpy().astype(np.float16))
        np.testing.assert_array_equal(sampler.sample(PROMPTS, SEEDS, conditions=folded.numpy())[0], latents)

    def test_the_network_sees_the_image_and_nothing_else(self, sampler: LatentSampler, monkeypatch: Any) -> None:
        """Folded as `pixel_unshuffle` does, in [-1, 1], without a trace of noise."""
        network, given = sampler._pipeline.unet, []
        forward = network.forward
        monkeypatch.setattr(
            network, "forward", lambda x, *args, **kwargs: given.append(x) or forward(x, *args, **kwargs)
        )
        seen = images(2)
        sampler.sample(PROMPTS, SEEDS, conditions=seen)
        assert len(given) == STEPS
        expected = seen.reshape(2, 3, 4, 2, 4, 2).transpose(0, 1, 3, 5, 2, 4).reshape(2, *CONDITION_SHAPE) * 2 - 1
        for tensor in given:
            np.testing.assert_array_equal(tensor[:, LATENT_SHAPE[0] :].numpy(), expected)

    @pytest.mark.parametrize("scheduler", ["ddpm", "dpmsolver++"])
    def test_a_run_that_goes_on_from_its_own_midpoint_is_the_run(self, conditioned_model: Path, scheduler: str) -> None:
        sampler = load(conditioned_model, scheduler)
        seen = images(2)
        latents, estimates = sampler.sample(PROMPTS, SEEDS, conditions=seen)
        for step in range(1, STEPS):
            start = sampler.sample_midpoints(PROMPTS, SEEDS, step, conditions=seen)
            found = sampler.sample(PROMPTS, SEEDS, start=start, conditions=seen)
            np.testing.assert_array_equal(found[0], latents[:, : step + 1])
            np.testing.assert_array_equal(found[1], estimates[:, :step])
        other = sampler.sample(PROMPTS, SEEDS, start=start, conditions=images(2, seed=1))
        assert (other[0][:, 0] != latents[:, 0]).any()

    def test_noise_on_the_image_is_the_same_behind_a_midpoint(self, conditioned_model: Path) -> None:
        """Of a model whose least noise level is some, as the published one's is."""
        from diffusers import DDPMScheduler

        sampler = load(conditioned_model)
        sampler._pipeline.low_res_scheduler = DDPMScheduler(beta_start=0.02)
        seen = images(2)
        start = sampler.sample_midpoints(PROMPTS, SEEDS, 2, conditions=seen)
        full = sampler.sample(PROMPTS, SEEDS, conditions=seen)[0]
        np.testing.assert_array_equal(sampler.sample(PROMPTS, SEEDS, start=start, conditions=seen)[0], full[:, :3])

    def test_initial_noise(self, sampler: LatentSampler) -> None:
        latents, _ = sampler.sample(PROMPTS, SEEDS, conditions=images(2))
        np.testing.assert_array_equal(sampler.initial_noise(SEEDS).astype(np.float16), latents[:, STEPS])

    def test_conditions_that_do_not_fit(self, sampler: LatentSampler, tiny_model: Path) -> None:
        for conditions, got in ((None, "none"), (images(2)[:, :2], r"\(2, 2, 8, 8\)"), (images(2)[0], r"\(3, 8, 8\)")):
            with pytest.raises(
                ConfigurationError, match=rf"`conditions` must be of shape \(N, 12, 4, 4\) for the model .* got {got}"
            ):
                sampler.sample(PROMPTS, SEEDS, conditions=conditions)
        with pytest.raises(ConfigurationError, match=r"`conditions` must be one image in \[0, 1\] for each of the 2"):
            sampler.sample(PROMPTS, SEEDS, conditions=images(3))
        with pytest.raises(ConfigurationError, match=r"`conditions` must be left out for a model that sees no image"):
            load(tiny_model).sample(PROMPTS, SEEDS, conditions=images(2))

    def test_a_denoiser_has_no_condition_to_show(self, conditioned_model: Path) -> None:
        with pytest.raises(ConfigurationError, match=r"`model` must have a U-Net that takes a latent, a timestep and"):
            LatentDenoiser(conditioned_model)


def test_a_gray_picture_is_gray_in_three_channels(conditioned_model: Path, monkeypatch: Any) -> None:
    decoder = LatentDecoder(conditioned_model)
    picture = decoder(np.zeros((1, *LATENT_SHAPE)))
    assert picture.shape == (1, 8, 8, 3)
    decode = decoder._vae.decode
    monkeypatch.setattr(decoder._vae, "decode", lambda *args, **kwargs: (decode(*args, **kwargs)[0][:, :1],))
    gray = decoder(np.zeros((1, *LATENT_SHAPE)))
    np.testing.assert_array_equal(gray, np.repeat(picture[..., :1], 3, axis=3))


def generate(path: Path, model: Path, **kwargs: Any) -> TrajectoryCache:
    settings = {"num_steps": STEPS, "guidance_scale": 1.0, "seed": 3, "batch_size": 2, "shard_size": 2, **kwargs}
    return generate_diffusers(path, model, settings.pop("prompts", None), **settings)


@pytest.fixture(scope="module")
def full(conditioned_model: Path, tmp_path_factory: pytest.TempPathFactory) -> TrajectoryCache:
    return generate(tmp_path_factory.mktemp("full") / "cache", conditioned_model, conditions=images())


class TestCaches:
    def test_a_cache_knows_its_conditions(self, full: TrajectoryCache, sampler: LatentSampler) -> None:
        recipe = full.manifest.recipe
        assert full.conditions is not None
        np.testing.assert_array_equal(full.conditions, images())
        assert [trajectory.condition for trajectory in recipe.trajectories] == [hash_condition(x) for x in images()]
        assert recipe.conditions is not None
        assert recipe.conditions["values_sha256"] == hash_condition(images())
        assert {full.prompt(index) for index in range(NUMBER)} == {""}
        expected, _ = sampler.sample(["", ""], [full.seed(2), full.seed(3)], conditions=images()[2:4])
        np.testing.assert_array_equal(full.latents(3), expected[1])
        full.verify(deep=True)
        assert TrajectoryCache.open(full.path).manifest.recipe == recipe

    def test_workers_see_the_same(self, full: TrajectoryCache, conditioned_model: Path, tmp_path: Path) -> None:
        cache = generate(tmp_path / "cache", conditioned_model, conditions=images(), workers=2)
        assert {file.name: file.read_bytes() for file in cache.path.iterdir()} == {
            file.name: file.read_bytes() for file in full.path.iterdir()
        }

    def test_another_condition_is_another_recipe(self, full: TrajectoryCache, conditioned_model: Path) -> None:
        with pytest.raises(Exception, match=r"must not be replaced unasked, got a request that differs"):
            generate(full.path, conditioned_model, conditions=images(seed=1))

    def test_damage_is_found(self, conditioned_model: Path, tmp_path: Path) -> None:
        cache = generate(tmp_path / "cache", conditioned_model, conditions=images(1))
        file = cache.path / "conditions.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(CacheFormatError, match=r"conditions\.safetensors must have SHA-256 .* got "):
            cache.verify()
        with pytest.raises(CacheFormatError, match=r"conditions\.safetensors must have SHA-256 .* got "):
            _ = TrajectoryCache.open(cache.path).conditions
        file.unlink()
        with pytest.raises(CacheFormatError, match=r"conditions\.safetensors must exist, got no such file"):
            cache.verify()
        file.write_bytes(content)
        for field, value in (
            ("shape", [2, 3, 8, 8]),
            ("shape", [1, 3, 8]),
            ("file_sha256", 1),
            ("values_sha256", None),
        ):
            values = read_values(cache.path)
            values["conditions"][field] = value
            changed = tmp_path / "changed"
            changed.mkdir(exist_ok=True)
            write_values(changed, values)
            with pytest.raises(CacheFormatError, match=rf"`conditions\.{field}` in .* must be"):
                TrajectoryCache.open(changed)

    def test_one_for_all(self, conditioned_model: Path, tmp_path: Path) -> None:
        cache = generate(tmp_path / "cache", conditioned_model, conditions=images(1), prompts=["a", "b", "c"])
        assert cache.conditions is not None
        np.testing.assert_array_equal(cache.conditions, np.repeat(images(1), 3, axis=0))
        with pytest.raises(
            ConfigurationError, match=r"`conditions` must be one for each of the 3 trajectories, .* got 2"
        ):
            generate(tmp_path / "wrong", conditioned_model, conditions=images(2), prompts=["a", "b", "c"])

    @pytest.mark.parametrize("mode", ["vanilla", "switch", "two-stage", "mean"])
    def test_reuse(self, full: TrajectoryCache, conditioned_model: Path, tmp_path: Path, mode: str) -> None:
        """A static condition, like a static prompt, is that of the steps before m."""
        static = Conditions(values=images()[[0, 1, 0, 3, 4]])
        reuse = Reuse(
            ratio=0.6,
            static_prompts=("",),
            static_conditions=static,
            mode=mode,
            stage_one_model=conditioned_model if mode == "two-stage" else None,
            midpoints=tmp_path / "store",
            mean_runs=1,
            with_full=True,
        )
        cache = generate(tmp_path / "cache", conditioned_model, conditions=images(), reuse=reuse)
        same = [True, True, mode == "never", True, True]
        for index in range(NUMBER):
            assert (cache.latents(index)[0] == full.latents(index)[0]).all() == same[index]
            np.testing.assert_array_equal(cache.full_latent(index), full.latents(index)[0])
        record = cache.manifest.recipe.reuse
        assert record is not None
        assert [source["condition"] for source in record["sources"]] == [hash_condition(x) for x in static.values]
        assert record["sources"][2]["seeds"] == [cache.seed(0 if mode in ("vanilla", "mean") else 2)]
        cache.verify(deep=True)

    def test_a_store_tells_conditions_apart(self, conditioned_model: Path, tmp_path: Path) -> None:
        """The same prompt, seed and step under two static conditions are two midpoints."""
        caches = []
        for seed in (7, 8):
            static = Conditions(values=images(1, seed=seed))
            reuse = Reuse(ratio=0.6, static_prompts=("",), static_conditions=static, midpoints=tmp_path / "store")
            caches.append(generate(tmp_path / str(seed), conditioned_model, conditions=images(1), reuse=reuse))
        assert (caches[0].latents(0)[2] != caches[1].latents(0)[2]).any()
        assert len(MidpointStore(tmp_path / "store").sizes()) == 2

    def test_reuse_that_does_not_fit(self, conditioned_model: Path, tiny_model: Path, tmp_path: Path) -> None:
        def warm(count: int | None) -> Reuse:
            static = None if count is None else Conditions(values=images(count))
            return Reuse(ratio=0.6, static_prompts=("",), static_conditions=static, midpoints=tmp_path / "store")

        run: Callable[..., Any] = generate
        for count, message in (
            (None, r"`static_conditions` must be of shape \(N, 12, 4, 4\) for the model .* got none"),
            (3, r"`static_conditions` must be one for each of the 5 trajectories, or one for all, got 3"),
        ):
            with pytest.raises(ConfigurationError, match=message):
                run(tmp_path / "wrong", conditioned_model, conditions=images(), reuse=warm(count))
        with pytest.raises(
            ConfigurationError, match=r"`static_conditions` must be left out for a model that sees no im"
        ):
            run(tmp_path / "wrong", tiny_model, prompts=["a"], reuse=warm(1))


class TestCommand:
    def run(self, *words: str | Path) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["generate", "diffusers", "--quiet", *map(str, words)])
        return result.exit_code, " ".join(result.output.split())

    def test_with_conditions(self, conditioned_model: Path, tmp_path: Path) -> None:
        np.savez(tmp_path / "scenes.npz", conditions=images(2), names=["scene 7", "scene 9"])
        options = ("--model", conditioned_model, "--conditions", tmp_path / "scenes.npz", "--num-steps", "3")
        code, output = self.run(*options, "--guidance-scale", "1", "--out", tmp_path / "cache")
        assert (code, output) == (0, "")
        cache = TrajectoryCache.open(tmp_path / "cache")
        assert [cache.prompt(index) for index in range(2)] == ["scene 7", "scene 9"]
        recorded = cache.manifest.recipe.conditions
        assert recorded is not None
        assert recorded["name"] == "scenes.npz"
        (tmp_path / "prompts.txt").write_text("a\nb\n")
        np.save(tmp_path / "static.npy", images(1))
        warm = (
            "--reuse-ratio",
            "0.5",
            "--static-conditions",
            tmp_path / "static.npy",
            "--midpoints",
            tmp_path / "store",
        )
        code, output = self.run(*options, *warm, "--prompts", tmp_path / "prompts.txt", "--out", tmp_path / "warm")
        assert (code, output) == (0, "")
        assert TrajectoryCache.open(tmp_path / "warm").prompt(1) == "b"

    def test_wrong_inputs_are_one_sentence(self, conditioned_model: Path, tmp_path: Path) -> None:
        np.save(tmp_path / "scenes.npy", images(2))
        out = ("--out", tmp_path / "cache")
        for words, exit_code, message in (
            ((), 2, "`prompts` must be given where there are no conditions, got neither."),
            (("--num-prompts", "3"), 2, "`--prompts` must be given where prompts are to be chosen from it"),
            (("--conditions", tmp_path / "none.npy"), 3, "`conditions` must be an existing file"),
            (("--conditions", tmp_path / "scenes.npy", "--static-conditions", tmp_path / "x.npy"), 3, "existing file"),
        ):
            code, output = self.run("--model", conditioned_model, *words, *out)
            assert code == exit_code, output
            assert message in output
