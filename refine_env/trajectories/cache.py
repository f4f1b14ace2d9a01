"""Read a trajectory cache: memory-mapped, one view per trajectory, nothing copied."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.resources
import mmap
import operator
import os
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache, partial
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from refine_env._validation import check_choice
from refine_env.errors import CacheError, CacheFormatError, ConfigurationError
from refine_env.model.decoding import DecoderCurve, DeviceObservation
from refine_env.model.distortion import SecondMoments
from refine_env.model.schedule import NoiseSchedule
from refine_env.trajectories.conditions import decode_conditions, decode_truth
from refine_env.trajectories.files import REMEDY, hash_file, open_file, parse_json, read_file, shorten
from refine_env.trajectories.manifest import (
    CONDITIONS_FILE,
    DECODED_PAYLOADS,
    MANIFEST_FILE,
    Manifest,
    Recipe,
    Span,
    sample_seed,
)
from refine_env.trajectories.statistics import ShardSummary, summarize, total_statistics

__all__ = ["SPLITS", "TrajectoryCache", "find_cache", "find_damage", "read_manifest"]

SPLITS = ("train", "test", "all")

STAGING_SUFFIX = ".partial"
"""Suffix of the folder, beside a cache's final place, in which the cache grows until it is complete."""

_NOISE_SIGNAL = 1e-9  # ᾱ of noise without signal, relative to that of the midpoint: a schedule stays above 0
_NOISE_STREAM = 1  # of a trajectory's seed
_MAX_OPEN_SHARDS = 256  # each map holds a file descriptor, and 1024 are a usual limit
_MAX_HEADER_BYTES = 1 << 20
_LONGEST_NAME = 4000
_ALPHA_BAR_TOLERANCE = 1e-4  # the models compute the product of a thousand factors in float32


