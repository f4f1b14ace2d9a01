"""Diffusion models through diffusers: load a pipeline, sample while recording every step, denoise, decode.

The only module that touches torch and diffusers, and only inside functions.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.resources
import inspect
import json
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refine_env._validation import check_choice, check_finite, check_integer
from refine_env.errors import CacheError, ConfigurationError, ModelNotFoundError, describe_error, import_extra
from refine_env.model.schedule import NoiseSchedule
from refine_env.radiomap import read_scale
from refine_env.trajectories.cache import TrajectoryCache
from refine_env.trajectories.conditions import hash_condition
from refine_env.trajectories.midpoints import Midpoint, MidpointKey

__all__ = ["BUNDLED_MODEL", "LatentDecoder", "LatentDenoiser", "LatentSampler", "ModelNotFoundError", "open_recorded"]

BUNDLED_MODEL = "emoji"
BUNDLED_MODELS = {BUNDLED_MODEL: "train.ldm", "radiomap": "train.radiomap"}
"""The models that the package has with it, and what trained them."""
EXTRA = "generate"
SCHEDULERS = ("ddpm", "ddim", "dpmsolver++", "model")
DTYPES = ("float32", "float16", "bfloat16")

UNUSED_COMPONENTS = {"safety_checker": None, "feature_extractor": None}
"""Components that only look at decoded images: they are neither downloaded nor loaded."""

_INDEX_FILE = "model_index.json"
_MODEL_SUFFIXES = (".json", ".txt", ".model", ".safetensors", ".bin")


class LatentSampler:
    """A text-to-image latent pipeline that records x_T … x_0 and the clean-sample estimates.

    The pipeline runs as it is; only its scheduler's `step` is watched. So what is recorded is, bit for bit,
    what the pipeline itself computes, for every pipeline and scheduler alike.

    A pipeline whose network sees an image beside the latent (StableDiffusionUpscalePipeline) takes a *condition* with
    every prompt: an image in [0, 1] that has the latent's resolution, or r times that; then the r² pixels of each of
    its elements are channels, as `torch.nn.functional.pixel_unshuffle` orders them. No noise is added to it: the
    pipeline's `noise_level` is 0.

    Args:
        model: hub id, local folder, or ``emoji`` or ``radiomap`` (bundled).
        num_steps: T, the number of reverse diffusion steps.
        scheduler: ``ddpm``, ``ddim``, ``dpmsolver++`` (2M), ``model``, or a diffusers scheduler.
        guidance_scale: scale of the classifier-free guidance; 1 is none.
        device: the torch device on which the model runs.
        dtype: ``float32``, ``float16`` or ``bfloat16``.
        revision: branch, tag or commit of a hub model.

    Attributes:
        model_id: the hub id, the folder's name, or ``emoji``.
        revision: the hub's commit, or a hash of the model's files.
        schedule: ᾱ_0 … ᾱ_T.
        timesteps: τ_T > … > τ_1.
        scheduler_config: class and config of the scheduler.
        latent_shape: (C, H, W).
        condition_shape: (C, H, W) of the image that the network sees, at the latent's resolution; None where it sees
            none.
        guidance_scale: as given.
        device_kind: ``cpu``, ``cuda``, …
        versions: of the libraries that the samples depend on.

    Raises:
        ConfigurationError: if an argument is not valid, the model is no text-to-image latent pipeline, or the
            scheduler has no `alphas_cumprod` or does not evaluate the network once per step.
        ModelNotFoundError: if the weights are missing, or cannot be loaded.
        MissingExtraError: if torch, diffusers or transformers is not installed.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        num_steps: int,
        scheduler: Any = "ddpm",
        guidance_scale: float = 7.5,
        device: str = "cpu",
        dtype: str = "float32",
        revision: str | None = None,
    ) -> None:
        if isinstance(scheduler, str):
            check_choice("scheduler", scheduler, SCHEDULERS)
        num_steps = check_integer("num_steps", num_steps, 1, advice="[K] takes 50.")
        self.guidance_scale = check_finite("guidance_scale", guidance_scale, advice="1 is no guidance.")
        torch_device, torch_dtype = _torch_device(device), _torch_dtype(dtype)
        self._dtype = dtype
        self.device_kind: str = torch_device.type
        folder, self.model_id, self.revision = _find_checked_model(model, revision)
        self._pipeline = _load_pipeline(folder, self.model_id, torch_dtype).to(torch_device)
        self._pipeline.set_progress_bar_config(disable=True)
        _check_signature(self._pipeline)
        self._scheduler = self._pipeline.scheduler = _build_scheduler(self._pipeline.scheduler, scheduler)
        with _quiet(), _without_copy_warning():
            self.schedule = NoiseSchedule.from_scheduler(self._scheduler, num_steps)
        self.timesteps = tuple(int(tau) for tau in self._scheduler.timesteps)
        self.scheduler_config = {
            "class": type(self._scheduler).__name__,
            "config": _public_config(self._scheduler),
        }
        self.latent_shape = _latent_shape(self._pipeline)
        self.condition_shape = _condition_shape(self._pipeline, self.latent_shape)
        self.versions = _versions()

    def describe(self) -> dict[str, Any]:
        """Return what a cache's recipe says about the model, its scheduler and the libraries."""
        return {
            "schedule": self.schedule,
            "latent_shape": self.latent_shape,
            "generator": self.versions,
            "model": {"id": self.model_id, "revision": self.revision},
            "scheduler": self.scheduler_config,
            "timesteps": self.timesteps,
            "guidance_scale": self.guidance_scale,
        }

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        report: Callable[[float], None] | None = None,
        start: Sequence[Midpoint] | None = None,
        *,
        of_another_model: bool = False,
        conditions: ArrayLike | None = None,
    ) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
        """Sample one batch.

        Sample k's x_T and then the noise of each step come from its own CPU generator, seeded ``seeds[k]``. A sample
        that starts at a midpoint draws for its last m steps what it would draw for them without.

        Args:
            prompts: one prompt for each sample.
            seeds: one seed for each sample.
            report: called with the part of the steps that is done.
            start: one midpoint for each sample, all of one step m; default x_T.
            of_another_model: whether the midpoints may be of another model and scheduler, of the same schedule.
            conditions: one condition for each sample, (B, C, H, W), for a model that sees one.

        Returns:
            Latents (B, T+1, C, H, W) and clean estimates (B, T, C, H, W), float16, indexed by t, in the
            model's own units; from midpoints, of m + 1 and m steps. Schedulers that keep x_t/√ᾱ_t (Euler, LMS) are
            recorded as x_t. y_0 = x_0. A value beyond float16's range is ±inf; the caller checks.

        Raises:
            ConfigurationError: if the pipeline's latents have another shape, the midpoints are of another model, T,
                step or shape than can be, or the conditions are not those that the model wants.
        """
        num_steps = self.schedule.num_steps if start is None else self._check_start(start, seeds, of_another_model)
        samples: list[Any] = []
        estimates: list[Any] = []

        def record(sample: Any, previous: Any, estimate: Any) -> None:
            if not samples:
                samples.append(sample.detach())
            samples.append(previous.detach())  # they stay on the device, which need not wait for a copy
            estimates.append(estimate.detach())
            if report is not None:
                report(len(estimates) / num_steps)

        self._run(prompts, seeds, record, start, conditions=conditions)
        expected = (len(prompts), *self.latent_shape)
        if len(estimates) != num_steps or tuple(samples[0].shape) != expected:
            raise ConfigurationError(
                f"`model` must give latents of shape {expected} in {num_steps} scheduler steps, got "
                f"{tuple(samples[0].shape) if samples else None} in {len(estimates)} from "
                f"{type(self._pipeline).__name__}. Use a pipeline such as StableDiffusionPipeline."
            )
        scale = self._scale()
        if scale is not None:
            samples = [sample * factor for sample, factor in zip(samples, scale, strict=True)]
        latents = _stack(samples)
        clean = _stack(estimates)
        clean[:, 0] = latents[:, 0]
        return latents, clean

    def midpoint_key(
        self, prompt: str, seed: int, step: int, batch_size: int, condition: NDArray[Any] | None = None
    ) -> MidpointKey:
        """All that the midpoint x_m of a run depends on.

        Args:
            prompt: of the run.
            seed: of its x_T and noise.
            step: m.
            batch_size: samples at once.
            condition: of the run, (C, H, W), where the model sees one.
        """
        return MidpointKey(
            model=self.revision,
            scheduler=json.dumps(self.scheduler_config, sort_keys=True),
            num_steps=self.schedule.num_steps,
            guidance_scale=self.guidance_scale,
            prompt=prompt,
            seed=seed,
            step=step,
            dtype=self._dtype,
            device=self.device_kind,
            batch_size=batch_size,
            versions=json.dumps(self.versions, sort_keys=True),
            condition=None if condition is None else hash_condition(condition),
        )

    def sample_midpoints(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        step: int,
        report: Callable[[], None] | None = None,
        *,
        passing: Sequence[int] = (),
        conditions: ArrayLike | None = None,
    ) -> list[Midpoint]:
        """Run one batch as far as x_m, by T − m evaluations of the network for each.

        Args:
            prompts: one prompt for each sample.
            seeds: one seed for each sample.
            step: m, 1 … T − 1.
            report: called after every step.
            passing: further steps, m … T − 1, whose midpoints the same run gives.
            conditions: as in :meth:`sample`.

        Returns:
            Those of m, in the order of the samples, then those of every further step.

        Raises:
            ConfigurationError: if the scheduler keeps something else than x_t, which has no midpoint, a further step
                does not lie before m, or the conditions are not those that the model wants.
        """
        self.check_midpoints()
        for at in passing:
            check_integer("passing", at, step, self.schedule.num_steps - 1, advice="Give steps before m is reached.")
        reached = self.schedule.num_steps
        found: dict[int, dict[str, NDArray[Any]]] = {}

        def record(sample: Any, previous: Any, estimate: Any) -> None:
            nonlocal reached
            reached -= 1
            if report is not None:
                report()
            if reached == step or reached in passing:
                tensors = {"latent": previous, **_history(self._scheduler, previous.shape)}
                found[reached] = {name: _lossless(tensor) for name, tensor in tensors.items()}
            if reached == step:
                raise _ArrivedError

        with contextlib.suppress(_ArrivedError):
            self._run(prompts, seeds, record, conditions=conditions)
        given = [None] * len(prompts) if conditions is None else list(np.asarray(conditions))
        return [
            Midpoint(
                key=self.midpoint_key(prompt, seed, at, len(prompts), given[index]),
                tensors={name: values[index] for name, values in found[at].items()},
            )
            for at in (step, *passing)
            for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True))
        ]

    def estimate(
        self, prompts: Sequence[str], latents: ArrayLike, step: int, *, conditions: ArrayLike | None = None
    ) -> NDArray[np.float32]:
        """The clean-sample estimates y(x_t, c) at given latents, by one evaluation of the network for each.

        Args:
            prompts: one prompt for each sample.
            latents: x_t, (B, C, H, W), in the model's own units.
            step: t, 1 … T.
            conditions: as in :meth:`sample`.

        Returns:
            float32 (B, C, H, W), with the sampler's guidance.

        Raises:
            ConfigurationError: if the step or the latents' shape is none of the sampler's, its scheduler keeps
                something else than x_t, or the conditions are not those that the model wants.
        """
        self.check_midpoints()
        step = check_integer("step", step, 1, self.schedule.num_steps, advice="Give t, for example T.")
        values = np.asarray(latents, dtype=np.float32)
        if values.shape != (len(prompts), *self.latent_shape):
            raise ConfigurationError(
                f"`latents` must be of shape {(len(prompts), *self.latent_shape)}, one x_t for each prompt, got "
                f"{values.shape}. Give those of this model."
            )
        key = self.midpoint_key("", 0, step, len(prompts))
        start = [Midpoint(key=key, tensors={"latent": value}) for value in values]
        found: list[Any] = []

        def record(sample: Any, previous: Any, estimate: Any) -> None:
            found.append(estimate)
            raise _ArrivedError

        with contextlib.suppress(_ArrivedError):
            self._run(prompts, [0] * len(prompts), record, start, conditions=conditions, with_history=False)
        array: NDArray[np.float32] = found[0].detach().float().cpu().numpy()
        return array

    def check_midpoints(self) -> None:
        """Check that the scheduler's runs have midpoints that others may start from.

        Raises:
            ConfigurationError: if it keeps something else than x_t (Euler, LMS).
        """
        if self._scale() is not None:
            raise ConfigurationError(
                f"`scheduler` must keep x_t itself for midpoints to be reused, got {self.scheduler_config['class']}, "
                "which keeps x_t/√ᾱ_t. Choose ddpm, ddim or dpmsolver++."
            )

    def initial_noise(self, seeds: Sequence[int]) -> NDArray[np.float32]:
        """The x_T of samples: what their generators draw first, float32 (B, C, H, W); behind a condition's noise."""
        array: NDArray[np.float32] = self._draw_initial(self._generators(seeds)).float().numpy()
        return array

    def _run(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        record: Callable[[Any, Any, Any], None],
        start: Sequence[Midpoint] | None = None,
        *,
        conditions: ArrayLike | None = None,
        with_history: bool = True,
    ) -> None:
        """Run the pipeline, with ``record(x_{t+1}, x_t, y_t)`` called at every step.

        Without history the scheduler has zeros for what it keeps beside x_t; the first y_t is the same.
        """
        seen = self._condition_arguments(conditions, len(prompts))
        torch = import_extra("torch", EXTRA)
        generators = self._generators(seeds)
        with contextlib.ExitStack() as stack:
            stack.enter_context(_one_thread(self.device_kind))
            stack.enter_context(_without_copy_warning())
            initial: dict[str, Any] = {}
            before = None
            if start is not None:
                tensors = {
                    name: torch.from_numpy(np.stack([midpoint.tensors[name] for midpoint in start]))
                    for name in start[0].tensors
                }
                fresh = [generator.get_state() for generator in generators]
                drawn = self._draw_initial(generators)  # and not used: what is drawn later is to be the same
                initial["latents"] = tensors.pop("latent").to(drawn.dtype)
                skipped = self.schedule.num_steps - start[0].key.step
                device = self._pipeline.device
                history = tensors if with_history else None
                before = stack.enter_context(
                    _begun(self._scheduler, skipped, torch.zeros_like(drawn), generators, fresh, history, device)
                )
            stack.enter_context(_watched(self._scheduler, record, before))
            self._pipeline(
                prompt=list(prompts),
                num_inference_steps=self.schedule.num_steps,
                guidance_scale=self.guidance_scale,
                generator=generators,
                output_type="latent",
                **initial,
                **seen,
            )

    def check_conditions(self, shape: Sequence[int] | None, name: str = "conditions") -> None:
        """Check the shape of conditions.

        Args:
            shape: (N, C, H, W); None where there are none.
            name: of the argument.

        Raises:
            ConfigurationError: if the model sees no condition and there are some, the other way round, or they have
                another shape than it sees.
        """
        wanted = self.condition_shape
        if wanted is None:
            if shape is not None:
                raise ConfigurationError(
                    f"`{name}` must be left out for a model that sees no image, got some for {self.model_id!r:.100}. "
                    "Give prompts alone, or choose another model."
                )
            return
        channels, height, width = wanted
        fold = 0 if shape is None or len(shape) != 4 else max(1, shape[2] // height)
        if shape is None or tuple(shape[1:]) != (channels // fold**2 if fold else 0, fold * height, fold * width):
            raise ConfigurationError(
                f"`{name}` must be of shape (N, {channels}, {height}, {width}) for the model {self.model_id!r:.100}, "
                f"or (N, {channels}/r², {height}·r, {width}·r), got {'none' if shape is None else tuple(shape)}. Give "
                "the images that the model was made for."
            )

    def _condition_arguments(self, conditions: ArrayLike | None, count: int) -> dict[str, Any]:
        """What the pipeline is called with for conditions (B, C, H, W)."""
        values = None if conditions is None else np.array(conditions, dtype=np.float32)
        self.check_conditions(None if values is None else values.shape)
        if values is None or self.condition_shape is None:
            return {}
        if len(values) != count or not ((values >= 0.0) & (values <= 1.0)).all():
            raise ConfigurationError(
                f"`conditions` must be one image in [0, 1] for each of the {count} samples, got {len(values)} in "
                f"[{values.min():.4g}, {values.max():.4g}]. Scale them, or give as many."
            )
        torch = import_extra("torch", EXTRA)
        fold = values.shape[2] // self.condition_shape[1]
        return {"image": torch.nn.functional.pixel_unshuffle(torch.from_numpy(values), fold), "noise_level": 0}

    def _generators(self, seeds: Sequence[int]) -> list[Any]:
        torch = import_extra("torch", EXTRA)
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    def _draw_initial(self, generators: Sequence[Any]) -> Any:
        """Draw x_T as pipelines do, (B, C, H, W); before it they draw the noise of the condition."""
        torch = import_extra("torch", EXTRA)
        shapes = [shape for shape in (self.condition_shape, self.latent_shape) if shape is not None]
        for shape in shapes:
            drawn = torch.cat(
                [
                    torch.randn((1, *shape), generator=generator, dtype=_torch_dtype(self._dtype))
                    for generator in generators
                ]
            )
        return drawn

    def _check_start(self, start: Sequence[Midpoint], seeds: Sequence[int], of_another_model: bool) -> int:
        """Check that samples can start at these midpoints; return their m."""
        self.check_midpoints()
        if len(start) != len(seeds):
            raise ConfigurationError(
                f"`start` must be one midpoint for each sample, {len(seeds)}, got {len(start)}. Give as many."
            )
        own = self.midpoint_key("", 0, start[0].key.step, 1)
        fields = ("num_steps", "step") if of_another_model else ("model", "num_steps", "step", "scheduler")
        names = {"latent", *start[0].tensors}
        for midpoint in start:
            for field in fields:
                wanted, given = getattr(own, field), getattr(midpoint.key, field)
                if wanted != given:
                    raise ConfigurationError(
                        f"`start` must be midpoints with the {field} {wanted!r:.200}, got {given!r:.200}. Make them "
                        "with the same model, scheduler and number of steps, at one step m."
                    )
            shapes = {name: midpoint.tensors[name].shape for name in names if name in midpoint.tensors}
            if set(shapes.values()) != {self.latent_shape} or names != shapes.keys():
                raise ConfigurationError(
                    f"`start` must be midpoints with {', '.join(sorted(names))} of shape {self.latent_shape}, got "
                    f"{shapes}. Make them with the same model and scheduler."
                )
        return check_integer("start", own.step, 1, own.num_steps - 1, advice="Give midpoints of a step m in between.")

    def _scale(self) -> list[float] | None:
        """Return factors √ᾱ_t = 1/√(1 + σ_t²) from the scheduler's own samples to x_T … x_0; None if these are x_t."""
        if float(self._scheduler.init_noise_sigma) == 1.0:
            return None
        sigmas = np.asarray(self._scheduler.sigmas, dtype=np.float64)
        factors: list[float] = (1.0 / np.sqrt(1.0 + sigmas**2)).tolist()
        return factors


class LatentDecoder:
    """The decoder of a latent diffusion model's VAE.

    Args:
        model, device, dtype, revision: as those of :class:`LatentSampler`.

    Attributes:
        model_id, revision: as those of :class:`LatentSampler`.
        folder: where the model is on this machine.
        scale: what the gray levels stand for, where the images are radio maps; None for all others.

    Raises:
        ConfigurationError, ModelNotFoundError, MissingExtraError: as :class:`LatentSampler` does.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        device: str = "cpu",
        dtype: str = "float32",
        revision: str | None = None,
    ) -> None:
        torch_device, torch_dtype = _torch_device(device), _torch_dtype(dtype)
        folder, self.model_id, self.revision = _find_checked_model(model, revision)
        self.folder = folder
        self.scale = read_scale(folder)
        diffusers = import_extra("diffusers", EXTRA)
        class_name = _read_index(folder)["vae"][1]
        with _loading(self.model_id):
            vae = getattr(diffusers, class_name).from_pretrained(folder / "vae", torch_dtype=torch_dtype)
        self._vae = vae.eval().to(torch_device)

    def __call__(self, latents: ArrayLike) -> NDArray[np.float32]:
        """Decode latents to images.

        Args:
            latents: (N, C, H, W), in the model's own units (scaling factor applied).

        Returns:
            float32 (N, height, width, 3) in [0, 1]; of a model of one channel, such as a radio map's gray level, that
            channel three times.
        """
        torch = import_extra("torch", EXTRA)
        config = self._vae.config
        shift = getattr(config, "shift_factor", None) or 0.0
        values = torch.from_numpy(np.array(latents, dtype=np.float32)) / config.scaling_factor + shift
        with torch.no_grad(), _one_thread(self._vae.device.type):
            images = self._vae.decode(values.to(self._vae.device, self._vae.dtype), return_dict=False)[0]
        pixels = (images.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()
        array: NDArray[np.float32] = np.repeat(pixels, 3, axis=3) if pixels.shape[3] == 1 else pixels
        return array


class LatentDenoiser:
    """A latent diffusion model as a denoiser: E[x_0 | x_0 + noise, prompt], by one evaluation of its network.

    The network is asked at the timestep whose noise is that of the observation, a fraction of one where need be,
    interpolated in the logarithm of the noise.

    Args:
        model, device, dtype, revision: as those of :class:`LatentSampler`.
        guidance_scale: scale of the classifier-free guidance; 1 is none. Any other takes two evaluations.

    Attributes:
        model_id, revision, versions: as those of :class:`LatentSampler`.
        guidance_scale: as given.

    Raises:
        ConfigurationError, ModelNotFoundError, MissingExtraError: as :class:`LatentSampler` does; or if the network is
            no U-Net that takes a latent, a timestep and the prompt alone.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        device: str = "cpu",
        dtype: str = "float32",
        revision: str | None = None,
        guidance_scale: float = 1.0,
    ) -> None:
        self.guidance_scale = check_finite("guidance_scale", guidance_scale, advice="1 is no guidance.")
        torch_device, torch_dtype = _torch_device(device), _torch_dtype(dtype)
        folder, self.model_id, self.revision = _find_checked_model(model, revision)
        self._pipeline = _load_pipeline(folder, self.model_id, torch_dtype).to(torch_device)
        network = getattr(self._pipeline, "unet", None)
        if (
            network is None
            or getattr(network.config, "addition_embed_type", None) not in (None, "text")
            or network.config.in_channels != network.config.out_channels
        ):
            raise ConfigurationError(
                f"`model` must have a U-Net that takes a latent, a timestep and the prompt, got "
                f"{type(self._pipeline).__name__}. Use one such as stable-diffusion-v1-5/stable-diffusion-v1-5."
            )
        alpha_bar = getattr(self._pipeline.scheduler, "alphas_cumprod", None)
        if alpha_bar is None:
            raise ConfigurationError(
                f"`model` must have a scheduler with `alphas_cumprod`, got {type(self._pipeline.scheduler).__name__}. "
                "Use a model of discrete-time diffusion, such as Stable Diffusion v1-5."
            )
        values = np.asarray(alpha_bar, dtype=np.float64)
        usable = (values > 0.0) & (values < 1.0)  # some schedules end in no signal at all
        self._timesteps = np.flatnonzero(usable).astype(np.float64)
        self._log_noise = np.log((1.0 - values[usable]) / values[usable])
        self._embeddings: dict[str, Any] = {}
        self.versions = _versions()

    def __call__(
        self, samples: ArrayLike, noise_to_signal: ArrayLike, prompts: Sequence[str | None]
    ) -> NDArray[np.float32]:
        """The posterior mean of x_0.

        Args:
            samples: √ᾱ x_0 + √(1 − ᾱ) ε with ᾱ = 1/(1 + ν), (N, C, H, W).
            noise_to_signal: ν (N,). The network is asked at the nearest that it knows; inf is its largest.
            prompts: one per sample.

        Returns:
            float32 (N, C, H, W).
        """
        torch = import_extra("torch", EXTRA)
        network = self._pipeline.unet
        with np.errstate(divide="ignore"):
            log_noise = np.clip(np.log(np.asarray(noise_to_signal)), self._log_noise[0], self._log_noise[-1])
        timesteps = np.interp(log_noise, self._log_noise, self._timesteps)
        shape = (-1, *(1,) * (np.ndim(samples) - 1))
        alpha_bar = torch.from_numpy(np.reshape(1.0 / (1.0 + np.exp(log_noise)), shape).astype(np.float32))
        values = torch.from_numpy(np.array(samples, dtype=np.float32))
        with torch.no_grad(), _one_thread(network.device.type):

            def predict(texts: Sequence[str]) -> Any:
                output = network(
                    values.to(network.device, network.dtype),
                    torch.from_numpy(timesteps.astype(np.float32)).to(network.device),
                    encoder_hidden_states=self._embed(texts),
                )
                return output.sample.float().cpu()

            output = predict([prompt or "" for prompt in prompts])
            if self.guidance_scale != 1.0:
                plain = predict([""] * len(values))
                output = plain + self.guidance_scale * (output - plain)
            clean: NDArray[np.float32] = _predicted_clean(self._pipeline.scheduler, output, values, alpha_bar).numpy()
        return clean

    def _embed(self, prompts: Sequence[str]) -> Any:
        """The prompts' embeddings (N, tokens, width); each is computed once."""
        torch = import_extra("torch", EXTRA)
        for prompt in prompts:
            if prompt not in self._embeddings:
                self._embeddings[prompt] = self._pipeline.encode_prompt(prompt, self._pipeline.unet.device, 1, False)[0]
        return torch.cat([self._embeddings[prompt] for prompt in prompts])


_Model = TypeVar("_Model", LatentDecoder, LatentDenoiser)


def open_recorded(
    kind: type[_Model], cache: TrajectoryCache, model: str | None = None, *, device: str = "cpu"
) -> _Model:
    """A part of the model that drew a cache's latents.

    Args:
        kind: which part.
        cache: the trajectories.
        model: hub id or folder of that model, where the name in the cache's manifest does not lead to it.
        device: torch device.

    Raises:
        ConfigurationError: if the cache's latents come from no model.
        CacheError: if the model is missing, or not the one that the manifest names.
        MissingExtraError: if torch or diffusers is not installed.
    """
    recorded = cache.manifest.recipe.model
    if recorded is None:
        raise ConfigurationError(
            f"`cache` must hold latents of a model to be decoded, got {cache.path.name!r}, whose source is "
            f"{cache.manifest.recipe.source!r}. Leave images out, or choose a cache that a model generated."
        )
    opened = kind(model or recorded["id"], device=device, revision=recorded["revision"])
    if opened.revision != recorded["revision"]:
        raise CacheError(
            f"`model` must be the one that drew the cache {cache.path.name!r}, {recorded['id']} of revision "
            f"{recorded['revision']:.20}…, got {opened.model_id} of revision {opened.revision:.20}…. Give its "
            "folder (--model), or generate the cache again."
        )
    return opened


def _versions() -> dict[str, str]:
    """Of the libraries that samples depend on."""
    return {name: str(import_extra(name, EXTRA).__version__) for name in ("torch", "diffusers", "transformers")}


def _stack(tensors: Sequence[Any]) -> NDArray[np.float16]:
    """Stack tensors (B, C, H, W), the last step first: float16 (B, len, C, H, W)."""
    torch = import_extra("torch", EXTRA)
    array: NDArray[np.float16] = torch.stack(list(reversed(tensors)), dim=1).to(torch.float16).cpu().numpy()
    return array


@contextlib.contextmanager
def _one_thread(device_kind: str) -> Iterator[None]:
    """On a CPU, run on one thread: the last bits of a sum depend on how it is split among threads."""
    torch = import_extra("torch", EXTRA)
    threads = torch.get_num_threads()
    if device_kind == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _ArrivedError(Exception):
    """A run is where it was to go, and the pipeline need not go on."""


@contextlib.contextmanager
def _watched(
    scheduler: Any, record: Callable[[Any, Any, Any], None], before: Callable[[], None] | None = None
) -> Iterator[None]:
    """Have ``before()`` and ``record(x_{t+1}, x_t, y_t)`` called at every step of a scheduler."""
    original = scheduler.step

    @functools.wraps(original)  # pipelines look up the signature, to see whether to pass a generator
    def step(model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        as_output = kwargs.pop("return_dict", True)
        if before is not None:
            before()
        output = original(model_output, timestep, sample, *args, return_dict=True, **kwargs)
        estimate = getattr(output, "pred_original_sample", None)
        if estimate is None:
            estimate = _clean_estimate(scheduler, model_output, timestep, sample)
        record(sample, output.prev_sample, estimate)
        return output if as_output else output.to_tuple()

    scheduler.step = step
    try:
        yield
    finally:
        del scheduler.step


@contextlib.contextmanager
def _begun(
    scheduler: Any,
    skipped: int,
    nothing: Any,
    generators: list[Any],
    fresh: list[Any],
    history: dict[str, Any] | None,
    device: Any,
) -> Iterator[Callable[[], None]]:
    """Have a pipeline find its scheduler with the first steps behind it.

    The scheduler goes these steps itself, on zeros: so its counters are as after a run, and the generators have drawn
    what they draw in one. Then it gets the tensors that it had kept in the run to the midpoint. What the pipeline draws
    before its first step (the noise of a condition) it draws of fresh generators.

    Args:
        scheduler: whose `set_timesteps` the pipeline will call.
        skipped: T − m.
        nothing: zeros (B, C, H, W) on the CPU, in the pipeline's number format.
        generators: of the samples, with x_T behind them.
        fresh: their states before that.
        history: what the scheduler had kept, (B, C, H, W) each; None where what comes of it is not wanted.
        device: of the pipeline.

    Gives:
        What is to be called before every step: a scheduler looks up its steps among all T, while the pipeline has m.

    Raises:
        ConfigurationError: in the pipeline, if the scheduler keeps other tensors than those of the midpoints.
    """
    original, step = scheduler.set_timesteps, scheduler.step
    every: list[Any] = []
    ahead: list[Any] = []  # states of the generators, from the first step on

    def put(states: list[Any]) -> None:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)

    @functools.wraps(original)
    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        original(*args, **kwargs)
        every[:] = [scheduler.timesteps]
        drawing = {"generator": generators} if "generator" in inspect.signature(step).parameters else {}
        for timestep in scheduler.timesteps[:skipped]:
            step(nothing, timestep, nothing, **drawing)
        if history is not None:
            kept = _history(scheduler, nothing.shape)
            if kept.keys() != history.keys():
                raise ConfigurationError(
                    f"`start` must be midpoints with what {type(scheduler).__name__} keeps, {sorted(kept)}, got "
                    f"{sorted(history)}. Make them with the same scheduler."
                )
            _put_history(scheduler, {name: history[name].to(device, values.dtype) for name, values in kept.items()})
        scheduler.timesteps = every[0][skipped:]
        ahead[:] = [generator.get_state() for generator in generators]
        put(fresh)

    def before() -> None:
        scheduler.timesteps = every[0]
        if ahead:
            put(ahead)
            ahead.clear()

    scheduler.set_timesteps = set_timesteps
    try:
        yield before
    finally:
        del scheduler.set_timesteps


def _history(scheduler: Any, shape: Any) -> dict[str, Any]:
    """The tensors (B, C, H, W) that a scheduler keeps from one step to the next, by attribute and place in a list."""
    torch = import_extra("torch", EXTRA)
    found = {}
    for name, value in vars(scheduler).items():
        items = (
            {f"{name}.{place}": item for place, item in enumerate(value)} if isinstance(value, list) else {name: value}
        )
        found.update(
            {key: item for key, item in items.items() if isinstance(item, torch.Tensor) and item.shape == shape}
        )
    return found


def _put_history(scheduler: Any, tensors: dict[str, Any]) -> None:
    for key, tensor in tensors.items():
        name, _, place = key.partition(".")
        if place:
            getattr(scheduler, name)[int(place)] = tensor
        else:
            setattr(scheduler, name, tensor)


def _lossless(tensor: Any) -> NDArray[Any]:
    """A tensor as an array of the same numbers; NumPy has no bfloat16, of which each is a float32."""
    torch = import_extra("torch", EXTRA)
    tensor = tensor.detach().cpu()
    array: NDArray[Any] = (tensor if tensor.dtype == torch.float16 else tensor.float()).numpy()
    return array


@contextlib.contextmanager
def _without_copy_warning() -> Iterator[None]:
    """Say nothing of a call by which torch and diffusers' solvers have NumPy copy an array, which does no harm."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="__array__ implementation doesn't accept a copy keyword")
        yield


def _clean_estimate(scheduler: Any, model_output: Any, timestep: Any, sample: Any) -> Any:
    """E[x_0 | x_t] from the network's output, for schedulers that do not report it."""
    return _predicted_clean(scheduler, model_output, sample, scheduler.alphas_cumprod[int(timestep)].to(sample.device))


def _predicted_clean(scheduler: Any, model_output: Any, sample: Any, alpha_bar: Any) -> Any:
    """E[x_0 | x_t] from what the network said of x_t = √ᾱ x_0 + √(1 − ᾱ) ε."""
    signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
    prediction = scheduler.config.prediction_type
    if prediction == "epsilon":
        return (sample - noise * model_output) / signal
    if prediction == "v_prediction":
        return signal * sample - noise * model_output
    if prediction == "sample":
        return model_output
    raise ConfigurationError(
        f"`scheduler` must predict 'epsilon', 'v_prediction' or 'sample', got {prediction!r} from "
        f"{type(scheduler).__name__}. Use DDPMScheduler (the paper's) or DDIMScheduler."
    )


def _build_scheduler(own: Any, wanted: Any) -> Any:
    """Build the scheduler to sample with, on the pipeline's own β schedule."""
    if wanted == "model":
        return own
    if not isinstance(wanted, str):
        if not hasattr(wanted, "step") or not hasattr(wanted, "set_timesteps"):
            raise ConfigurationError(
                f"`scheduler` must be one of {', '.join(map(repr, SCHEDULERS))} or a diffusers scheduler, "
                f"got {wanted!r:.60}. Choose one of them."
            )
        return wanted
    diffusers = import_extra("diffusers", EXTRA)
    if getattr(own, "alphas_cumprod", None) is None:
        raise ConfigurationError(
            f"`scheduler` must have `alphas_cumprod`, got a model whose own is {type(own).__name__}. Use a "
            "model of discrete-time diffusion, such as Stable Diffusion v1-5."
        )
    common = {"thresholding": False, "timestep_spacing": "leading", "steps_offset": 1}
    with _quiet():
        if wanted == "ddpm":
            return diffusers.DDPMScheduler.from_config(
                own.config, variance_type="fixed_small", clip_sample=False, **common
            )
        if wanted == "ddim":
            return diffusers.DDIMScheduler.from_config(own.config, clip_sample=False, **common)
        # Every step but the first uses two network evaluations, its own and the one before; the last one ends at ᾱ = 1.
        # What diffusers calls leading leaves out the noisiest steps here: 200 of them would begin at 801 of 1000.
        solver = {"algorithm_type": "dpmsolver++", "solver_order": 2, "final_sigmas_type": "zero"}
        return diffusers.DPMSolverMultistepScheduler.from_config(
            own.config, **solver, **{**common, "timestep_spacing": "trailing"}
        )


def _find_model(model: str | os.PathLike[str], revision: str | None) -> tuple[Path, str, str]:
    """Return folder, id and revision of a model, which is downloaded if need be."""
    name = os.fspath(model)
    if name in BUNDLED_MODELS:
        folder = Path(str(importlib.resources.files("refine_env"))) / "models" / name
        if not (folder / _INDEX_FILE).is_file():
            raise ModelNotFoundError(
                f"`model` must be an installed model, got {name!r}, which this installation lacks (no "
                f"{_INDEX_FILE} in {folder}). Install refine-env anew, or train it with `python -m "
                f"{BUNDLED_MODELS[name]}`."
            )
        return folder, name, _fingerprint(folder)
    folder = Path(name)
    if folder.is_dir():
        return folder, folder.resolve().name, _fingerprint(folder)
    if isinstance(model, os.PathLike) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise ModelNotFoundError(
            f"`model` must be a hub id, a local folder, {' or '.join(map(repr, BUNDLED_MODELS))}, got {name!r}, and "
            "there is no such folder. Check the path."
        )
    diffusers = import_extra("diffusers", EXTRA)
    try:
        with _quiet():
            folder = Path(diffusers.DiffusionPipeline.download(name, revision=revision, **UNUSED_COMPONENTS))
    except Exception as error:  # the hub's client raises whatever its HTTP library raises
        raise ModelNotFoundError(
            f"`model` must be within reach, got {name!r}, which is neither in the local hub cache nor to be "
            f"downloaded ({describe_error(error)}). Run `hf download {name} --local-dir FOLDER` on a "
            "connected machine, and pass that FOLDER."
        ) from error
    return folder, name, folder.name


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / _INDEX_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise ModelNotFoundError(
            f"`model` must be a folder with a {_INDEX_FILE}, as diffusers' `save_pretrained` writes it, got "
            f"{folder} ({error}). Check the path."
        ) from error
    if not isinstance(index, dict):
        raise ModelNotFoundError(f"{folder / _INDEX_FILE} must be a JSON object, got {index!r:.60}. Get it anew.")
    return index


def _find_checked_model(model: str | os.PathLike[str], revision: str | None) -> tuple[Path, str, str]:
    """Find a model, and refuse what is no text-to-image latent pipeline before its weights are read."""
    folder, model_id, revision = _find_model(model, revision)
    index = _read_index(folder)
    present = {name for name, value in index.items() if isinstance(value, list) and value[0] is not None}
    missing = [
        " or ".join(names)
        for names in (("vae",), ("unet", "transformer"), ("tokenizer",), ("text_encoder",), ("scheduler",))
        if not present.intersection(names)
    ]
    if missing:
        raise ConfigurationError(
            f"`model` must be a text-to-image latent pipeline, got {model_id!r}, a "
            f"{index.get('_class_name')} without {', '.join(missing)}. Use one such as "
            "stable-diffusion-v1-5/stable-diffusion-v1-5."
        )
    return folder, model_id, revision


def _load_pipeline(folder: Path, model_id: str, dtype: Any) -> Any:
    diffusers = import_extra("diffusers", EXTRA)
    import_extra("transformers", EXTRA)
    unused: dict[str, Any] = {}
    if "safety_checker" in _read_index(folder):
        unused = dict(UNUSED_COMPONENTS)
        if "low_res_scheduler" not in _read_index(folder):  # a pipeline that upscales has no such option
            unused["requires_safety_checker"] = False
    with _loading(model_id):
        return diffusers.DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype, **unused)


