"""Write a trajectory cache: atomically, and so that an interrupted generation goes on where it stopped.

A cache grows in a folder of its own, `<name>.partial` beside its final place, and is renamed into place when
complete: at any moment `<name>` is either absent, or the old cache, or the new one. Each file appears whole
or not at all (temporary file, fsync, rename). `generation.json` in the growing folder is the recipe; only the
same recipe can go on with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType, TracebackType

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from refine_env._files import sync_file, sync_folder
from refine_env.errors import CacheError, CacheFormatError
from refine_env.trajectories.cache import (
    STAGING_SUFFIX,
    TrajectoryCache,
    check_shard,
    read_manifest,
    summarize_shard,
    tensor_shapes,
)
from refine_env.trajectories.files import disk_errors, read_file
from refine_env.trajectories.manifest import (
    CONDITIONS_FILE,
    MANIFEST_FILE,
    Manifest,
    Recipe,
    Span,
    is_cache_file,
    is_shard_file,
)
from refine_env.trajectories.statistics import ShardSummary, summarize, total_statistics

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # no such locks here: two writers at once are the user's to avoid, orphaned workers go on
    fcntl = None

__all__ = ["CacheWriter", "lease_name", "write_shard"]

RECIPE_FILE = "generation.json"
RETIRED_SUFFIX = ".replaced"
"""Suffix of the folder to which an old cache is moved for the instant in which the new one takes its place."""

_TEMPORARY_SUFFIX = ".tmp"
_TEMPORARY_NAME = re.compile(r"(?P<name>.+)\.[0-9a-f]{8}\.tmp")
_LEASE_NAME = re.compile(r"workers-[0-9a-f]{16}\.lease")


class CacheWriter:
    """One cache in the making; a context manager that holds a lock on the growing folder.

    Args:
        path: folder of the finished cache.
        recipe: what determines the cache's samples.
        overwrite: replace a finished cache that stands there; it stays whole until the new one is complete.
        conditions: the content of the file of conditions, where the recipe has some.

    Raises:
        CacheError: if ``path`` holds a finished cache of another recipe (and not ``overwrite``), or files
            that are no cache's; if an interrupted generation of another recipe is there; if another process
            is writing it; if the folder cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        recipe: Recipe,
        *,
        overwrite: bool = False,
        conditions: bytes | None = None,
    ) -> None:
        self._conditions = conditions
        self.path = Path(path).resolve()
        self.recipe = recipe
        self.staging = self.path.parent / (self.path.name + STAGING_SUFFIX)
        self._retired = self.path.parent / (self.path.name + RETIRED_SUFFIX)
        self._lock: int | None = None
        self._owner = False
        self._summaries: dict[str, ShardSummary] = {}
        if not self.path.name or self.path.suffix in (STAGING_SUFFIX, RETIRED_SUFFIX):
            raise CacheError(
                f"`path` must name a folder, and not end in {STAGING_SUFFIX} or {RETIRED_SUFFIX}, which are "
                f"for caches in the making, got {os.fspath(path)!r}. Choose another name."
            )
        try:
            with disk_errors(self.path):
                self._acquire()
                self._restore()
                self.finished = self._is_finished(overwrite)
                if not self.finished:
                    self._begin()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock. What was written stays, for a later writer of the same recipe."""
        if self._owner and self._holds_staging():
            with contextlib.suppress(OSError):
                if not any(is_shard_file(entry.name) for entry in self.staging.iterdir()):
                    (self.staging / RECIPE_FILE).unlink(missing_ok=True)  # a generation that never got anywhere
                self.staging.rmdir()  # goes only if it is empty
        self._owner = False
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def missing(self) -> list[Span]:
        """Return the shards that are still to be written, in order."""
        return [] if self.finished else [span for span in self.recipe.spans if not self._is_written(span)]

    def add(self, summary: ShardSummary) -> None:
        """Take note of a shard that `write_shard` wrote, so that `finish` need not read it."""
        self._summaries[summary.shard.file] = summary

    def finish(self, progress: Callable[[int, int], None] | None = None) -> TrajectoryCache:
        """Compute the statistics, write the manifest and put the cache in its place.

        The statistics are the sums of those of the shards, in their order, so they do not depend on who wrote
        which shard when. Shards that another run wrote are read for them.

        Args:
            progress: called with the trajectories read so far and their number.

        Returns:
            The cache, opened.

        Raises:
            CacheError: if the folder cannot be written.
            CacheFormatError: if a shard is missing or damaged.
        """
        if not self.finished:
            manifest = self._summarize(progress)
            with disk_errors(self.staging):
                if self._conditions is not None:
                    _replace(self.staging / CONDITIONS_FILE, self._conditions)
                _replace(self.staging / MANIFEST_FILE, manifest.to_bytes())
                self._publish()
            self.finished = True
            self._owner = False  # a growing folder of that name is from now on another writer's
            self.close()
        return TrajectoryCache.open(self.path)

    def _acquire(self) -> None:
        """Make the growing folder and lock it; the lock goes with the folder when that is renamed into place."""
        while not self._owner:
            self.staging.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another writer removed it, or put it in its place
                if fcntl is not None:
                    self._lock = os.open(self.staging, os.O_RDONLY)
                    self._lock_folder(self._lock)
                self._owner = self._holds_staging()
            if not self._owner:
                self.close()
        if fcntl is not None and self.path.is_dir():  # a writer that publishes holds the lock of what is in place
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                self._lock_folder(descriptor)
            finally:
                os.close(descriptor)

    def _lock_folder(self, descriptor: int) -> None:
        assert fcntl is not None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CacheError(
                f"{self.path} must be written by one process at a time, got another one that is writing it. "
                "Wait for it to end, or choose another folder."
            ) from None
        except OSError:  # a file system without locks
            pass

    def _holds_staging(self) -> bool:
        """Return whether the growing folder is the one that this writer holds open, not a later one of that name."""
        if self._lock is None:
            return fcntl is None
        try:
            return os.path.samestat(os.fstat(self._lock), self.staging.stat())
        except FileNotFoundError:
            return False

    def _restore(self) -> None:
        """Undo or complete a replacement that was interrupted between its renames."""
        if self._retired.is_dir():
            if self.path.exists():
                _remove_cache(self._retired)
            elif (self._retired / MANIFEST_FILE).is_file():
                os.rename(self._retired, self.path)

    def _is_finished(self, overwrite: bool) -> bool:
        """Return whether the finished cache exists; raise if ``path`` holds something that must not be replaced."""
        if not self.path.exists():
            return False
        if not self.path.is_dir():
            raise CacheError(f"`path` must be a folder, got the file {self.path}. Choose another place.")
        if (self.path / MANIFEST_FILE).is_file() and not overwrite:
            try:
                manifest, _ = read_manifest(self.path)
                differences = manifest.recipe.differences(self.recipe)
            except CacheFormatError as error:
                differences = [f"an unreadable manifest ({error})"]
            if differences:
                raise CacheError(
                    f"{self.path} must not be replaced unasked, got a request that differs from the finished "
                    f"cache there: {_listed(differences)}. Choose another folder, or replace the cache with "
                    "--overwrite (overwrite=True)."
                )
            return True
        foreign = [entry.name for entry in sorted(self.path.iterdir()) if not is_cache_file(entry.name)]
        if foreign:
            raise CacheError(
                f"`path` must be a new folder or hold nothing but a cache, got {self.path} with "
                f"{foreign[0]!r} in it. Choose another folder, or move that file away."
            )
        if any(self.path.iterdir()) and not overwrite:
            raise CacheError(
                f"`path` must be a new folder, got {self.path} with shards but no {MANIFEST_FILE}. Choose "
                "another folder, or replace it with --overwrite (overwrite=True)."
            )
        return False

    def _begin(self) -> None:
        """Claim the growing folder for this recipe, or go on with it."""
        names = sorted(entry.name for entry in self.staging.iterdir())
        for name in names:
            finished_name = _without_suffix(name)
            if finished_name != RECIPE_FILE and not is_cache_file(finished_name) and not _LEASE_NAME.fullmatch(name):
                raise CacheError(
                    f"{self.staging} must hold nothing but an interrupted generation, got {name!r}. Move "
                    "that file away, or choose another folder."
                )
        names = [name for name in names if not _LEASE_NAME.fullmatch(name)]
        recorded = next((name for name in (RECIPE_FILE, MANIFEST_FILE) if name in names), None)
        if recorded is None:
            shards = [name for name in names if not name.endswith(_TEMPORARY_SUFFIX)]
            if shards:
                raise CacheError(
                    f"{self.staging} must hold {RECIPE_FILE}, got {shards[0]!r} without it. Delete that folder."
                )
            _replace(self.staging / RECIPE_FILE, self.recipe.to_bytes())
        else:
            file = self.staging / recorded
            differences = Recipe.from_bytes(read_file(file), str(file)).differences(self.recipe)
            if differences and not any(is_shard_file(name) for name in names):
                _replace(self.staging / RECIPE_FILE, self.recipe.to_bytes())  # nothing is lost
            elif differences:
                raise CacheError(
                    f"{self.path} must be generated with the arguments that its interrupted generation began "
                    f"with, got {_listed(differences)}. Repeat those arguments, or delete {self.staging} to "
                    "begin anew."
                )
        self._clear()

    def _clear(self) -> None:
        """Remove the temporary files and leases of interrupted writers; their workers miss the lease, and stop."""
        for entry in self.staging.iterdir():
            if entry.name.endswith(_TEMPORARY_SUFFIX) or _LEASE_NAME.fullmatch(entry.name):
                entry.unlink(missing_ok=True)

    def _is_written(self, span: Span) -> bool:
        try:
            check_shard(self.staging, span, self.recipe)
        except CacheFormatError:
            return False
        return True

    def _summarize(self, progress: Callable[[int, int], None] | None) -> Manifest:
        recipe = self.recipe
        summaries = []
        with disk_errors(self.staging):
            for span in recipe.spans:
                check_shard(self.staging, span, recipe)
                summaries.append(self._summaries.get(span.file) or summarize_shard(self.staging, recipe, span))
                if progress is not None:
                    progress(span.stop, recipe.num_trajectories)
        mean_square, second_moments, clean_second_moments = total_statistics(recipe, summaries)
        return Manifest(
            recipe=recipe,
            mean_square=mean_square,
            second_moments=second_moments,
            clean_second_moments=clean_second_moments,
            shards=tuple(summary.shard for summary in summaries),
        )

    def _publish(self) -> None:
        """Rename the complete folder into place; the next writer repairs a kill between any two lines."""
        (self.staging / RECIPE_FILE).unlink(missing_ok=True)
        self._clear()
        sync_folder(self.staging)
        if (self.path / MANIFEST_FILE).is_file():
            os.rename(self.path, self._retired)
        elif self.path.exists():
            _remove_cache(self.path)
        os.rename(self.staging, self.path)
        sync_folder(self.path.parent)
        if self._retired.is_dir():
            _remove_cache(self._retired)


def write_shard(folder: Path, recipe: Recipe, span: Span, tensors: Mapping[str, NDArray[np.float16]]) -> ShardSummary:
    """Write one shard into a growing cache, whole or not at all.

    It needs nothing but the folder, so any process may write any shard.

    Args:
        folder: the growing folder.
        recipe: the recipe of the cache.
        span: the place of the shard in the cache.
        tensors: its ``latents``, float16 (n, T+1, C, H, W), n = span.stop − span.start, indexed by t; and its
            ``clean_estimates``, float16 (n, T, C, H, W).

    Returns:
        What the manifest will say of it, for `CacheWriter.add`.

    Raises:
        CacheError: if the folder cannot be written.
        CacheFormatError: if an array is not of that form.
    """
    for name, shape in tensor_shapes(span, recipe).items():
        if tensors[name].dtype != np.float16 or tensors[name].shape != shape:
            raise CacheFormatError(
                f"`{name}` must be float16 of shape {shape}, got {tensors[name].dtype} of shape "
                f"{tensors[name].shape}. Give every trajectory of the shard."
            )
    content = save({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()})
    with disk_errors(folder):
        _replace(folder / span.file, content)
    return summarize(recipe, span, tensors, size=len(content), sha256=hashlib.sha256(content).hexdigest())


def lease_name() -> str:
    """Make a new name for a lease, the file by which workers see whether their work is still awaited."""
    return f"workers-{secrets.token_hex(8)}.lease"


def _listed(differences: list[str]) -> str:
    """List the first three differences, for a message."""
    return "; ".join(differences[:3] + (["…"] if len(differences) > 3 else []))


def _without_suffix(name: str) -> str:
    """Return the name of the file that a temporary one was to become, and any other name as it is."""
    found = _TEMPORARY_NAME.fullmatch(name)
    return found["name"] if found else name.removesuffix(_TEMPORARY_SUFFIX)


def _replace(file: Path, content: bytes) -> None:
    # A name of its own: the worker of an interrupted run may be about to write the same shard.
    temporary = file.with_name(f"{file.name}.{secrets.token_hex(4)}{_TEMPORARY_SUFFIX}")
    temporary.write_bytes(content)
    sync_file(temporary)
    os.replace(temporary, file)
    sync_folder(file.parent)


def _remove_cache(folder: Path) -> None:
    """Delete a cache's own files, the manifest first, and then the folder; anything else in it stays."""
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name != MANIFEST_FILE):
        if is_cache_file(entry.name):
            entry.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()