class TrajectoryCache:
    """The trajectories of one model, schedule and set of prompts, in files.

    Open one with `TrajectoryCache.open`. Trajectories are numbered 0 … N−1. Every array is float16, "16 bits
    per dimension, lossless", and a read-only view into a memory-mapped file: opening a cache of 100 GB reads
    its manifest and the shards' headers. The object never changes; it pickles as its path, and each process
    maps the files for itself.

    Latents are in the model's own units (VAE scaling factor applied) and indexed by the step t: 0 is the
    clean latent, T only noise.

    Attributes:
        path: the folder, absolute.
        manifest: recipe, statistics and shards.
        sha256: SHA-256 of the manifest, which holds the hashes of all shards: identifies the cache.
        num_steps: T, the number of reverse diffusion steps.
        latent_shape: shape of one latent, (C, H, W).
        latent_dim: M, the dimensions of one latent.
        schedule: the noise schedule that the trajectories follow.
        mean_square: E‖x_t‖²/M over all trajectories, shape (T+1,), indexed by t.
        second_moments: G[t, t'] = E⟨x_t, x_t'⟩/M over the train split, shape (T+1, T+1).
        clean_second_moments: E⟨y_t, y_t'⟩/M of the clean-sample estimates over the train split, shape (T, T).
    """

    def __init__(self, path: Path, manifest: Manifest, sha256: str, offsets: tuple[tuple[int, ...], ...]) -> None:
        self.path: Final = path
        self.manifest: Final = manifest
        self.sha256: Final = sha256
        self.num_steps: Final = manifest.recipe.num_steps
        self.latent_shape: Final = manifest.recipe.latent_shape
        self.latent_dim: Final = manifest.recipe.latent_dim
        self.schedule: Final = manifest.recipe.schedule
        self.mean_square: Final = manifest.mean_square
        self.second_moments: Final = manifest.second_moments
        self.clean_second_moments: Final = manifest.clean_second_moments
        self._starts = [shard.start for shard in manifest.shards]
        # Views that are still in use keep the map of their shard alive when it is thrown out here. What maps a shard
        # does not refer to this object, so that all maps go with it at once, not with the next garbage collection.
        self._map = lru_cache(_MAX_OPEN_SHARDS)(partial(_map_shard, path, manifest, offsets))

    @classmethod
    def open(cls, cache: str | os.PathLike[str]) -> TrajectoryCache:
        """Open a cache and check its structure: the manifest, and each shard's size and header.

        The data are not read; `verify` does that.

        Args:
            cache: a folder, or a name, looked up as `find_cache` says. ``"default"`` is the bundled cache.

        Raises:
            CacheError: if there is no such cache, or it cannot be read.
            CacheFormatError: if a file is missing or does not match the manifest, or the manifest is not of
                this format version; the message names the file and the field.
        """
        folder = find_cache(cache)
        manifest, sha256 = read_manifest(folder)
        offsets = tuple(check_shard(folder, shard, manifest.recipe, num_bytes=shard.bytes) for shard in manifest.shards)
        return cls(folder, manifest, sha256, offsets)

    @property
    def midpoint(self) -> int | None:
        """m, the T of a cache whose trajectories start at midpoints of other runs; None where they start from noise."""
        return None if self.manifest.recipe.reuse is None else self.num_steps

    @property
    def has_full(self) -> bool:
        """Whether :meth:`full_latent` has something to give."""
        return self.manifest.recipe.has_full

    @cached_property
    def payload_schedule(self) -> NoiseSchedule:
        """ᾱ_t of the latents in :meth:`payload`: the schedule, and behind a midpoint that of noise, next to 0."""
        ab = self.schedule.alpha_bar
        return self.schedule if self.midpoint is None else NoiseSchedule([*ab, ab[-1] * _NOISE_SIGNAL])

    @cached_property
    def payload_moments(self) -> NDArray[np.float64]:
        """E⟨x_t, x_t'⟩/M of the latents in :meth:`payload`; noise is uncorrelated with what was generated without."""
        if self.midpoint is None:
            return self.second_moments
        moments = np.pad(self.second_moments, (0, 1))
        moments[-1, -1] = 1.0
        return moments

    def __len__(self) -> int:
        """The number of trajectories."""
        return self.manifest.recipe.num_trajectories

    def __repr__(self) -> str:
        recipe = self.manifest.recipe
        return (
            f"TrajectoryCache({str(self.path)!r}, {len(self)} trajectories, source={recipe.source!r}, "
            f"num_steps={recipe.num_steps}, latent_shape={recipe.latent_shape})"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.path), self.sha256)

    def __deepcopy__(self, memo: dict[int, Any]) -> TrajectoryCache:
        return self  # immutable

    @cached_property
    def mmse(self) -> NDArray[np.float64]:
        """E‖y_t − x_0‖²/M over the train split, shape (T+1,), indexed by t; y_T := 0.

        So mmse[T] = E‖x_0‖²/M, and mmse[0] = 0 as y_0 = x_0.
        """
        moments = self.clean_second_moments
        errors = np.append(np.diag(moments) - 2.0 * moments[0] + moments[0, 0], moments[0, 0])
        errors[0] = 0.0
        errors.setflags(write=False)
        return errors

    def device_observation(self, kind: str) -> DeviceObservation:
        """What a device holds of a payload, as a noisy observation of x_0.

        Of latents the signal is the noise schedule's, for which the network was made, and the power is measured on the
        train split; of clean estimates both are measured.

        Args:
            kind: the payload, as :meth:`payload` has it.

        Raises:
            ConfigurationError: if there is no such payload.
        """
        if check_choice("kind", kind, DECODED_PAYLOADS) == "latent":
            return DeviceObservation.of_latents(self.schedule, np.diag(self.second_moments))
        return DeviceObservation.of_moments(SecondMoments(np.pad(self.clean_second_moments, (0, 1))))  # y_T := 0

    def decoder_curve(self, kind: str) -> DecoderCurve:
        """What a device's decoder makes of what the device holds of a payload.

        Args:
            kind: the payload, as :meth:`payload` has it.

        Raises:
            ConfigurationError: if there is no such payload, or nobody has measured the decoder.
        """
        power = self.device_observation(kind).power
        record = self.manifest.decoder
        if record is None:
            raise ConfigurationError(
                f"`cache` must hold what its decoder was measured to do, got {self.path.name!r}, which does not. "
                f"Measure it with: refine-env decoder {self.path.name}"
            )
        return DecoderCurve(power, record.shares, record.held[kind], record.decoded[kind])

    def indices(self, split: str) -> NDArray[np.int64]:
        """Return the trajectories of a split, ``"train"``, ``"test"`` or ``"all"``: int64, ascending.

        Raises:
            ConfigurationError: if there is no such split.
        """
        recipe = self.manifest.recipe
        bounds = {
            "train": (0, recipe.num_train),
            "test": (recipe.num_train, len(self)),
            "all": (0, len(self)),
        }
        return np.arange(*bounds[check_choice("split", split, SPLITS)], dtype=np.int64)

    def latents(self, index: int) -> NDArray[np.float16]:
        """Return x_0 … x_T of a trajectory: float16 (T+1, C, H, W), indexed by t, a read-only view of the file.

        Raises:
            IndexError: if ``index`` is not in 0 … N−1.
        """
        shard, row = self._locate(index)
        view: NDArray[np.float16] = self._map(shard)[0][row]
        return view

    def clean_estimates(self, index: int) -> NDArray[np.float16]:
        """Return y_0 … y_{T−1} of a trajectory: float16 (T, C, H, W), indexed by t, a read-only view of the file.

        y_t = E[x_0 | x_{t+1}], what the server knew of the clean latent when it had computed x_t (diffusers'
        `pred_original_sample` of the step from x_{t+1} to x_t); y_0 = x_0 exactly.

        Raises:
            IndexError: if ``index`` is not in 0 … N−1.
        """
        shard, row = self._locate(index)
        view: NDArray[np.float16] = self._map(shard)[1][row]
        return view

    def full_latent(self, index: int) -> NDArray[np.float16]:
        """Return x_0 of the full run beside a trajectory that starts at a midpoint: float16 (C, H, W).

        Raises:
            IndexError: if ``index`` is not in 0 … N−1.
            ConfigurationError: if none was recorded.
        """
        shard, row = self._locate(index)
        if not self.manifest.recipe.has_full:
            raise ConfigurationError(
                f"`cache` must hold the x_0 of full runs, got {self.path.name!r}, which does not. Generate it from "
                "midpoints with --with-full."
            )
        view: NDArray[np.float16] = self._map(shard)[2][row, 0]
        return view

    def payload(self, index: int, kind: str) -> NDArray[np.float16]:
        """Return what the server sends, indexed by t: the latents, or with ``"posterior_mean"`` the clean estimates.

        Of latents the device starts with the last, x_T; clean estimates stop at t = T − 1, and it starts from 0.
        Trajectories that start at a midpoint x_m have no x_T. A device without the midpoint starts at t = m + 1, and
        there stands noise of the trajectory's seed, which says nothing of x_m.

        Raises:
            IndexError: if ``index`` is not in 0 … N−1.
            ConfigurationError: if there is no such payload.
        """
        kinds = {"latent": self.latents, "posterior_mean": self.clean_estimates}
        sent = kinds[check_choice("kind", kind, tuple(kinds))](index)
        if self.midpoint is None or kind != "latent":
            return sent
        noise = np.random.default_rng([self.seed(index), _NOISE_STREAM]).standard_normal(self.latent_shape)
        return np.concatenate([sent, noise.astype(np.float16)[None]])

    def initial(self, index: int, kind: str) -> NDArray[np.float16]:
        """Return what the device starts with: x_T, which both ends share, or with ``"posterior_mean"`` the mean, 0.

        Of trajectories that start at a midpoint x_m it is that, which a device that has it starts with.

        Returns:
            float16 (C, H, W).

        Raises:
            IndexError, ConfigurationError: as :meth:`payload`.
        """
        payload = self.payload(index, kind)
        return payload[self.num_steps] if len(payload) > self.num_steps else np.zeros_like(payload[0])

    def prompt(self, index: int) -> str | None:
        """Return the prompt of a trajectory, or None where the source has none.

        Raises:
            IndexError: if ``index`` is not in 0 … N−1.
        """
        return self.manifest.recipe.trajectories[self._index(index)].prompt

    def seed(self, index: int) -> int:
        """Return the seed that all draws of a trajectory come from.

        For a ``diffusers`` cache, `torch.Generator().manual_seed(cache.seed(i))` handed to the pipeline draws
        the same noise.

        Raises:
            IndexError: if ``index`` is not in 0 … N−1.
        """
        return self.manifest.recipe.trajectories[self._index(index)].seed

    @cached_property
    def conditions(self) -> NDArray[Any] | None:
        """The images that the network saw beside the latents: (N, C, H, W) in [0, 1]; None where it saw none.

        Raises:
            CacheError: if their file is missing, or another than the manifest has.
        """
        recipe = self.manifest.recipe
        if recipe.conditions is None:
            return None
        values: NDArray[Any] = decode_conditions(_read_conditions(self.path, recipe.conditions["file_sha256"]))[0]
        values.setflags(write=False)
        return values

    @cached_property
    def truth(self) -> NDArray[np.uint8] | None:
        """What the model ought to have given under each condition, gray levels as bytes (N, height, width).

        None where that is not known.

        Raises:
            CacheError: as :attr:`conditions`.
        """
        recipe = self.manifest.recipe
        if recipe.conditions is None:
            return None
        values = decode_truth(_read_conditions(self.path, recipe.conditions["file_sha256"]))
        if values is not None:
            values.setflags(write=False)
        return values

    def verify(self, progress: Callable[[int, int], None] | None = None, *, deep: bool = False) -> None:
        """Read every shard and compare it with its hash.

        Args:
            progress: called with the bytes read so far and their total.
            deep: recompute from the shards what the manifest says of them, too; see `find_damage`.

        Raises:
            CacheFormatError: naming every damaged shard, and every field that does not fit the shards.
        """
        damage = find_damage(self.path, self.manifest, progress, deep=deep)
        if damage:
            raise CacheFormatError(
                f"{self.path} must hold the shards its manifest lists, got {'; '.join(damage)}. Restore "
                "these files, or generate the cache again with --overwrite."
            )

    def _index(self, index: int) -> int:
        number = operator.index(index)
        if not 0 <= number < len(self):
            raise IndexError(
                f"`index` must be in 0 … {len(self) - 1}, got {number}. The cache {self.path.name!r} holds "
                f"{len(self)} trajectories."
            )
        return number

    def _locate(self, index: int) -> tuple[int, int]:
        number = self._index(index)
        shard = bisect_right(self._starts, number) - 1
        return shard, number - self._starts[shard]


