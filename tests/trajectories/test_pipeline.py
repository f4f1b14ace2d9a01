"""Trajectories of a diffusion model, against diffusers' own pipeline and against the sampling loop written out."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from refine_env import CacheError, ConfigurationError, MissingExtraError, NoiseSchedule, TrajectoryCache
from refine_env.trajectories import generate_diffusers, pipeline, sample_seed
from refine_env.trajectories.pipeline import LatentDecoder, LatentSampler, ModelNotFoundError

from .conftest import LATENT_SHAPE

pytest.importorskip("diffusers")
torch = pytest.importorskip("torch")

STEPS = 6
PROMPTS = ["a cat", "dog", "the sun", "moon", "a red fish"]


def generate(path: Path, model: Path, prompts: list[str] | None = None, **kwargs: Any) -> TrajectoryCache:
    return generate_diffusers(
        path, model, prompts or PROMPTS, **{"num_steps": STEPS, "seed": 3, "batch_size": 2, **kwargs}
    )


def latents(cache: TrajectoryCache) -> NDArray[np.float16]:
    return np.stack([cache.latents(index) for index in cache.indices("all")])


def estimates(cache: TrajectoryCache) -> NDArray[np.float16]:
    return np.stack([cache.clean_estimates(index) for index in cache.indices("all")])


def load(model: Path, scheduler: str) -> Any:
    """The pipeline as a user of diffusers would set it up for [K]: each setting written out."""
    import diffusers

    pipe = diffusers.StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    common = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "steps_offset": 1,
    }
    leading = {"timestep_spacing": "leading", "clip_sample": False}
    if scheduler == "ddpm":
        pipe.scheduler = diffusers.DDPMScheduler(variance_type="fixed_small", **common, **leading)
    elif scheduler == "ddim":
        pipe.scheduler = diffusers.DDIMScheduler(set_alpha_to_one=False, **common, **leading)
    else:
        assert scheduler == "dpmsolver++", "set this sampler up here as a user would"
        pipe.scheduler = diffusers.DPMSolverMultistepScheduler(
            timestep_spacing="trailing", final_sigmas_type="zero", **common
        )
    return pipe


def generators(cache: TrajectoryCache, indices: list[int]) -> list[Any]:
    return [torch.Generator().manual_seed(cache.seed(index)) for index in indices]


def half(tensor: Any) -> NDArray[np.float16]:
    return np.asarray(tensor.detach().numpy().astype(np.float16))


@pytest.fixture(scope="module")
def cache(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> TrajectoryCache:
    return generate(tmp_path_factory.mktemp("diffusers") / "cache", tiny_model, num_train=3)


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
@pytest.mark.parametrize("scheduler", [name for name in pipeline.SCHEDULERS if name != "model"])  # the model's own
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
class TestAgainstDiffusers:
    """Bit for bit; a batch of two."""

    def test_final_latent_is_the_pipelines(
        self, tiny_model: Path, tmp_path: Path, scheduler: str, guidance_scale: float
    ) -> None:
        cache = generate(tmp_path / "c", tiny_model, PROMPTS[:2], scheduler=scheduler, guidance_scale=guidance_scale)
        own = generators(cache, [0, 1])
        start = torch.cat([torch.randn((1, *LATENT_SHAPE), generator=generator) for generator in own])
        with torch.no_grad():
            final = load(tiny_model, scheduler)(
                PROMPTS[:2],
                num_inference_steps=STEPS,
                guidance_scale=guidance_scale,
                latents=start.clone(),
                generator=own,
                output_type="latent",
            ).images
        np.testing.assert_array_equal(latents(cache)[:, STEPS], half(start))
        np.testing.assert_array_equal(latents(cache)[:, 0], half(final))

    def test_every_step_is_the_written_out_loops(
        self, tiny_model: Path, tmp_path: Path, scheduler: str, guidance_scale: float
    ) -> None:
        cache = generate(tmp_path / "c", tiny_model, PROMPTS[:2], scheduler=scheduler, guidance_scale=guidance_scale)
        pipe = load(tiny_model, scheduler)
        own = generators(cache, [0, 1])
        guided = guidance_scale > 1
        with torch.no_grad():
            condition, unconditional = pipe.encode_prompt(PROMPTS[:2], torch.device("cpu"), 1, guided)
            context = torch.cat([unconditional, condition]) if guided else condition
            x = torch.cat([torch.randn((1, *LATENT_SHAPE), generator=generator) for generator in own])
            pipe.scheduler.set_timesteps(STEPS)
            for t, tau in zip(range(STEPS, 0, -1), pipe.scheduler.timesteps, strict=True):
                np.testing.assert_array_equal(latents(cache)[:, t], half(x))
                noise = pipe.unet(torch.cat([x, x]) if guided else x, tau, encoder_hidden_states=context).sample
                if guided:
                    without, given = noise.chunk(2)
                    noise = without + guidance_scale * (given - without)
                step = pipe.scheduler.step(noise, tau, x, generator=own)
                x = step.prev_sample
                if t > 1 and hasattr(step, "pred_original_sample"):
                    np.testing.assert_array_equal(estimates(cache)[:, t - 1], half(step.pred_original_sample))
            np.testing.assert_array_equal(latents(cache)[:, 0], half(x))
            np.testing.assert_array_equal(estimates(cache)[:, 0], half(x))


def test_guidance_and_scheduler_matter(tiny_model: Path, tmp_path: Path, cache: TrajectoryCache) -> None:
    for name, kwargs in {"guided": {"guidance_scale": 2.0}, "ddim": {"scheduler": "ddim"}}.items():
        other = generate(tmp_path / name, tiny_model, num_train=3, **kwargs)
        np.testing.assert_array_equal(latents(other)[:, STEPS], latents(cache)[:, STEPS])
        assert (latents(other)[:, 0] != latents(cache)[:, 0]).any()


def test_describes_itself(cache: TrajectoryCache, tiny_model: Path) -> None:
    recipe = cache.manifest.recipe
    assert (recipe.source, recipe.clean_estimates) == ("diffusers", "denoiser")
    assert (recipe.batch_size, recipe.guidance_scale, recipe.model_dtype, recipe.device) == (2, 7.5, "float32", "cpu")
    assert recipe.model is not None
    assert recipe.model["id"] == "tiny"
    assert recipe.model["revision"].startswith("sha256:")
    assert recipe.scheduler is not None
    assert recipe.scheduler["class"] == "DDPMScheduler"
    settings = {"variance_type": "fixed_small", "clip_sample": False, "steps_offset": 1, "timestep_spacing": "leading"}
    assert recipe.scheduler["config"].items() >= settings.items()
    assert "skip_prk_steps" not in recipe.scheduler["config"]
    assert set(recipe.generator) == {"refine-env", "torch", "diffusers", "transformers"}
    assert recipe.timesteps == tuple(166 * k + 1 for k in range(5, -1, -1))
    np.testing.assert_allclose(cache.schedule.alpha_bar, NoiseSchedule.stable_diffusion(STEPS).alpha_bar, rtol=1e-5)
    assert [cache.prompt(index) for index in range(5)] == PROMPTS
    assert [cache.seed(index) for index in range(5)] == [sample_seed(3, index) for index in range(5)]
    assert cache.indices("train").tolist() == [0, 1, 2]
    assert str(tiny_model.parent).encode() not in (cache.path / "manifest.json").read_bytes()


class TestSeeds:
    def noise(self, cache: TrajectoryCache) -> NDArray[np.float64]:
        """What each DDPM step added: x_{t−1} less its mean given x_t and y_{t−1}, at t >= 3."""
        ab = cache.schedule.alpha_bar
        x, y = latents(cache).astype(np.float64), estimates(cache).astype(np.float64)
        added = []
        for t in range(3, STEPS + 1):
            alpha = ab[t] / ab[t - 1]
            mean = (np.sqrt(ab[t - 1]) * (1 - alpha) * y[:, t - 1] + np.sqrt(alpha) * (1 - ab[t - 1]) * x[:, t]) / (
                1 - ab[t]
            )
            added.append((x[:, t - 1] - mean) / np.sqrt(cache.schedule.posterior_variance[t - 1]))
        return np.stack(added, axis=1)

    def test_noise_does_not_depend_on_the_batch(self, tiny_model: Path, tmp_path: Path, cache: TrajectoryCache) -> None:
        for batch_size in (1, 3):
            other = generate(tmp_path / str(batch_size), tiny_model, batch_size=batch_size)
            np.testing.assert_array_equal(latents(other)[:, STEPS], latents(cache)[:, STEPS])
            np.testing.assert_allclose(self.noise(other), self.noise(cache), rtol=0, atol=0.05)

    def test_noise_is_the_generators(self, cache: TrajectoryCache) -> None:
        for index, generator in enumerate(generators(cache, list(range(5)))):
            draws = torch.randn((STEPS, *LATENT_SHAPE), generator=generator)
            one_by_one = torch.Generator().manual_seed(cache.seed(index))
            draws = torch.cat([torch.randn((1, *LATENT_SHAPE), generator=one_by_one) for _ in range(STEPS)])
            np.testing.assert_array_equal(cache.latents(index)[STEPS], half(draws[0]))
            np.testing.assert_allclose(self.noise(cache)[index], draws[1:5].numpy()[::-1], rtol=0, atol=0.05)

    def test_bits_do_not_depend_on_the_neighbors(
        self, tiny_model: Path, tmp_path: Path, cache: TrajectoryCache
    ) -> None:
        """At an equal batch size; the last batch of five is one sample and its repeat."""
        other = generate(tmp_path / "other", tiny_model, ["x", PROMPTS[1], "y", "z", PROMPTS[4], "w", "v"])
        for index in (1, 4):
            np.testing.assert_array_equal(other.latents(index), cache.latents(index))
            np.testing.assert_array_equal(other.clean_estimates(index), cache.clean_estimates(index))
        assert (other.latents(0) != cache.latents(0)).any()

    def test_same_and_other(self, tiny_model: Path, tmp_path: Path, cache: TrajectoryCache) -> None:
        same = generate(tmp_path / "same", tiny_model, num_train=3)
        other = generate(tmp_path / "other", tiny_model, num_train=3, seed=4)
        assert same.sha256 == cache.sha256
        assert (latents(other)[:, STEPS] != latents(cache)[:, STEPS]).any(axis=(1, 2, 3)).all()

    def test_global_state_is_neither_used_nor_changed(
        self, tiny_model: Path, tmp_path: Path, cache: TrajectoryCache
    ) -> None:
        torch.manual_seed(99)
        before = torch.get_rng_state()
        same = generate(tmp_path / "same", tiny_model, num_train=3)
        assert torch.equal(before, torch.get_rng_state())
        assert same.sha256 == cache.sha256


def test_goes_on_after_a_kill(
    tiny_model: Path, tmp_path: Path, cache: TrajectoryCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in its second shard, in the middle of a batch."""

    class Killed(BaseException):
        pass

    def killed(phase: str, done: float, total: int) -> None:
        if done > 2.5:
            raise Killed("now")

    whole = generate(tmp_path / "whole", tiny_model, shard_size=2)
    with pytest.raises(Killed, match="now"):
        generate(tmp_path / "cache", tiny_model, shard_size=2, progress=killed)
    assert len(list((tmp_path / "cache.partial").glob("*.safetensors"))) == 1
    with pytest.raises(CacheError, match=r"got guidance_scale = 2.0 instead of 7.5\. Repeat"):
        generate(tmp_path / "cache", tiny_model, shard_size=2, guidance_scale=2.0)
    calls = []
    original = LatentSampler.sample
    monkeypatch.setattr(
        LatentSampler, "sample", lambda self, *args, **kwargs: calls.append(1) or original(self, *args, **kwargs)
    )
    again = generate(tmp_path / "cache", tiny_model, shard_size=2)
    assert len(calls) == 2
    assert again.sha256 == whole.sha256
    again.verify()


