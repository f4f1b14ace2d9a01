"""Draw the shards of a cache: in this process one after the other, or by several processes on one or several hosts.

Each worker draws whole shards and writes them itself with `write_shard`; nothing but their summaries comes back.
So a cache's bytes depend on neither the number of workers nor the engine that runs them, and a worker holds
two shards at most, however long the cache. While one shard is drawn, a thread writes the last one, hashes it and
sums up its statistics.
"""

from __future__ import annotations

import contextlib
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from refine_env._validation import check_choice, check_integer
from refine_env.errors import CacheError, ConfigurationError, describe_error, import_extra
from refine_env.trajectories.cache import tensor_shapes
from refine_env.trajectories.files import disk_errors
from refine_env.trajectories.manifest import Recipe, Span
from refine_env.trajectories.statistics import ShardSummary
from refine_env.trajectories.writer import fcntl, lease_name, write_shard

__all__ = ["ENGINES", "Chunk", "Sampler", "Source", "WorkerPool", "draw_shards"]

ENGINES = ("loky", "dask", "ray")
"""loky runs processes on this host; Dask and Ray on this host or on the hosts of a cluster that share a folder."""

EXTRA = "generate"
_POLL_SECONDS = 0.5
_IDLE_SECONDS = 5

Chunk = tuple[NDArray[np.float16], ...]
Sampler = Callable[[int, int, Callable[[float], None]], Iterator[Chunk]]
"""(start, stop, report) -> latents (n, T+1, …), clean estimates (n, T, …), and where the recipe has full runs
their x_0 (n, 1, …), of the trajectories start … stop − 1 in order, n at a time; ``report`` takes the share of work done
on the next n, in trajectories."""


class Source(Protocol):
    """What a worker needs to make its own sampler; it is pickled."""

    def open(self, recipe: Recipe, device: str) -> Sampler:
        """Make the sampler of a cache's recipe on a device."""


class _AbandonedError(RuntimeError):
    """The process that wanted the work is gone, or has given up."""


@dataclass(frozen=True, kw_only=True)
class WorkerPool:
    """The processes that draw a cache's shards.

    Args:
        devices: torch devices, all of one kind; worker k works on number k, modulo their number.
        workers: number of processes; default one for each device.
        engine: one of `ENGINES`.
        address: of a Dask scheduler or a Ray cluster that runs already; default one is started on this host.
    """

    devices: tuple[str, ...] = ("cpu",)
    workers: int | None = None
    engine: str = "loky"
    address: str | None = None

    def __post_init__(self) -> None:
        check_choice("engine", self.engine, ENGINES)
        if self.workers is not None:
            check_integer("workers", self.workers, 1, advice="One worker for each device is a good choice.")
            if self.workers < len(self.devices):
                raise ConfigurationError(
                    f"`workers` must be at least the number of devices, {len(self.devices)}, got {self.workers}. "
                    "Name fewer devices."
                )
        if not self.devices or len({device.partition(":")[0] for device in self.devices}) != 1:
            raise ConfigurationError(
                f"`device` must be one or more torch devices of one kind, got {list(self.devices)}. The last bits "
                "of the latents depend on the kind."
            )
        if self.address is not None and self.engine == "loky":
            raise ConfigurationError(
                f"`address` must be that of a cluster, got {self.address!r} for the engine 'loky', which has none. "
                "Choose the engine 'dask' or 'ray'."
            )
        if self.engine == "ray" and any(":" in device for device in self.devices):
            raise ConfigurationError(
                f"`device` must be without a number on Ray, which hands out the devices itself, got "
                f"{list(self.devices)}. Write for instance cuda, and give the number of workers."
            )

    @property
    def num_workers(self) -> int:
        """The number of workers."""
        return len(self.devices) if self.workers is None else self.workers

    @property
    def is_here(self) -> bool:
        """Whether the shards are drawn in this process."""
        return self.num_workers == 1 and self.engine == "loky"

    def draw_shards(
        self, source: Source, folder: Path, recipe: Recipe, spans: Sequence[Span], report: Callable[[float], None]
    ) -> list[ShardSummary]:
        """Draw and write shards; each of n workers takes every n-th.

        Args:
            source: what the workers make their samplers from.
            folder: the growing folder, which every host sees at the same path.
            recipe: the cache's recipe.
            spans: the shards.
            report: called with the number of trajectories written.

        Raises:
            CacheError: if a worker died, or what it raised itself.
            MissingExtraError: if the engine is not installed.
        """
        lanes = min(self.num_workers, len(spans))
        with _lease(folder) as lease, _engine(self, lanes) as run:
            shares = [
                _Share(
                    folder=folder,
                    recipe=recipe,
                    spans=tuple(spans[lane::lanes]),
                    source=source,
                    device=self.devices[lane % len(self.devices)],
                    lease=lease,
                    host=socket.gethostname(),
                    own_process=self.engine == "loky",
                )
                for lane in range(lanes)
            ]
            # The engine runs in a thread, so that this one sees an interrupt; the end of the lease ends the workers.
            with ThreadPoolExecutor(1) as thread:
                running = thread.submit(run, shares)
                try:
                    while not wait([running], timeout=_POLL_SECONDS).done:
                        report(sum(span.stop - span.start for span in spans if (folder / span.file).exists()))
                except BaseException:
                    with contextlib.suppress(OSError):
                        lease.unlink()
                    raise
                done = running.result()
        report(sum(span.stop - span.start for span in spans))
        for text, category in dict.fromkeys(told for _, warned in done for told in warned):
            warnings.warn(text, category, stacklevel=2)
        return [summary for summaries, _ in done for summary in summaries]