def _map_shard(
    folder: Path, manifest: Manifest, offsets: Sequence[tuple[int, ...]], number: int
) -> tuple[NDArray[np.float16], ...]:
    """Map the tensors of a shard: the latents, the clean estimates, and x_0 of the full runs where it has them."""
    shard = manifest.shards[number]
    file = folder / shard.file
    with open_file(file) as handle:
        buffer = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    if len(buffer) != shard.bytes:
        raise CacheFormatError(
            f"{file} must have {shard.bytes} bytes, got {len(buffer)}. It changed since the cache was "
            "opened; open it again."
        )
    return tuple(
        np.frombuffer(buffer, dtype="<f2", count=prod(shape), offset=offset).reshape(shape)
        for offset, shape in zip(offsets[number], tensor_shapes(shard, manifest.recipe).values(), strict=True)
    )


def _read_conditions(folder: Path, sha256: str) -> bytes:
    """Read the file of conditions in a cache's folder.

    Raises:
        CacheError: if it cannot be read.
        CacheFormatError: if it is missing, or has another hash.
    """
    file = folder / CONDITIONS_FILE
    with open_file(file) as handle:
        content = handle.read()
    if (digest := hashlib.sha256(content).hexdigest()) != sha256:
        raise CacheFormatError(f"{file} must have SHA-256 {shorten(sha256)}, got {digest}. {REMEDY}")
    return content


