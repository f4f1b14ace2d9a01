"""A store of midpoints: the latents x_m at which a diffusion run was, kept so that others may start there.

A midpoint's file is named by a hash of all that its bits depend on, so the store never holds a wrong one, needs no
index, and any number of processes may share its folder: a file appears whole or not at all, and one that vanishes while
it is wanted is made again.

The numbers are in the format that the sampler runs in, so that a run that goes on from a midpoint is, bit for bit, the
run that made it: float16 where the network runs in float16, else float32 (of which a bfloat16 is a part).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from refine_env._files import write_atomically
from refine_env._store import DIRECTORY_VARIABLE, store_directory
from refine_env._validation import check_integer
from refine_env.errors import CacheError, ConfigurationError, printable
from refine_env.trajectories.files import disk_errors, read_file

__all__ = ["DEFAULT_MAX_BYTES", "Midpoint", "MidpointKey", "MidpointStore"]

DEFAULT_MAX_BYTES = 1 << 30

_SUFFIX = ".safetensors"
_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
_TEMPORARY_NAME = re.compile(r"[0-9a-f]{64}\.safetensors.*\.tmp")
_TEMPORARY_SECONDS = 3600.0
_METADATA = "midpoint"
_NO_HASH = "0" * 64
_HASH = re.compile(rb'{\\"sha256\\":\\"([0-9a-f]{64})\\"')  # a text within a text: of the key, quotes are escaped twice


@dataclass(frozen=True, kw_only=True)
class MidpointKey:
    """All that the bits of a midpoint depend on.

    Args:
        model: revision of the diffusion model, as `LatentSampler.revision` has it.
        scheduler: ``class`` and ``config`` of the sampler, as JSON text.
        num_steps: T of the run.
        guidance_scale: scale of the classifier-free guidance.
        prompt: the condition that the run had.
        seed: of the run's x_T and noise.
        step: m.
        dtype: number format that the network ran in.
        device: kind of device that it ran on.
        batch_size: samples that it saw at once.
        versions: of the libraries, as JSON text.
        condition: SHA-256 of the image that the network saw beside the latent; None where it sees none.
    """

    model: str
    scheduler: str
    num_steps: int
    guidance_scale: float
    prompt: str
    seed: int
    step: int
    dtype: str
    device: str
    batch_size: int
    versions: str
    condition: str | None = None

    @property
    def text(self) -> str:
        """The fields as canonical JSON, without the condition where there is none."""
        return _canonical({name: value for name, value in asdict(self).items() if value is not None})

    @property
    def file(self) -> str:
        """The name of the midpoint's file."""
        return _file_name(self.text)


@dataclass(frozen=True, kw_only=True, eq=False)
class Midpoint:
    """Where a run was after its steps T … m + 1.

    Args:
        key: what it was made of.
        tensors: ``latent``, x_m (C, H, W), in the scheduler's own units; and whatever else of that shape the
            scheduler carries from one step to the next (DPM-Solver++: the last clean-sample estimates).
    """

    key: MidpointKey
    tensors: Mapping[str, NDArray[Any]]