_Drawn = tuple[list[ShardSummary], list[tuple[str, type[Warning]]]]
"""The shards of a worker, and what it warned of, which is said where the pool was started."""


@dataclass(frozen=True, kw_only=True)
class _Share:
    """One worker's part of the work."""

    folder: Path
    recipe: Recipe
    spans: tuple[Span, ...]
    source: Source
    device: str
    lease: Path
    host: str
    own_process: bool

    def draw(self) -> _Drawn:
        """Draw and write the shards, as long as they are wanted."""
        try:
            self.check_wanted()
            sample = self.source.open(self.recipe, self.device)
            with warnings.catch_warnings(record=True) as told:
                drawn = draw_shards(sample, self.folder, self.recipe, self.spans, lambda _: self.check_wanted())
            return drawn, [(str(warning.message), warning.category) for warning in told]
        except _AbandonedError:
            if self.own_process:  # an orphan would wait for its parent forever, and keep its device
                os._exit(1)
            raise

    def check_wanted(self) -> None:
        if not _is_held(self.lease, on_this_host=self.host == socket.gethostname()):
            raise _AbandonedError(f"{self.folder} must be in the making by the process that began it, and is not.")


def draw_shards(
    sample: Sampler, folder: Path, recipe: Recipe, spans: Sequence[Span], report: Callable[[float], None]
) -> list[ShardSummary]:
    """Draw and write shards in this process.

    Args:
        sample: draws trajectories.
        folder: the growing folder.
        recipe: the cache's recipe.
        spans: the shards, in the order in which they are drawn.
        report: called with the trajectories drawn; a fraction within a chunk counts.

    Raises:
        CacheError: if a value is not finite, or the folder cannot be written.
    """
    done = 0
    summaries: list[ShardSummary] = []
    writing: Future[ShardSummary] | None = None

    def report_begun(begun: float) -> None:
        report(done + begun)

    with ThreadPoolExecutor(1) as thread:
        for span in spans:
            shard = {name: np.empty(shape, dtype=np.float16) for name, shape in tensor_shapes(span, recipe).items()}
            row = 0
            for chunk in sample(span.start, span.stop, report_begun):
                for name, values in zip(shard, chunk, strict=True):
                    check_values(name, values, span.start + row)
                    shard[name][row : row + len(values)] = values
                row += len(chunk[0])
                done += len(chunk[0])
                report(done)
            if writing is not None:
                summaries.append(writing.result())
            writing = thread.submit(write_shard, folder, recipe, span, shard)
        if writing is not None:
            summaries.append(writing.result())
    return summaries