def find_cache(cache: str | os.PathLike[str]) -> Path:
    """Find the folder of a cache.

    Looked up in this order: the folder ``cache`` itself, where it holds a manifest; then, for a bare name,
    `cached_trajectories/<name>` of the clone that the package runs from, of the current directory, and of the
    installed package.

    Raises:
        CacheError: if it is nowhere; the message says where it was looked for.
    """
    if not isinstance(cache, (str, os.PathLike)) or len(os.fspath(cache)) > _LONGEST_NAME:
        raise CacheError(
            f"`cache` must be the name or the folder of a trajectory cache, got {cache!r:.60}. Give a text or a path."
        )
    path = Path(cache)
    candidates = [path]
    if path.name == os.fspath(cache) and path.name not in ("", ".", ".."):
        package = Path(str(importlib.resources.files("refine_env")))
        if (package.parent / "pyproject.toml").is_file():
            candidates.append(package.parent / "cached_trajectories" / path)
        candidates.append(Path.cwd() / "cached_trajectories" / path)
        candidates.append(package / "cached_trajectories" / path)
    for candidate in candidates:
        if _is_file(candidate / MANIFEST_FILE):
            return candidate.resolve()
    unfinished = path.with_name(path.name + STAGING_SUFFIX) if path.name else path
    if _is_file(unfinished / "generation.json"):
        raise CacheError(
            f"`cache` must be a finished trajectory cache, got {os.fspath(cache)!r}, whose generation was "
            "interrupted. Run the same `refine-env generate` command again to finish it."
        )
    looked = ", ".join(dict.fromkeys(str(candidate) for candidate in candidates))
    raise CacheError(
        f"`cache` must be the name or the folder of a trajectory cache, got {os.fspath(cache)!r} (no "
        f"{MANIFEST_FILE} in: {looked}). Make one with `refine-env generate gaussian --out FOLDER`, or see "
        "`refine-env generate --help`."
    )


