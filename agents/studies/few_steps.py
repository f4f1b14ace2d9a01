"""Caches of a model's generation in few steps: the same prompts and the same x_T as those of another cache."""

from __future__ import annotations

from pathlib import Path

from refine_env import CacheError, ConfigurationError, TrajectoryCache
from refine_env.trajectories import generate_diffusers

__all__ = ["FOLDER", "SAMPLERS", "cache_name", "few_step_cache"]

FOLDER = Path("cached_trajectories")
"""Where the caches are made; :meth:`refine_env.TrajectoryCache.open` finds them there by their names."""

SAMPLERS = ("ddim", "dpmsolver++")
"""Deterministic samplers of ``refine-env generate diffusers --scheduler``: DDIM, and DPM-Solver++ of second order."""


def cache_name(origin: TrajectoryCache, sampler: str, num_steps: int, guidance_scale: float | None = None) -> str:
    """The name of a cache that is made after ``origin``, with another guidance if one is given."""
    guided = "" if guidance_scale is None else f"-guidance-{guidance_scale:g}"
    return f"{origin.path.name}-{sampler.replace('++', '')}-{num_steps}{guided}"


def few_step_cache(
    origin: TrajectoryCache,
    sampler: str,
    num_steps: int,
    *,
    guidance_scale: float | None = None,
    folder: Path | None = None,
) -> TrajectoryCache:
    """The trajectories of ``origin``'s prompts and initial noise by another sampler, made if they are not there yet.

    What is interrupted goes on where it stopped.

    Args:
        origin: a cache that a diffusion model generated.
        sampler: a scheduler of ``refine-env generate diffusers``.
        num_steps: T.
        guidance_scale: that of the new cache; None is that of ``origin``.
        folder: where caches are kept; None is :data:`FOLDER`.

    Raises:
        ConfigurationError: if ``origin`` comes from no model.
        CacheError: if another cache stands at that place.
        ModelNotFoundError: if the model is not to be had.
        MissingExtraError: if torch or diffusers is not installed.
    """
    recipe = origin.manifest.recipe
    if recipe.model is None or recipe.batch_size is None or recipe.guidance_scale is None:
        raise ConfigurationError(
            f"`cache` must come from a diffusion model to be generated in few steps, got {origin.path.name!r}, whose "
            f"source is {recipe.source!r}. Use the default cache."
        )
    path = (folder or FOLDER) / cache_name(origin, sampler, num_steps, guidance_scale)
    if not path.is_dir():
        generate_diffusers(
            path,
            recipe.model["id"],
            [str(origin.prompt(index)) for index in range(len(origin))],
            num_steps=num_steps,
            scheduler=sampler,
            guidance_scale=recipe.guidance_scale if guidance_scale is None else guidance_scale,
            seed=recipe.seed,
            batch_size=recipe.batch_size,
            num_train=recipe.num_train,
        )
    made = TrajectoryCache.open(path)
    if made.manifest.recipe.model != recipe.model or len(made) != len(origin):
        raise CacheError(
            f"{path} must hold the prompts of {origin.path.name!r} by the model {recipe.model['id']} of revision "
            f"{recipe.model['revision']:.20}…, got another cache. Delete it to have it made again."
        )
    return made
