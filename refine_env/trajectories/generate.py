"""Generate trajectory caches from three sources: Gaussian latents, given clean latents, a diffusion model."""

from __future__ import annotations

import hashlib
import math
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import numpy as np
from numpy.typing import ArrayLike, NDArray
from safetensors import SafetensorError, safe_open

from refine_env._validation import check_integer, check_text
from refine_env.errors import CacheError, ConfigurationError
from refine_env.model.schedule import NoiseSchedule
from refine_env.trajectories.cache import TrajectoryCache
from refine_env.trajectories.conditions import Conditions, encode_conditions, hash_condition
from refine_env.trajectories.forward_process import clean_generator, forward_process, noise_generator
from refine_env.trajectories.manifest import Recipe, Span, Trajectory, sample_seed
from refine_env.trajectories.midpoints import MidpointStore
from refine_env.trajectories.prompts import PromptSelection
from refine_env.trajectories.reuse import MidpointSource, Reuse, describe_reuse
from refine_env.trajectories.statistics import ShardSummary
from refine_env.trajectories.workers import Chunk, Sampler, WorkerPool, draw_shards
from refine_env.trajectories.writer import CacheWriter

if TYPE_CHECKING:
    from refine_env.trajectories.pipeline import LatentSampler

__all__ = ["Progress", "generate_diffusers", "generate_forward_process", "generate_gaussian", "sample_seed"]

DEFAULT_NUM_STEPS = 50
DEFAULT_SHARD_SIZE = 16
_MOST_TRAJECTORIES = 10_000_000  # each is an entry of the manifest, which is read whole
_MOST_AXES = 16
_LARGEST_LATENT = 2**31 - 1

Progress = Callable[[str, float, int], None]
"""Called with the phase of the work (``"sampling"`` or ``"checking"``), the trajectories done (a fraction within
a batch counts), and their number."""

_IDEAL: dict[str, Any] = {"clean_estimates": "linear-mmse", "generator": {"numpy": np.__version__}}
"""What all ideal trajectories have in their recipe."""

_Draw = Callable[[Path, Recipe, Sequence[Span], Callable[[float], None]], list[ShardSummary]]
"""(folder, recipe, spans, report) draws and writes shards."""


class _Writing(TypedDict, total=False):
    """Arguments that all generators have, and hand on."""

    num_train: int | None
    overwrite: bool
    note: str | None
    progress: Progress | None


def generate_gaussian(
    path: str | os.PathLike[str],
    num_trajectories: int,
    latent_shape: Sequence[int] = (4, 64, 64),
    *,
    num_steps: int | None = None,
    schedule: NoiseSchedule | None = None,
    seed: int = 0,
    shard_size: int = DEFAULT_SHARD_SIZE,
    **writing: Unpack[_Writing],
) -> TrajectoryCache:
    """Generate ideal trajectories from i.i.d. N(0, 1) clean latents: the forward process, read backwards.

    Needs no torch. The same arguments give the same bytes; a call that was interrupted goes on where it
    stopped.

    Args:
        path: folder of the new cache.
        num_trajectories: N, the number of trajectories.
        latent_shape: (C, H, W); any shape is allowed.
        num_steps: T of Stable Diffusion v1-5's schedule, default 50.
        schedule: another schedule, instead of ``num_steps``.
        seed: base seed; sample k draws from `sample_seed(seed, k)`.
        shard_size: trajectories in a file.
        writing: ``num_train``, the size of the train split, by default one half; ``overwrite``, whether to replace a
            finished cache at ``path``; ``note``, free text for the manifest; ``progress``, called as the work goes on.

    Returns:
        The cache, opened.

    Raises:
        ConfigurationError: if an argument is not valid.
        CacheError: if the cache cannot be written, or something else stands at ``path``.
    """
    schedule = _resolve_schedule(schedule, num_steps)
    shape = _check_shape(latent_shape)
    count = check_integer(
        "num_trajectories",
        num_trajectories,
        1,
        _MOST_TRAJECTORIES,
        advice="The manifest lists each; make several caches of more.",
    )

    def clean(index: int) -> NDArray[np.float32]:
        return clean_generator(sample_seed(seed, index)).standard_normal(shape, dtype=np.float32)

    return _generate(
        path,
        partial(_draw_ideal, clean),
        source="gaussian",
        schedule=schedule,
        latent_shape=shape,
        prompts=[None] * count,
        shard_size=shard_size,
        seed=seed,
        units="unit power: clean latents are i.i.d. N(0, 1)",
        **_IDEAL,
        **writing,
    )