def check_values(name: str, values: NDArray[np.float16], first: int) -> None:
    """Check a chunk (n, steps, …) of trajectories, the first of which has the index ``first``."""
    bad = (values.view(np.uint16) & np.uint16(0x7C00)) == 0x7C00  # all ones in the exponent: inf or nan
    if bad.any():
        where = np.unravel_index(int(bad.argmax()), bad.shape)
        raise CacheError(
            f"`{name}` of trajectory {first + int(where[0])} must be finite and within float16's ±65504, got "
            f"{values[where]} at t = {where[1]}. Check the model, its scheduler and number format (float32 "
            "is the safest), or the clean latents."
        )


_Run = Callable[[list[_Share]], list[_Drawn]]


@contextlib.contextmanager
def _engine(pool: WorkerPool, lanes: int) -> Iterator[_Run]:
    """Give a function that runs shares on the pool's engine, and shut down a cluster that was started for it."""
    joblib = import_extra("joblib", EXTRA)
    options: dict[str, Any] = {}
    own: dict[str, Any]
    where: dict[str, Any]
    with contextlib.ExitStack() as stack:
        if pool.engine == "loky":
            options["idle_worker_timeout"] = _IDLE_SECONDS  # a worker that has done its share frees its device soon
        elif pool.engine == "dask":
            distributed = import_extra("distributed", "dask")
            own = {"n_workers": lanes, "threads_per_worker": 1, "dashboard_address": None}
            where = own if pool.address is None else {"address": pool.address}
            with _cluster_errors(pool):
                options["client"] = stack.enter_context(distributed.Client(**where, set_as_default=False))
        else:
            ray = import_extra("ray", "ray")
            import_extra("ray.util.joblib", "ray").register_ray()
            if not ray.is_initialized():
                own = {"num_cpus": lanes, "include_dashboard": False}
                where = own if pool.address is None else {"address": pool.address}
                with _cluster_errors(pool):
                    ray.init(**where, log_to_driver=False)
                stack.callback(ray.shutdown)
            if pool.devices[0] != "cpu":
                options["ray_remote_args"] = {"num_gpus": 1}

        def run(shares: list[_Share]) -> list[_Drawn]:
            try:
                # The configuration is the thread's own.
                with joblib.parallel_config(pool.engine, n_jobs=len(shares), **options):
                    tasks = (joblib.delayed(share.draw)() for share in shares)
                    results: list[_Drawn] = joblib.Parallel(batch_size=1, pre_dispatch="all")(tasks)
                    return results
            except _lost_workers(pool.engine) as error:
                raise CacheError(
                    f"`workers` must live until their shards are written, got {type(error).__name__}. Use fewer where "
                    "memory is short, and run the same command again; what is written is kept."
                ) from error

        yield run


@contextlib.contextmanager
def _cluster_errors(pool: WorkerPool) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a cluster that does not answer raises what its network library raises
        raise ConfigurationError(
            f"`address` must be that of a running {pool.engine} cluster, got {pool.address!r} "
            f"({describe_error(error)}). Start the cluster first, or leave the address out."
        ) from error


def _lost_workers(engine: str) -> tuple[type[BaseException], ...]:
    """Return the exceptions by which an engine says that a worker died."""
    if engine == "loky":
        return (import_extra("joblib.externals.loky.process_executor", EXTRA).BrokenProcessPool,)
    if engine == "dask":
        return (import_extra("distributed", "dask").KilledWorker,)
    return (import_extra("ray.exceptions", "ray").RayActorError,)


@contextlib.contextmanager
def _lease(folder: Path) -> Iterator[Path]:
    """Keep a file that exists, and is locked, as long as this process waits for its workers."""
    file = folder / lease_name()
    with disk_errors(folder):
        descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
    try:
        if fcntl is not None:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield file
    finally:
        os.close(descriptor)
        file.unlink(missing_ok=True)


def _is_held(lease: Path, *, on_this_host: bool) -> bool:
    """Return whether the process that made a lease still lives, or on another host whether the lease still exists."""
    try:
        descriptor = os.open(lease, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        if fcntl is None or not on_this_host:  # not every network file system shows the locks of another host
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:  # it is locked, or there are no locks
            return True
        return False
    finally:
        os.close(descriptor)