def _is_file(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):  # a name that no file can have
        return path.is_file()
    return False


def read_manifest(folder: Path) -> tuple[Manifest, str]:
    """Read the manifest in a folder; return it with the SHA-256 of its bytes.

    Raises:
        CacheError: if it cannot be read.
        CacheFormatError: if it is not a manifest of this format version.
    """
    file = folder / MANIFEST_FILE
    raw = read_file(file)
    read = _read_again if len(raw) <= _KEPT_BYTES else Manifest.from_bytes
    return read(raw, str(file)), hashlib.sha256(raw).hexdigest()


# Environments open their cache one by one, and the same bytes are the same manifest, which nothing changes.
_KEPT_BYTES = 1 << 20
_read_again = functools.lru_cache(maxsize=8)(Manifest.from_bytes)


def find_damage(
    folder: Path, manifest: Manifest, progress: Callable[[int, int], None] | None = None, *, deep: bool = False
) -> list[str]:
    """Read every shard; return a sentence for each that is missing, of another structure, or of another hash.

    Args:
        folder: the cache's folder.
        manifest: its manifest.
        progress: called with the bytes read so far and their total.
        deep: if all shards are whole, compare the manifest's fields with what can be computed again: the
            statistics from the shards, to the bit (all others, such as `TrajectoryCache.mmse`, are computed
            from these when they are asked for); the seeds from the base seed; and ᾱ, within the rounding of a
            float32, from a scheduler whose β are linear or scaled-linear. One sentence for each that differs.
    """
    recipe = manifest.recipe
    damage = []
    summaries = []
    total = sum(shard.bytes for shard in manifest.shards)
    done = 0
    for shard in manifest.shards:
        try:
            check_shard(folder, shard, recipe, num_bytes=shard.bytes)
            digest = hash_file(folder / shard.file)
            if digest != shard.sha256:
                damage.append(f"{folder / shard.file} must have SHA-256 {shorten(shard.sha256)}, got {digest}")
            elif deep:
                with np.errstate(over="ignore", invalid="ignore"):  # values that are not finite show in the sums
                    summaries.append(summarize_shard(folder, recipe, shard, sha256=digest))
        except CacheError as error:
            damage.append(str(error).removesuffix(f" {REMEDY}"))
        done += shard.bytes
        if progress is not None:
            progress(done, total)
    if recipe.conditions is not None:
        try:
            _read_conditions(folder, recipe.conditions["file_sha256"])
        except CacheError as error:
            damage.append(str(error).removesuffix(f" {REMEDY}"))
    if deep and not damage:
        damage = _find_wrong_fields(manifest, summaries, str(folder / MANIFEST_FILE))
    return damage


def _find_wrong_fields(manifest: Manifest, summaries: Sequence[ShardSummary], where: str) -> list[str]:
    recipe = manifest.recipe
    names = ("mean_square", "second_moments", "clean_second_moments")
    wrong = [
        f"`{name}` in {where} must be that of the shards, got another (the greatest difference is "
        f"{np.abs(getattr(manifest, name) - values).max():.3g})"
        for name, values in zip(names, total_statistics(recipe, summaries), strict=True)
        if not np.array_equal(getattr(manifest, name), values)
    ]
    for index, trajectory in enumerate(recipe.trajectories):
        seed = sample_seed(recipe.seed, index)
        if trajectory.seed != seed:
            wrong.append(
                f"`trajectories[{index}].seed` in {where} must be {seed}, which follows from the base seed "
                f"{shorten(recipe.seed)}, got {shorten(trajectory.seed)}"
            )
            break
    alpha_bar = recipe.scheduler_alpha_bar()
    if alpha_bar is not None and not np.allclose(recipe.alpha_bar, alpha_bar, rtol=_ALPHA_BAR_TOLERANCE, atol=0.0):
        wrong.append(f"`alpha_bar` in {where} must be that of the scheduler's β at its timesteps, got another")
    return wrong


