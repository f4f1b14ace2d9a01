"""Conditions of diffusion runs, images that the network sees beside the latent: read from files, kept with a cache."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from refine_env.errors import ConfigurationError
from refine_env.trajectories.files import hash_file

__all__ = [
    "TRUTH",
    "Conditions",
    "decode_conditions",
    "decode_truth",
    "encode_conditions",
    "hash_condition",
    "read_conditions",
]

TENSOR = "conditions"
NAMES = "names"
TRUTH = "truth"
"""What a file calls the images that a model ought to give under the conditions, where these are known."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Conditions:
    """Images that the network of a diffusion model sees beside the latent, one for each trajectory.

    Args:
        values: float16 or float32 (N, C, H, W) in [0, 1].
        names: one for each, which stand for prompts where there are none; or empty.
        source: ``name`` and ``sha256`` of the file that they are from; empty where they are not from one.
        truth: what the model ought to give under each, gray levels as bytes, (N, height, width); None where unknown.

    Raises:
        ConfigurationError: if they are not such an array, or the names or the truth are not as many.
    """

    values: NDArray[Any]
    names: tuple[str, ...] = ()
    source: tuple[tuple[str, str], ...] = ()
    truth: NDArray[np.uint8] | None = None

    def __post_init__(self) -> None:
        values = self.values
        if values.ndim != 4 or not values.size or values.dtype not in (np.float16, np.float32):
            raise ConfigurationError(
                f"`conditions` must be float16 or float32 images (N, C, H, W), N >= 1, got {values.dtype} of shape "
                f"{values.shape}. Stack them along the first axis."
            )
        if not ((values >= 0.0) & (values <= 1.0)).all():
            raise ConfigurationError(
                f"`conditions` must be in [0, 1], got values in [{values.min():.4g}, {values.max():.4g}]. Scale them."
            )
        if self.names and len(self.names) != len(values):
            raise ConfigurationError(
                f"`conditions` must have one name each, {len(values)}, got {len(self.names)}. Leave the names out, or "
                "give as many."
            )
        truth = self.truth
        if truth is not None and (truth.dtype.name, truth.ndim, len(truth)) != ("uint8", 3, len(values)):
            raise ConfigurationError(
                f"`{TRUTH}` must be a gray image of bytes for each of the {len(values)} conditions, got {truth.dtype} "
                f"of shape {truth.shape}. Stack as many along the first axis, or leave it out."
            )

    def __len__(self) -> int:
        return len(self.values)

    def for_all(self, count: int, name: str) -> Conditions:
        """As many as there are trajectories, one of them standing for all.

        Raises:
            ConfigurationError: if their number, which ``name`` is said of, is another.
        """
        if len(self) == count:
            return self
        if len(self) != 1:
            raise ConfigurationError(
                f"`{name}` must be one for each of the {count} trajectories, or one for all, got {len(self)}. Stack as "
                "many along the first axis."
            )
        return Conditions(
            values=np.repeat(self.values, count, axis=0),
            names=self.names * count,
            source=self.source,
            truth=None if self.truth is None else np.repeat(self.truth, count, axis=0),
        )

    def record(self) -> dict[str, Any]:
        """What a cache's manifest says of them, as JSON values: where they come from, and the hash of all."""
        return {**dict(self.source), "shape": list(self.values.shape), "values_sha256": hash_condition(self.values)}


def hash_condition(values: NDArray[Any]) -> str:
    """SHA-256 of images as float32 with their shape: the same for a float16 and the float32 that the network sees."""
    digest = hashlib.sha256(repr(tuple(values.shape)).encode())
    digest.update(np.ascontiguousarray(values, dtype="<f4").tobytes())
    return digest.hexdigest()


def read_conditions(path: str | os.PathLike[str]) -> Conditions:
    """Read conditions from a file: `.npz`, `.npy` or `.safetensors`.

    The array is the file's only one, or the one called ``conditions``. A `.npz` may hold ``names``, too, a text for
    each, and ``truth``, an image for each.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ConfigurationError: if it cannot be read, or does not hold such an array.
    """
    file = Path(path)
    names: tuple[str, ...] = ()
    truth = None
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="numpy") as tensors:
                values = tensors.get_tensor(_only(list(tensors.keys()), file))
        elif file.suffix == ".npz":
            with np.load(file, allow_pickle=False) as arrays:
                values = arrays[_only([name for name in arrays.files if name not in (NAMES, TRUTH)], file)]
                names = tuple(map(str, arrays[NAMES])) if NAMES in arrays.files else ()
                truth = arrays[TRUTH] if TRUTH in arrays.files else None
        else:
            values = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"`conditions` must be an existing file, got {str(file)!r}. Check the path.") from None
    except (OSError, ValueError, TypeError, EOFError, SafetensorError, zipfile.BadZipFile) as error:
        if isinstance(error, ConfigurationError):
            raise
        raise ConfigurationError(
            f"`conditions` must be a readable .npz, .npy or .safetensors file, got {str(file)!r} ({error}). Check the "
            "path and the file."
        ) from error
    if values.dtype == np.float64:
        values = values.astype(np.float32)
    source = (("name", file.name), ("sha256", hash_file(file)))
    return Conditions(values=values, names=names, source=source, truth=truth)


def _only(names: Sequence[str], file: Path) -> str:
    """The name of the conditions among those of a file's arrays."""
    wanted = names[0] if len(names) == 1 else TENSOR
    if wanted not in names:
        raise ConfigurationError(
            f"`conditions` must be a file with one array, or one called {TENSOR!r}, got {list(names)} in {file}. Save "
            "the conditions alone."
        )
    return wanted


def encode_conditions(conditions: Conditions, static: Conditions | None) -> bytes:
    """The file that a cache keeps its conditions in, the static ones that its midpoints were made with, and truth."""
    tensors = {TENSOR: conditions.values} | ({} if static is None else {f"static_{TENSOR}": static.values})
    if conditions.truth is not None:
        tensors[TRUTH] = conditions.truth
    return save({name: np.ascontiguousarray(values) for name, values in tensors.items()})


def decode_conditions(content: bytes) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """The conditions of a cache's file, and the static ones where it has them.

    Raises:
        SafetensorError, KeyError: if it is no such file.
    """
    tensors = load(content)
    return tensors[TENSOR], tensors.get(f"static_{TENSOR}")


def decode_truth(content: bytes) -> NDArray[np.uint8] | None:
    """The truth in a cache's file of conditions, where it has it.

    Raises:
        SafetensorError: if it is no such file.
    """
    return load(content).get(TRUTH)