class MidpointStore:
    """A folder of midpoints, of which those that were not used for longest are deleted where it grows too large.

    Args:
        folder: default ``midpoints`` in the folder of the user's cached files.
        max_bytes: size of the files beyond which midpoints are deleted; one that has just been written stays.

    Raises:
        ConfigurationError: if the folder is a file, there is no default one, or ``max_bytes`` is not positive.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None, *, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        if folder is None:
            parent = store_directory()
            if parent is None:
                raise ConfigurationError(
                    f"`midpoints` must be a folder where {DIRECTORY_VARIABLE} is empty or the user has no home, got "
                    "None. Give one with --midpoints."
                )
            folder = parent / "midpoints"
        self.folder = Path(folder).absolute()
        self.max_bytes = check_integer("max_bytes", max_bytes, 1, advice=f"Give for example {DEFAULT_MAX_BYTES}.")
        with disk_errors(self.folder):
            if self.folder.exists() and not self.folder.is_dir():
                raise ConfigurationError(
                    f"`midpoints` must be a folder, got the file {printable(self.folder)}. Choose another place."
                )

    def read(self, key: MidpointKey) -> Midpoint | None:
        """A midpoint, which counts as used from now on.

        Returns:
            None if it is not there, or damaged: then a warning names the file, and `write` puts another in its place.

        Raises:
            CacheError: if the file cannot be read.
        """
        file = self.folder / key.file
        try:
            text, tensors = _decode(read_file(file))
        except CacheError:
            if file.exists():
                raise
            return None
        except ValueError as error:
            warnings.warn(f"{file} is damaged ({error}): the midpoint is made again.", RuntimeWarning, stacklevel=2)
            return None
        if text != key.text:
            warnings.warn(f"{file} is damaged (it has another's name): it is made again.", RuntimeWarning, stacklevel=2)
            return None
        with contextlib.suppress(OSError):  # another process deleted it, or owns it
            os.utime(file)
        return Midpoint(key=key, tensors=tensors)

    def write(self, midpoint: Midpoint) -> None:
        """Write a midpoint, whole or not at all, and delete the longest unused ones beyond the limit.

        Raises:
            CacheError: if the folder cannot be written.
        """
        file = self.folder / midpoint.key.file
        with disk_errors(self.folder):
            write_atomically(file, _encode(midpoint))
            self._evict(file)

    def sizes(self) -> dict[Path, int]:
        """The files of the midpoints with their sizes [bytes], the longest unused first."""
        found = [(stat.st_mtime_ns, file, stat.st_size) for file, stat in self._files(_NAME)]
        return {file: size for _, file, size in sorted(found)}

    def find_damage(self, progress: Callable[[int, int], None] | None = None) -> list[str]:
        """Read every midpoint; one sentence for each that is damaged.

        Args:
            progress: called with the files read so far and their number.
        """
        damage = []
        files = list(self.sizes())
        for number, file in enumerate(files):
            try:
                text, _ = _decode(read_file(file))
                if _file_name(text) != file.name:
                    raise ValueError("it has another's name")
            except CacheError as error:
                if file.exists():
                    damage.append(str(error))
            except ValueError as error:
                damage.append(f"{file} is damaged ({error}).")
            if progress is not None:
                progress(number + 1, len(files))
        return damage

    def clear(self) -> int:
        """Delete all midpoints, and nothing else; returns their number.

        Raises:
            CacheError: if the folder cannot be written.
        """
        count = 0
        with disk_errors(self.folder):
            for pattern in (_NAME, _TEMPORARY_NAME):
                for file, _ in self._files(pattern):
                    file.unlink(missing_ok=True)
                    count += pattern is _NAME
        return count

    def _files(self, pattern: re.Pattern[str]) -> Iterator[tuple[Path, os.stat_result]]:
        with disk_errors(self.folder):
            names = sorted(os.listdir(self.folder)) if self.folder.is_dir() else []
        for name in names:
            if pattern.fullmatch(name):
                with contextlib.suppress(FileNotFoundError):  # another process deleted it
                    yield self.folder / name, (self.folder / name).stat()

    def _evict(self, kept: Path) -> None:
        for file, stat in self._files(_TEMPORARY_NAME):
            if time.time() - stat.st_mtime > _TEMPORARY_SECONDS:  # of a process that was killed
                file.unlink(missing_ok=True)
        sizes = self.sizes()
        total = sum(sizes.values())
        for file, size in sizes.items():
            if total <= self.max_bytes:
                break
            if file != kept:
                file.unlink(missing_ok=True)
                total -= size


def _canonical(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def _file_name(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest() + _SUFFIX


def _encode(midpoint: Midpoint) -> bytes:
    """A safetensors file: its header's metadata hold the SHA-256 of the file with zeros for that hash, and the key.

    Of several metadata the library writes now one, now the other first, so they are one text.
    """
    tensors = {name: np.ascontiguousarray(values) for name, values in midpoint.tensors.items()}
    blank = save(tensors, {_METADATA: f'{{"sha256":"{_NO_HASH}","key":{midpoint.key.text}}}'})
    found = _HASH.search(blank)
    assert found is not None
    return blank[: found.start(1)] + hashlib.sha256(blank).hexdigest().encode() + blank[found.end(1) :]


def _decode(content: bytes) -> tuple[str, dict[str, NDArray[Any]]]:
    """The key's text and the tensors of a file.

    Raises:
        ValueError: if a byte of it is another than was written.
    """
    length = int.from_bytes(content[:8], "little")
    found = _HASH.search(content, 8, min(8 + length, len(content)))
    if found is None:
        raise ValueError("it holds no hash")
    blank = content[: found.start(1)] + _NO_HASH.encode() + content[found.end(1) :]
    if hashlib.sha256(blank).hexdigest().encode() != found[1]:
        raise ValueError("its hash does not fit its content")
    try:
        metadata = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][_METADATA])
        return _canonical(metadata["key"]), load(content)
    except Exception:  # a forger's hash may fit whatever stands there
        raise ValueError("it is no safetensors file with a key") from None