def test_progress_goes_forward_within_a_batch(tiny_model: Path, tmp_path: Path) -> None:
    calls: list[float] = []
    generate(
        tmp_path / "cache",
        tiny_model,
        progress=lambda phase, done, total: calls.append(done) if phase == "sampling" else None,
    )
    assert calls == sorted(calls)
    assert calls[-1] == 5
    assert any(done % 1 for done in calls)


def test_long_prompts_are_truncated_as_the_pipeline_does(tiny_model: Path, tmp_path: Path) -> None:
    long = generate(tmp_path / "long", tiny_model, ["a b c d e f g h i j k l m n o p"])
    short = generate(tmp_path / "short", tiny_model, ["a b c d e f g h i j"])
    np.testing.assert_array_equal(latents(long), latents(short))
    assert long.prompt(0) == "a b c d e f g h i j k l m n o p"


class TestOtherSchedulers:
    def scheduler(self, name: str, **kwargs: Any) -> Any:
        import diffusers

        settings: dict[str, Any] = {
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "timestep_spacing": "leading",
            "steps_offset": 1,
        }
        return getattr(diffusers, name)(**{**settings, **kwargs})

    def test_scheduler_object(self, tiny_model: Path, tmp_path: Path, cache: TrajectoryCache) -> None:
        ddpm = self.scheduler("DDPMScheduler", clip_sample=False)
        same = generate(tmp_path / "same", tiny_model, num_train=3, scheduler=ddpm)
        np.testing.assert_array_equal(latents(same), latents(cache))
        assert "step" not in vars(ddpm)

    @pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' own
    def test_variance_exploding_ones_are_recorded_as_the_others(
        self, tiny_model: Path, tmp_path: Path, cache: TrajectoryCache
    ) -> None:
        """Euler's method keeps x_t/√ᾱ_t. It is DDIM in other coordinates: x_t agrees with DDIM's."""
        euler = generate(
            tmp_path / "euler", tiny_model, num_train=3, scheduler=self.scheduler("EulerDiscreteScheduler")
        )
        np.testing.assert_allclose(latents(euler)[:, STEPS], latents(cache)[:, STEPS], rtol=2e-3)
        ddim = self.scheduler("DDIMScheduler", clip_sample=False, set_alpha_to_one=True)
        other = generate(tmp_path / "ddim", tiny_model, num_train=3, scheduler=ddim)
        scale = np.abs(latents(other)).max(axis=(0, 2, 3, 4))
        for t in range(STEPS + 1):
            difference = np.abs(latents(euler)[:, t].astype(float) - latents(other)[:, t])
            assert difference.max() < 0.01 * scale[t]
        np.testing.assert_allclose(estimates(euler), estimates(other), rtol=0, atol=0.01 * scale[0])

    @pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
    def test_estimate_where_the_scheduler_reports_none(self, tiny_model: Path, tmp_path: Path) -> None:
        """DPM-Solver++ of first order is DDIM, and does not report the clean sample."""
        trailing = {"timestep_spacing": "trailing"}  # the two lead differently
        solver = self.scheduler("DPMSolverMultistepScheduler", solver_order=1, final_sigmas_type="zero", **trailing)
        ddim = self.scheduler("DDIMScheduler", clip_sample=False, set_alpha_to_one=True, **trailing)
        caches = [
            generate(tmp_path / name, tiny_model, scheduler=scheduler)
            for name, scheduler in {"solver": solver, "ddim": ddim}.items()
        ]
        first, second = map(estimates, caches)
        np.testing.assert_allclose(first, second, rtol=0, atol=0.01 * np.abs(second).max())

    @pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
    def test_estimate_is_what_ddim_reports(self, prediction_type: str) -> None:
        ddim = self.scheduler("DDIMScheduler", clip_sample=False, prediction_type=prediction_type)
        ddim.set_timesteps(5)
        x, output = torch.randn(2, 1, 4, 2, 2, generator=torch.Generator().manual_seed(0))
        reported = ddim.step(output, ddim.timesteps[1], x).pred_original_sample
        torch.testing.assert_close(pipeline._clean_estimate(ddim, output, ddim.timesteps[1], x), reported)

    def test_without_alphas_cumprod(self, tiny_model: Path, tmp_path: Path) -> None:
        import diffusers

        flow = diffusers.FlowMatchEulerDiscreteScheduler()
        with pytest.raises(ConfigurationError, match="must have `alphas_cumprod`, got FlowMatchEulerDiscreteScheduler"):
            generate(tmp_path / "cache", tiny_model, scheduler=flow)
        model = tmp_path / "flow"
        shutil.copytree(tiny_model, model)
        flow.save_pretrained(model / "scheduler")
        index = json.loads((model / "model_index.json").read_bytes())
        index["scheduler"] = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
        (model / "model_index.json").write_text(json.dumps(index))
        for name in ("ddpm", "model"):
            with pytest.raises(ConfigurationError, match=r"`scheduler` must have `alphas_cumprod`, got .*FlowMatch"):
                generate(tmp_path / "cache", model, scheduler=name)
        assert not (tmp_path / "cache").exists()

    def test_the_models_own(self, tiny_model: Path, tmp_path: Path) -> None:
        """This model's own is PNDM, with one network evaluation too many."""
        with pytest.raises(ConfigurationError, match=r"once at each of 6 falling timesteps, got 7 from PNDM"):
            generate(tmp_path / "cache", tiny_model, scheduler="model")