@contextlib.contextmanager
def _loading(model_id: str) -> Iterator[None]:
    """Turn whatever a library raises at missing or damaged weights into one sentence; show no progress bars."""
    try:
        with _quiet(), warnings.catch_warnings():
            # The older ones of the supported versions know no other name for `torch_dtype`.
            warnings.filterwarnings("ignore", message=".*`?torch_dtype`? is deprecated", category=FutureWarning)
            yield
    except Exception as error:
        raise ModelNotFoundError(
            f"`model` must hold loadable weights, got {model_id!r} ({describe_error(error)}). "
            "Get the model's files anew."
        ) from error


def _check_signature(pipeline: Any) -> None:
    parameters = inspect.signature(pipeline.__call__).parameters
    wanted = {"prompt", "num_inference_steps", "guidance_scale", "generator", "output_type"}
    name = type(pipeline).__name__
    starts_from_image = "image" in parameters and not _sees_condition(pipeline)
    if not wanted <= set(parameters) or starts_from_image or "mask_image" in parameters:
        raise ConfigurationError(
            f"`model` must be a text-to-image latent pipeline, got a {name}, which does not go from a prompt "
            "alone to latents. Use one such as stable-diffusion-v1-5/stable-diffusion-v1-5."
        )


def _latent_shape(pipeline: Any) -> tuple[int, int, int]:
    network = getattr(pipeline, "unet", None) or pipeline.transformer
    size = network.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    channels = pipeline.vae.config.latent_channels if _sees_condition(pipeline) else network.config.in_channels
    return int(channels), int(height), int(width)