def summarize_shard(folder: Path, recipe: Recipe, span: Span, *, sha256: str | None = None) -> ShardSummary:
    """Compute the sums over a shard from its file.

    Args:
        folder: the cache's folder.
        recipe: its recipe.
        span: the place of the shard in the cache.
        sha256: the hash of the shard's file, where it is known.

    Raises:
        CacheError: if the file is missing or damaged.
    """
    file = folder / span.file
    offsets = check_shard(folder, span, recipe)
    tensors = {
        name: np.memmap(file, dtype="<f2", mode="r", offset=offset, shape=shape)
        for offset, (name, shape) in zip(offsets, tensor_shapes(span, recipe).items(), strict=True)
    }
    return summarize(recipe, span, tensors, size=file.stat().st_size, sha256=sha256 or hash_file(file))


def tensor_shapes(span: Span, recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a shard's tensors, all float16; x_0 of the full runs where it has them."""
    count, steps, latent = span.stop - span.start, recipe.num_steps, recipe.latent_shape
    full = {"full_latents": (count, 1, *latent)} if recipe.has_full else {}
    return {"latents": (count, steps + 1, *latent), "clean_estimates": (count, steps, *latent), **full}


def check_shard(folder: Path, span: Span, recipe: Recipe, *, num_bytes: int | None = None) -> tuple[int, ...]:
    """Check a shard's size and safetensors header, without reading its data.

    A safetensors file is the header's length (8 bytes, little-endian), a JSON header, and the tensors' bytes,
    at the offsets that the header gives.

    Args:
        folder: the cache's folder.
        span: the place of the shard in the cache.
        recipe: the recipe of the cache, which says what the shard must hold.
        num_bytes: the size that the file must have, where it is known.

    Returns:
        Where in the file the tensors begin [bytes], in the order of `tensor_shapes`.

    Raises:
        CacheFormatError: if something does not match, by name.
        CacheError: if the file cannot be read.
    """
    file = folder / span.file
    with open_file(file) as handle:
        size = os.fstat(handle.fileno()).st_size
        if num_bytes is not None and size != num_bytes:
            raise CacheFormatError(f"{file} must have {num_bytes} bytes, got {size}. {REMEDY}")
        length = int.from_bytes(handle.read(8), "little")
        raw = handle.read(length) if length <= min(size - 8, _MAX_HEADER_BYTES) else b""
    header = parse_json(raw, f"The safetensors header of {file}")
    begin = []
    for name, shape in tensor_shapes(span, recipe).items():
        if name not in header:
            raise CacheFormatError(f"{file} must hold a tensor `{name}`, got {shorten(sorted(header))}. {REMEDY}")
        expected = {"dtype": "F16", "shape": list(shape)}
        for key, value in expected.items():
            stored = header[name].get(key) if isinstance(header[name], dict) else None
            if stored != value:
                raise CacheFormatError(
                    f"`{name}` in {file} must have the {key} {value}, got {shorten(stored)}. {REMEDY}"
                )
        offsets = header[name].get("data_offsets")
        if (
            not isinstance(offsets, list)
            or [type(offset) for offset in offsets] != [int, int]
            or offsets[0] < 0
            or offsets[1] != offsets[0] + 2 * prod(shape)
            or 8 + length + offsets[1] > size
        ):
            raise CacheFormatError(
                f"`{name}` in {file} must lie within the file's {size} bytes, got offsets {shorten(offsets)}. {REMEDY}"
            )
        begin.append(8 + length + offsets[0])
    return tuple(begin)


def _reopen(path: str, sha256: str) -> TrajectoryCache:
    cache = TrajectoryCache.open(path)
    if cache.sha256 != sha256:
        raise CacheError(
            f"{path} must be the cache that was pickled (manifest SHA-256 {sha256}), got {cache.sha256}. It "
            "was generated anew since; pickle again."
        )
    return cache