def generate_forward_process(
    path: str | os.PathLike[str],
    clean_latents: ArrayLike | TrajectoryCache | str | os.PathLike[str],
    *,
    num_steps: int | None = None,
    schedule: NoiseSchedule | None = None,
    prompts: Sequence[str] | None = None,
    seed: int = 0,
    shard_size: int = DEFAULT_SHARD_SIZE,
    **writing: Unpack[_Writing],
) -> TrajectoryCache:
    """Generate ideal trajectories from given clean latents: x_0 is noised step by step, and read backwards.

    Latents are taken as they are, in the model's own units. The clean-sample estimates are linear ones that
    assume E‖x_0‖²/M = 1; see `forward_process`.

    Args:
        path: folder of the new cache.
        clean_latents: an array (N, C, H, W); or a file with one, `.npy` or `.safetensors` (its only tensor,
            or the one called ``latents``); or a cache, open or by name or folder, whose x_0 are taken, and
            whose schedule, prompts and train split are the defaults.
        prompts: one prompt for each latent.
        seed: base seed of the noise; sample k draws from `sample_seed(seed, k)`.
        num_steps, schedule, shard_size, writing: as in `generate_gaussian`.

    Returns:
        The cache, opened.

    Raises:
        ConfigurationError: if an argument is not valid, or the clean latents are not such an array.
        CacheError: if the cache cannot be written or read, or something else stands at ``path``.
    """
    name, count, clean, origin = _load_clean_latents(clean_latents)
    if origin is not None:
        if schedule is None and num_steps is None:
            schedule = origin.schedule
        if writing.get("num_train") is None:
            writing["num_train"] = origin.manifest.recipe.num_train
    schedule = _resolve_schedule(schedule, num_steps)
    if prompts is not None:
        texts: list[str | None] = list(_check_prompts(prompts))
        if len(texts) != count:
            raise ConfigurationError(
                f"`prompts` must be one per clean latent, {count}, got {len(texts)}. Leave them out if there are none."
            )
    else:
        texts = [None] * count if origin is None else [origin.prompt(index) for index in range(count)]
    return _generate(
        path,
        partial(_draw_ideal, clean),
        source="forward-process",
        schedule=schedule,
        latent_shape=_check_shape(clean(0).shape),
        prompts=texts,
        shard_size=shard_size,
        seed=seed,
        units="those of the clean latents, taken as they are",
        clean_latents={"name": name, "sha256": _hash_latents(count, clean)},
        **_IDEAL,
        **writing,
    )