def _sees_condition(pipeline: Any) -> bool:
    """Whether the network sees an image beside the latent, at its resolution: StableDiffusionUpscalePipeline's does."""
    parameters = inspect.signature(pipeline.__call__).parameters
    return {"image", "noise_level"} <= set(parameters) and hasattr(pipeline, "low_res_scheduler")


def _condition_shape(pipeline: Any, latent_shape: tuple[int, int, int]) -> tuple[int, int, int] | None:
    if not _sees_condition(pipeline):
        return None
    channels, height, width = latent_shape
    return int(pipeline.unet.config.in_channels) - channels, height, width


def _public_config(scheduler: Any) -> dict[str, Any]:
    """Return a scheduler's own parameters, none left over from another class, as JSON values (infinity as text)."""
    config: dict[str, Any] = json.loads(scheduler.to_json_string(), parse_constant=str)
    own = inspect.signature(type(scheduler).__init__).parameters
    return {name: value for name, value in sorted(config.items()) if name in own}


def _fingerprint(folder: Path) -> str:
    """Compute the SHA-256 over the names and bytes of a local model's files."""
    components = {name for name, value in _read_index(folder).items() if isinstance(value, list)}
    files = [folder / _INDEX_FILE] + [
        file
        for component in sorted(components - set(UNUSED_COMPONENTS))
        for file in sorted((folder / component).rglob("*"))
        if file.is_file() and file.suffix in _MODEL_SUFFIXES
    ]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as handle:
            content = hashlib.file_digest(handle, "sha256").hexdigest()
        digest.update(f"{file.relative_to(folder).as_posix()} {content}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def _torch_device(device: str) -> Any:
    torch = import_extra("torch", EXTRA)
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except Exception as error:  # RuntimeError, AssertionError or NotImplementedError, by the kind of device
        raise ConfigurationError(
            f"`device` must be a torch device of this machine, got {device!r} ({describe_error(error)}). Use 'cpu', "
            "or 'cuda' where there is a GPU."
        ) from error
    return resolved


def _torch_dtype(dtype: str) -> Any:
    return getattr(import_extra("torch", EXTRA), check_choice("dtype", dtype, DTYPES))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep diffusers' and transformers' progress bars and notes off the terminal; errors still come."""
    libraries = [
        import_extra("diffusers", EXTRA).utils.logging,
        import_extra("transformers", EXTRA).utils.logging,
    ]
    states = [(log, log.get_verbosity(), log.is_progress_bar_enabled()) for log in libraries]
    for log in libraries:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, verbosity, bars in states:
            log.set_verbosity(verbosity)
            if bars:
                log.enable_progress_bar()