class TestBadModels:
    def copy(self, tiny_model: Path, tmp_path: Path, **changes: Any) -> Path:
        model = tmp_path / "model"
        shutil.copytree(tiny_model, model)
        index = json.loads((model / "model_index.json").read_bytes())
        index.update(changes)
        index = {name: value for name, value in index.items() if value is not ...}
        (model / "model_index.json").write_text(json.dumps(index))
        return model

    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(
            ModelNotFoundError, match=r"`model` must be a hub id, a local folder, 'emoji' or 'radiomap', got"
        ):
            generate(tmp_path / "cache", tmp_path / "nowhere")
        with pytest.raises(ModelNotFoundError, match="`model` must be a folder with a model_index.json"):
            generate(tmp_path / "cache", tmp_path)

    def test_no_bundled_model(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pipeline.importlib.resources, "files", lambda name: tmp_path)
        with pytest.raises(ModelNotFoundError, match="got 'emoji', which this installation lacks"):
            generate_diffusers(tmp_path / "cache", "emoji", PROMPTS)

    def test_hub_out_of_reach(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import diffusers

        def download(name: str, revision: str | None, **unused: None) -> str:
            assert (name, revision) == ("someone/model", "abc")
            assert "safety_checker" in unused
            raise ConnectionError("no route to host\nand more lines")

        monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
        with pytest.raises(
            ModelNotFoundError,
            match=r"got 'someone/model', which is neither in the local hub cache .*no route to host and more lines\)\. "
            r"Run `hf download someone/model --local-dir FOLDER` on a connected machine",
        ):
            generate_diffusers(tmp_path / "cache", "someone/model", PROMPTS, revision="abc")
        assert list(tmp_path.iterdir()) == []

    def test_hub_model_is_known_by_its_commit(
        self, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import diffusers

        shutil.copytree(tiny_model, tmp_path / "snapshots" / "0123abcd")
        monkeypatch.setattr(
            diffusers.DiffusionPipeline,
            "download",
            lambda name, revision, **unused: str(tmp_path / "snapshots" / "0123abcd"),
        )
        cache = generate_diffusers(tmp_path / "cache", "someone/model", ["a"], num_steps=2)
        assert cache.manifest.recipe.model == {"id": "someone/model", "revision": "0123abcd"}

    @pytest.mark.parametrize(
        ("changes", "match"),
        [
            ({"vae": ..., "text_encoder": ...}, "a StableDiffusionPipeline without vae, text_encoder"),
            ({"unet": [None, None]}, "without unet or transformer"),
            ({"_class_name": "StableDiffusionImg2ImgPipeline"}, "got a StableDiffusionImg2ImgPipeline, which does not"),
        ],
    )
    def test_no_text_to_image_latent_pipeline(
        self, tiny_model: Path, tmp_path: Path, changes: dict[str, Any], match: str
    ) -> None:
        model = self.copy(tiny_model, tmp_path, **changes)
        with pytest.raises(ConfigurationError, match=f"must be a text-to-image latent pipeline, .*{match}"):
            generate(tmp_path / "cache", model)

    @pytest.mark.parametrize("damage", ["missing", "truncated"])
    def test_weights(self, tiny_model: Path, tmp_path: Path, damage: str) -> None:
        model = self.copy(tiny_model, tmp_path)
        weights = model / "unet" / "diffusion_pytorch_model.safetensors"
        if damage == "missing":
            weights.unlink()
        else:
            weights.write_bytes(weights.read_bytes()[:1000])
        with pytest.raises(ModelNotFoundError, match=r"`model` must hold loadable weights, got 'model' \(.*Get the"):
            generate(tmp_path / "cache", model)

    def test_other_weights_are_another_request(self, tiny_model: Path, tmp_path: Path) -> None:
        model = self.copy(tiny_model, tmp_path)
        generate(tmp_path / "cache", model, ["a"])
        with (model / "unet" / "config.json").open("a") as file:
            file.write("\n")
        with pytest.raises(CacheError, match=r"must not be replaced unasked, got .*: model = .*sha256:"):
            generate(tmp_path / "cache", model, ["a"])

    @pytest.mark.parametrize(("value", "shown"), [(np.nan, "nan"), (1e6, "inf")])
    def test_latents_beyond_float16(
        self, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, shown: str
    ) -> None:
        import diffusers

        original = diffusers.DDPMScheduler.step

        def step(self: Any, output: Any, tau: Any, x: Any, **kwargs: Any) -> Any:
            result = original(self, output, tau, x, **kwargs)
            if int(tau) == 333:  # the step from t = 3 to t = 2
                result.prev_sample[1, 0, 0, 0] = value
            return result

        monkeypatch.setattr(diffusers.DDPMScheduler, "step", step)
        with pytest.raises(CacheError, match=rf"`latents` of trajectory 1 must be finite .*, got {shown} at t = "):
            generate(tmp_path / "cache", tiny_model)
        assert not (tmp_path / "cache").exists()

    def test_extra_is_not_installed(self, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("diffusers", "transformers", "torch"):
            with monkeypatch.context() as patch:
                patch.setitem(sys.modules, name, None)
                with pytest.raises(MissingExtraError, match=rf"`{name}` must be installed .*refine-env\[generate\]"):
                    generate(tmp_path / "cache", tiny_model)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"num_steps": 0}, "`num_steps` must be an integer >= 1, got 0"),
        ({"scheduler": "euler"}, "`scheduler` must be one of 'ddpm', 'ddim', 'dpmsolver\\+\\+', 'model', got 'euler'"),
        ({"scheduler": 3}, "`scheduler` must be one of .* or a diffusers scheduler, got 3"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` must be a finite number, got nan"),
        ({"batch_size": 0}, "`batch_size` must be an integer >= 1, got 0"),
        ({"seed": -1}, "`seed` must be an integer >= 0, got -1"),
        ({"device": "abacus"}, "`device` must be a torch device of this machine, got 'abacus'"),
        ({"dtype": "int8"}, "`dtype` must be one of 'float32', 'float16', 'bfloat16', got 'int8'"),
        ({"num_train": 6}, "`num_train` must be an integer in 1 … 5, got 6"),
        ({"prompts": []}, r"`prompts` must be a sequence of at least one text, got \[\]"),
        ({"prompts": "a cat"}, "`prompts` must be a sequence of at least one text, got 'a cat'"),
        ({"prompts": ["a", 3]}, "`prompts` must be a sequence of at least one text"),
    ],
)
def test_bad_arguments(tiny_model: Path, tmp_path: Path, kwargs: dict[str, Any], match: str) -> None:
    arguments = {"prompts": PROMPTS, "num_steps": STEPS, **kwargs}
    with pytest.raises(ConfigurationError, match=match):
        generate_diffusers(tmp_path / "cache", tiny_model, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_other_number_formats(tiny_model: Path, tmp_path: Path, cache: TrajectoryCache) -> None:
    other = generate(tmp_path / "bfloat16", tiny_model, dtype="bfloat16")
    assert other.manifest.recipe.model_dtype == "bfloat16"
    np.testing.assert_allclose(latents(other)[:, STEPS], latents(cache)[:, STEPS], rtol=1e-2)


def test_decodes_as_the_pipeline_does(tiny_model: Path, cache: TrajectoryCache) -> None:
    pipe = load(tiny_model, "ddpm")
    x0 = latents(cache)[:, 0]
    images = LatentDecoder(tiny_model)(x0)
    with torch.no_grad():
        tensor = torch.from_numpy(x0.astype(np.float32)) / pipe.vae.config.scaling_factor
        expected = pipe.image_processor.postprocess(pipe.vae.decode(tensor).sample, output_type="np")
    assert images.shape == (5, 8, 8, 3)
    np.testing.assert_allclose(images, expected, rtol=0, atol=1e-6)


def test_libraries_talk_as_before(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    from diffusers.utils import logging

    before = (logging.get_verbosity(), logging.is_progress_bar_enabled())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(tmp_path / "cache", tiny_model)
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert caplog.records == []