def generate_diffusers(
    path: str | os.PathLike[str],
    model: str | os.PathLike[str],
    prompts: Sequence[str] | None,
    *,
    conditions: Conditions | NDArray[Any] | None = None,
    num_steps: int = DEFAULT_NUM_STEPS,
    scheduler: Any = "ddpm",
    guidance_scale: float = 7.5,
    seed: int = 0,
    batch_size: int = 8,
    device: str | Sequence[str] = "cpu",
    dtype: str = "float32",
    revision: str | None = None,
    workers: int | None = None,
    engine: str = "loky",
    address: str | None = None,
    shard_size: int | None = None,
    reuse: Reuse | None = None,
    **writing: Unpack[_Writing],
) -> TrajectoryCache:
    """Generate trajectories of a diffusion model: any text-to-image latent pipeline of diffusers.

    Sample k has its own `torch.Generator` on the CPU, seeded `sample_seed(seed, k)`; x_T and every step's
    noise come from it, so they are the same bits whatever the batch and the device. The network's own last
    bits depend on the batch size (it is part of the recipe; the last batch is padded with repeats) and the
    machine; with these equal, the trajectory is the same bits whatever its neighbors, and so is the cache
    whatever the number of workers and their engine. On a CPU a worker runs on one thread, hence the bits do
    not depend on the number of threads: take as many workers as there are cores.

    Args:
        path: folder of the new cache.
        model: a hub id, such as ``stable-diffusion-v1-5/stable-diffusion-v1-5`` (the paper's); a local
            folder; or ``emoji`` or ``radiomap``, the bundled models.
        prompts: one per sample, for instance of `read_prompts`. A prompt longer than the tokenizer takes is
            truncated, as the pipeline does. None, where there are conditions: their names, or empty ones.
        conditions: of a model whose network sees an image beside the latent, one per sample: (N, C, H, W) in [0, 1],
            for instance of `read_conditions`; see `LatentSampler`. The cache's folder keeps them.
        num_steps: T, the number of reverse diffusion steps.
        scheduler: ``ddpm`` (the paper's: ancestral sampling with variance β̃_t, [K] Eq. 3), ``ddim``,
            ``dpmsolver++`` (DPM-Solver++ 2M), ``model`` (the pipeline's own), or a diffusers scheduler with
            `alphas_cumprod`.
        guidance_scale: scale of the classifier-free guidance; 1 is none.
        seed: base seed.
        batch_size: samples that the network sees at once.
        device: a torch device, or several of one kind for several workers.
        dtype: number format that the network runs in: ``float32``, ``float16`` or ``bfloat16``.
        revision: branch, tag or commit of a hub model.
        workers: processes that draw whole shards, each with a model of its own; default one for each device.
            One worker on the engine ``loky`` is this process.
        engine: what runs several workers: ``loky`` (this host), ``dask`` or ``ray``, see `WorkerPool`.
        address: of a running Dask scheduler or Ray cluster, whose hosts see ``path`` and ``model`` at the same
            place and have the same versions of the libraries.
        shard_size: trajectories in a file; default the least multiple of ``batch_size`` that is at least 16.
        reuse: the midpoints at which trajectories start; the cache has their steps m … 0. Default, and with a ratio
            of 0: none, and the cache is the same bytes.
        writing: as in `generate_gaussian`.

    Returns:
        The cache, opened.

    Raises:
        ConfigurationError: if an argument is not valid, the model is no text-to-image latent pipeline, or the
            scheduler has no `alphas_cumprod`.
        ModelNotFoundError: if the model's weights are missing, or cannot be loaded.
        MissingExtraError: if torch, diffusers or the engine is not installed.
        CacheError: if a latent is not finite or exceeds float16, the cache cannot be written, something else
            stands at ``path``, a worker has another model or other versions, or a worker died.
    """
    if conditions is not None and not isinstance(conditions, Conditions):
        conditions = Conditions(values=np.asarray(conditions))
    if prompts is None and conditions is not None:
        prompts = conditions.names or ("",) * len(conditions)
    if prompts is None:
        raise ConfigurationError(
            "`prompts` must be given where there are no conditions, got neither. Give --prompts, or --conditions for a "
            "model whose network sees an image."
        )
    texts = _check_prompts(prompts)
    if conditions is not None:
        conditions = conditions.for_all(len(texts), "conditions")
    batch_size = check_integer("batch_size", batch_size, 1, advice="Use 1 where memory is short.")
    if shard_size is None:
        shard_size = batch_size * -(-DEFAULT_SHARD_SIZE // batch_size)
    check_integer("seed", seed, 0, advice="Give a base seed such as 0.")
    pool = WorkerPool(
        devices=(device,) if isinstance(device, str) else tuple(device),
        workers=workers,
        engine=engine,
        address=address,
    )
    source = _DiffusionSource(model, num_steps, scheduler, guidance_scale, dtype, revision)
    seen = None if conditions is None else conditions.values
    store = reuse.store() if reuse is not None and reuse.ratio > 0.0 else None
    # Where others draw, this process loads the model only to describe it, and not onto a device of theirs.
    device_here = pool.devices[0] if pool.is_here else "cpu"
    sampler = source.load(device_here)
    sampler.check_conditions(None if seen is None else seen.shape)
    described = sampler.describe()
    draw: _Draw
    if reuse is not None and store is not None:
        stage_one = static = None
        if reuse.stage_one_model is not None:
            stage_one = replace(source, model=reuse.stage_one_model, revision=None)
            static = stage_one.load(device_here)
            stage_one = stage_one.pinned(static)
        images = reuse.images(len(texts))
        from_midpoints = _MidpointSource(source.pinned(sampler), stage_one, store, seen, images)
        described |= describe_reuse(reuse, sampler, static, texts, seed)
        draw = partial(pool.draw_shards, from_midpoints)
        if pool.is_here:
            draw = partial(_draw_here, partial(from_midpoints.sampler, sampler, static))
        del static
    elif pool.is_here:
        draw = partial(_draw_here, partial(partial, _sample, sampler, conditions=seen))
    else:
        draw = partial(pool.draw_shards, _FullSource(source.pinned(sampler), seen))
    del sampler  # where others draw, its memory is the workers' from here on
    return _generate(
        path,
        draw,
        source="diffusers",
        prompts=list(texts),
        shard_size=shard_size,
        seed=seed,
        clean_estimates="denoiser",
        units="the model's own, VAE scaling factor applied",
        batch_size=batch_size,
        model_dtype=dtype,
        device=pool.devices[0].partition(":")[0],
        prompt_source=prompts.source if isinstance(prompts, PromptSelection) else None,
        conditions=conditions,
        static_conditions=None if store is None or reuse is None else reuse.images(len(texts)),
        **described,
        **writing,
    )


@dataclass(frozen=True)
class _DiffusionSource:
    """What a worker needs to load a diffusion model: the arguments of `LatentSampler` but for the device."""

    model: str | os.PathLike[str]
    num_steps: int
    scheduler: Any
    guidance_scale: float
    dtype: str
    revision: str | None

    def load(self, device: str) -> LatentSampler:
        """Load the model onto a device."""
        from refine_env.trajectories.pipeline import LatentSampler

        return LatentSampler(device=device, **vars(self))

    def pinned(self, sampler: LatentSampler) -> _DiffusionSource:
        """Return a copy for other processes, with the hub's commit for a branch, and the full path of a folder."""
        if os.path.isdir(self.model):
            return replace(self, model=os.path.abspath(self.model))
        if sampler.revision.startswith("sha256:"):  # the bundled model
            return self
        return replace(self, revision=sampler.revision)

    def load_checked(self, recipe: Recipe, model: Mapping[str, str] | None, device: str) -> LatentSampler:
        """Load the model onto a device, if it and the libraries are those of the recipe."""
        sampler = self.load(device)
        here = {"model": sampler.revision, **sampler.versions}
        wanted = {"model": (model or {}).get("revision"), **recipe.generator}
        for name, value in here.items():
            if value != wanted[name]:
                raise CacheError(
                    f"`workers` must have the same model and libraries as the process that starts them, got {name} "
                    f"{value} instead of {wanted[name]} on {socket.gethostname()}. Install the same versions, and "
                    "give the model's folder or commit."
                )
        return sampler


@dataclass(frozen=True)
class _FullSource:
    """What a worker needs for full runs: the model, and the conditions, (N, C, H, W), where it sees some."""

    target: _DiffusionSource
    conditions: NDArray[Any] | None

    def open(self, recipe: Recipe, device: str) -> Sampler:
        """Make the sampler, if the model and the libraries are those of the recipe."""
        target = self.target.load_checked(recipe, recipe.model, device)
        return partial(_sample, target, recipe, conditions=self.conditions)


@dataclass(frozen=True)
class _MidpointSource:
    """What a worker needs to start at midpoints.

    Args:
        target: the model of the steps t <= m.
        stage_one: that of the steps t > m, where it is another.
        store: the store of midpoints.
        conditions: of the steps t <= m, (N, C, H, W), where the model sees some.
        static: those of the steps t > m, likewise.
    """

    target: _DiffusionSource
    stage_one: _DiffusionSource | None
    store: MidpointStore
    conditions: NDArray[Any] | None
    static: Conditions | None

    def open(self, recipe: Recipe, device: str) -> Sampler:
        """Make the sampler, if the models and the libraries are those of the recipe."""
        assert recipe.reuse is not None
        static = None
        if self.stage_one is not None:
            static = self.stage_one.load_checked(recipe, recipe.reuse["stage_one_model"], device)
        return self.sampler(self.target.load_checked(recipe, recipe.model, device), static, recipe)

    def sampler(self, target: LatentSampler, static: LatentSampler | None, recipe: Recipe) -> Sampler:
        """Make the sampler of models that are loaded."""
        midpoints = MidpointSource(target, target if static is None else static, self.store, recipe, self.static)
        return partial(_sample, target, recipe, midpoints=midpoints, conditions=self.conditions)


def _sample(
    sampler: LatentSampler,
    recipe: Recipe,
    start: int,
    stop: int,
    report: Callable[[float], None],
    *,
    midpoints: MidpointSource | None = None,
    conditions: NDArray[Any] | None = None,
) -> Iterator[Chunk]:
    """Draw trajectories of a diffusion model, in batches."""
    assert recipe.batch_size is not None
    for first in range(start, stop, recipe.batch_size):
        indices = list(range(first, min(first + recipe.batch_size, stop)))
        count = len(indices)
        indices += indices[-1:] * (recipe.batch_size - count)  # an equal batch size keeps the last bits equal
        prompts = [recipe.trajectories[index].prompt or "" for index in indices]
        seeds = [recipe.trajectories[index].seed for index in indices]
        seen = None if conditions is None else conditions[indices]
        scaled = partial(_scaled, report, count)
        if midpoints is None:
            chunk: Chunk = sampler.sample(prompts, seeds, scaled, conditions=seen)
        else:
            found = midpoints.start(indices, partial(report, 0.0))
            other = midpoints.of_another_model
            chunk = sampler.sample(prompts, seeds, scaled, found, of_another_model=other, conditions=seen)
            if recipe.has_full:
                full, _ = sampler.sample(prompts, seeds, partial(_scaled, report, 0), conditions=seen)
                chunk = (*chunk, full[:, :1])
        yield tuple(values[:count] for values in chunk)


def _scaled(report: Callable[[float], None], count: int, fraction: float) -> None:
    report(fraction * count)


def _draw_here(
    make_sampler: Callable[[Recipe], Sampler],
    folder: Path,
    recipe: Recipe,
    spans: Sequence[Span],
    report: Callable[[float], None],
) -> list[ShardSummary]:
    """Draw shards in this process, with a model that it has loaded."""
    return draw_shards(make_sampler(recipe), folder, recipe, spans, report)


def _draw_ideal(
    clean: Callable[[int], NDArray[Any]],
    folder: Path,
    recipe: Recipe,
    spans: Sequence[Span],
    report: Callable[[float], None],
) -> list[ShardSummary]:
    """Run the forward process from the clean latents ``clean(0)``, ``clean(1)``, …"""

    def sample(start: int, stop: int, report: Callable[[float], None]) -> Iterator[Chunk]:
        for index in range(start, stop):
            noise = noise_generator(recipe.trajectories[index].seed)
            latents, estimates = forward_process(np.asarray(clean(index), np.float32), recipe.schedule, noise)
            yield latents[None], estimates[None]

    return draw_shards(sample, folder, recipe, spans, report)


def _generate(
    path: str | os.PathLike[str],
    draw: _Draw,
    *,
    schedule: NoiseSchedule,
    prompts: Sequence[str | None],
    shard_size: int,
    seed: int,
    generator: Mapping[str, str],
    num_train: int | None = None,
    overwrite: bool = False,
    note: str | None = None,
    progress: Progress | None = None,
    conditions: Conditions | None = None,
    static_conditions: Conditions | None = None,
    **details: Any,
) -> TrajectoryCache:
    """Write a recipe, draw the shards of it that are missing, and finish the cache."""
    from refine_env import __version__

    total = len(prompts)
    seed = check_integer("seed", seed, 0, advice="Give a base seed such as 0.")
    num_train = max(1, total // 2) if num_train is None else num_train
    kept = None
    hashes: Sequence[str | None] = [None] * total
    if conditions is not None:
        kept = encode_conditions(conditions, static_conditions)
        hashes = [hash_condition(values) for values in conditions.values]
        details["conditions"] = {"file_sha256": hashlib.sha256(kept).hexdigest(), **conditions.record()}
    recipe = Recipe(
        alpha_bar=tuple(schedule.alpha_bar.tolist()),
        trajectories=tuple(
            Trajectory(prompt=prompt, seed=sample_seed(seed, index), condition=seen)
            for index, (prompt, seen) in enumerate(zip(prompts, hashes, strict=True))
        ),
        num_train=check_integer(
            "num_train", num_train, 1, total, advice="The rest of the trajectories is the test split."
        ),
        shard_size=check_integer("shard_size", shard_size, 1, advice="Give the trajectories in one file."),
        seed=seed,
        generator={"refine-env": __version__, **generator},
        note=None if note is None else check_text("note", note),
        **details,
    )

    def report(phase: str, count: float) -> None:
        if progress is not None:
            progress(phase, count, total)

    with CacheWriter(path, recipe, overwrite=overwrite, conditions=kept) as writer:
        missing = writer.missing()
        done = total - sum(span.stop - span.start for span in missing)
        report("sampling", done)
        if missing:
            for summary in draw(writer.staging, recipe, missing, lambda count: report("sampling", done + count)):
                writer.add(summary)
        return writer.finish(lambda checked, _: report("checking", checked))


def _resolve_schedule(schedule: NoiseSchedule | None, num_steps: int | None) -> NoiseSchedule:
    if schedule is None:
        return NoiseSchedule.stable_diffusion(
            check_integer(
                "num_steps",
                DEFAULT_NUM_STEPS if num_steps is None else num_steps,
                1,
                999,
                advice="[K] takes 50.",
            )
        )
    if num_steps is not None and num_steps != schedule.num_steps:
        raise ConfigurationError(
            f"`num_steps` must be the schedule's own {schedule.num_steps}, got {num_steps}. Give only one of the two."
        )
    return schedule


def _check_shape(latent_shape: Sequence[int]) -> tuple[int, ...]:
    advice = "Give (C, H, W), for instance (4, 64, 64)."
    shape = tuple(latent_shape)
    if not 1 <= len(shape) <= _MOST_AXES:
        raise ConfigurationError(f"`latent_shape` must have 1 … {_MOST_AXES} dimensions, got {len(shape)}. {advice}")
    shape = tuple(check_integer("latent_shape", size, 1, advice=advice) for size in shape)
    if math.prod(shape) > _LARGEST_LATENT:
        raise ConfigurationError(
            f"`latent_shape` must make at most {_LARGEST_LATENT} numbers, as many as a message can carry, "
            f"got {shape!s:.200}. {advice}"
        )
    return shape


def _check_prompts(prompts: Sequence[str]) -> tuple[str, ...]:
    if isinstance(prompts, str) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ConfigurationError(
            f"`prompts` must be a sequence of at least one text, got {prompts!r:.60}. Give one prompt per sample."
        )
    return tuple(check_text("prompts", prompt) for prompt in prompts)


def _load_clean_latents(
    source: ArrayLike | TrajectoryCache | str | os.PathLike[str],
) -> tuple[str, int, Callable[[int], NDArray[Any]], TrajectoryCache | None]:
    """Return name and number of the clean latents, a function that reads one, and the cache they come from, or None."""
    name = "array"
    if isinstance(source, str | os.PathLike):
        file = Path(source)
        name = file.name
        is_array = file.suffix in (".npy", ".safetensors")
        source = _load_latent_file(file) if is_array else TrajectoryCache.open(file)
    if isinstance(source, TrajectoryCache):
        cache = source
        return cache.path.name, len(cache), lambda index: cache.latents(index)[0], cache
    latents = np.asarray(source)
    if latents.ndim < 2 or len(latents) == 0 or latents.dtype.kind != "f":
        raise ConfigurationError(
            f"`clean_latents` must be a floating-point array (N, C, H, W), N >= 1, got {latents.dtype} of "
            f"shape {latents.shape}. Stack the latents along the first axis."
        )
    for index, latent in enumerate(latents):
        if not np.isfinite(latent).all():
            raise ConfigurationError(
                f"`clean_latents` must be finite, got {latent[~np.isfinite(latent)][0]} in latent {index}. "
                "Leave it out."
            )
    return name, len(latents), latents.__getitem__, None


def _load_latent_file(file: Path) -> NDArray[Any]:
    try:
        if file.suffix == ".npy":
            return np.asarray(np.load(file, mmap_mode="r", allow_pickle=False))
        with safe_open(file, framework="numpy") as tensors:
            names = list(tensors.keys())
            wanted = names[0] if len(names) == 1 else "latents"
            if wanted not in names:
                raise ConfigurationError(
                    f"`clean_latents` must be a file with one tensor, or one called 'latents', got {names} "
                    f"in {file}. Save the latents alone."
                )
            return np.asarray(tensors.get_tensor(wanted))
    except (OSError, ValueError, TypeError, EOFError, SafetensorError) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(
            "`clean_latents` must be a readable .npy or .safetensors file of float16, float32 or float64, "
            f"got {file}: {error}. Check the path and the file."
        ) from error


def _hash_latents(count: int, clean: Callable[[int], NDArray[Any]]) -> str:
    """Compute the SHA-256 of the latents as float32, with their number and shape."""
    digest = hashlib.sha256(repr((count, tuple(clean(0).shape))).encode())
    for index in range(count):
        digest.update(np.ascontiguousarray(clean(index), dtype="<f4").tobytes())
    return digest.hexdigest()
