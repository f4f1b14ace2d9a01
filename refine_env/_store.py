"""Arrays that take a while to compute, kept on disk between processes."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from numpy.typing import NDArray
from safetensors.numpy import load, save

from refine_env._files import write_atomically

__all__ = ["DIRECTORY_VARIABLE", "load_arrays", "store_arrays", "store_directory"]

DIRECTORY_VARIABLE = "REFINE_ENV_CACHE"
"""Environment variable that names the folder; empty: nothing is kept on disk."""

_DIGEST_BYTES = hashlib.sha256().digest_size


def store_directory() -> Path | None:
    """The folder: the variable's, or else ``refine-env`` where the system keeps a user's cached files.

    Returns:
        None if nothing is to be kept, or the user has no home.
    """
    chosen = os.environ.get(DIRECTORY_VARIABLE)
    if chosen is not None:
        return Path(chosen) if chosen else None
    try:
        folder = platformdirs.user_cache_path("refine-env", appauthor=False, opinion=False)
    except RuntimeError:  # without a home
        return None
    return folder if folder.is_absolute() else None  # earlier versions gave a literal "~" without a home


def _path(kind: str, key: str) -> Path | None:
    directory = store_directory()
    name = f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.bin"
    return None if directory is None else directory / name


def load_arrays(kind: str, key: str) -> dict[str, NDArray[Any]] | None:
    """The arrays stored under a key.

    Args:
        kind: what they are, the beginning of the file's name.
        key: everything that they depend on, the version of their computation included.

    Returns:
        None if there are none, or the file is damaged: then compute them.
    """
    path = _path(kind, key)
    if path is None:
        return None
    try:
        data = path.read_bytes()
        digest, content = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
        if hashlib.sha256(key.encode() + content).digest() != digest:
            return None
        return load(content)
    except Exception:  # unreadable or damaged, in whatever way
        return None


def store_arrays(kind: str, key: str, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Store arrays under a key, atomically; where the folder cannot be written, nothing happens.

    Args:
        kind: what they are.
        key: see :func:`load_arrays`.
        arrays: by name.
    """
    path = _path(kind, key)
    if path is None:
        return
    content = save({name: np.ascontiguousarray(values) for name, values in arrays.items()})
    with contextlib.suppress(OSError):
        write_atomically(path, hashlib.sha256(key.encode() + content).digest() + content)
