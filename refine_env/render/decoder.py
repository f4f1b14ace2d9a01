"""Find the decoder of the model that made a cache, where it is at hand."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refine_env.errors import CacheError, ConfigurationError, MissingExtraError
from refine_env.radiomap import PowerScale, color
from refine_env.trajectories import TrajectoryCache
from refine_env.trajectories.pipeline import BUNDLED_MODELS, LatentDecoder

__all__ = ["AUTO_DECODER", "NO_DECODER", "Decoder", "find_decoder", "load_decoder", "pictures_of", "scale_of"]

AUTO_DECODER, NO_DECODER = "auto", "none"

Decoder = Callable[[ArrayLike], NDArray[np.float32]]
"""Latents (N, C, H, W) to images (N, height, width, 3) in [0, 1]."""


@lru_cache(maxsize=2)
def load_decoder(model: str) -> Any:
    """Return the decoder of a model. It is loaded once in a process, which takes seconds."""
    return LatentDecoder(model)


def find_decoder(cache: TrajectoryCache, choice: str) -> tuple[Decoder | None, str]:
    """Find the decoder for a cache's latents.

    Args:
        cache: the trajectories.
        choice: ``"auto"``: the model that the manifest names, if it is a bundled one or a folder, is that very
            revision, and torch and diffusers are installed; ``"none"``: none; else a model's folder or hub id.

    Returns:
        The decoder or None, and a note that says why there is none.

    Raises:
        ConfigurationError, CacheError, MissingExtraError: if a model was named and cannot be used.
    """
    if choice == NO_DECODER:
        return None, ""
    if choice != AUTO_DECODER:
        return load_decoder(choice), ""
    model = cache.manifest.recipe.model
    if model is None:
        return None, f"no picture: {cache.manifest.recipe.source} latents"
    name = model["id"]
    if name not in BUNDLED_MODELS and not Path(name).is_dir():
        return None, f"no picture: the model {name} is not here"
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("diffusers") is None:
        return None, "no picture: needs refine-env[generate]"
    try:
        decoder = load_decoder(name)
    except (CacheError, ConfigurationError, MissingExtraError):
        return None, f"no picture: the model {name} cannot be loaded"
    if decoder.revision != model["revision"]:
        return None, f"no picture: not the cache's revision of {name}"
    return decoder, ""


def scale_of(decoder: Decoder | None) -> PowerScale | None:
    """What the gray levels of a decoder's images stand for, where its model draws radio maps; None for images."""
    scale: PowerScale | None = getattr(decoder, "scale", None)
    return scale


def pictures_of(
    images: NDArray[np.float32], decoder: Decoder, cache: TrajectoryCache, trajectories: Sequence[int]
) -> NDArray[np.float32]:
    """Decoded images as they are shown: radio maps in color, with the buildings of their scenes; others as they are.

    Args:
        images: what the decoder gave, (N, height, width, 3) in [0, 1].
        decoder: of the images.
        cache: the trajectories; its conditions, where it has such, are buildings, cars and transmitter of the scenes.
        trajectories: whose images they are, (N,).

    Returns:
        float32 (N, height, width, 3) in [0, 1].
    """
    if scale_of(decoder) is None:
        return images
    scenes = cache.conditions
    fits = scenes is not None and scenes.shape[2:] == images.shape[1:3]
    return color(images, scenes[list(trajectories), 0] >= 0.5 if scenes is not None and fits else None)
