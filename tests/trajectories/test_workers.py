"""Shards drawn by several processes: the same bytes as by one, however they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refine_env import CacheError, ConfigurationError, MissingExtraError, TrajectoryCache
from refine_env.trajectories import Recipe, generate_diffusers, workers
from refine_env.trajectories.manifest import Trajectory
from refine_env.trajectories.workers import Chunk, WorkerPool, draw_shards
from refine_env.trajectories.writer import CacheWriter

from .test_writer import content, kill_after

ROOT = Path(__file__).parents[2]
DEVICES = ("cpu",)


def make_recipe(count: int = 7, shape: tuple[int, ...] = (1, 2, 3), steps: int = 2) -> Recipe:
    return Recipe(
        source="diffusers",
        alpha_bar=tuple(np.linspace(1.0, 0.1, steps + 1)),
        latent_shape=shape,
        trajectories=tuple(Trajectory(prompt=None, seed=seed) for seed in range(count)),
        num_train=max(1, count // 2),
        shard_size=2,
        seed=0,
        clean_estimates="denoiser",
        units="none",
        generator={},
    )


@dataclass(frozen=True)
class Noise:
    """Draws noise; may fail, die or take its time at a trajectory."""

    fail_at: int | None = None
    die_at: int | None = None
    seconds: float = 0.0
    log: Path | None = None
    meet: int = 1  # processes that must have begun before the first of them goes on

    def open(self, recipe: Recipe, device: str) -> workers.Sampler:
        return partial(self.sample, recipe, device)

    def sample(
        self, recipe: Recipe, device: str, start: int, stop: int, report: Callable[[float], None]
    ) -> Iterator[Chunk]:
        for trajectory in recipe.trajectories[start:stop]:
            if self.log is not None:
                (self.log / f"{trajectory.seed}-{os.getpid()}-{device.replace(':', '.')}").touch()
                guard = time.monotonic() + 60
                while len({entry.name.split("-")[1] for entry in self.log.iterdir()}) < self.meet:
                    assert time.monotonic() < guard, "the others did not begin"
                    time.sleep(0.01)
            report(0.5)
            time.sleep(self.seconds)
            if trajectory.seed == self.fail_at:
                raise CacheError("it must go well, and does not")
            if trajectory.seed == self.die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            rng = np.random.default_rng(trajectory.seed)
            shape = (1, recipe.num_steps + 1, *recipe.latent_shape)
            latents = rng.standard_normal(shape).astype(np.float16)
            yield latents, latents[:, :-1]


def draw(path: Path, recipe: Recipe, pool: WorkerPool, source: Noise, report: Callable[[float], None] = float) -> Path:
    with CacheWriter(path, recipe) as writer:
        if pool.is_here:
            sample = source.open(recipe, pool.devices[0])
            summaries = draw_shards(sample, writer.staging, recipe, writer.missing(), report)
        else:
            summaries = pool.draw_shards(source, writer.staging, recipe, writer.missing(), report)
        for summary in summaries:
            writer.add(summary)
        return writer.finish().path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return content(draw(tmp_path_factory.mktemp("whole") / "cache", make_recipe(), WorkerPool(), Noise()))


@pytest.mark.parametrize("number", [2, 3, 9])
def test_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path, whole: dict[str, bytes], number: int) -> None:
    log = tmp_path / "log"
    log.mkdir()
    reports: list[float] = []
    pool = WorkerPool(devices=("cpu:0", "cpu:1"), workers=number)
    path = draw(tmp_path / "cache", make_recipe(), pool, Noise(log=log, meet=min(number, 4)), reports.append)
    assert content(path) == whole
    assert {entry.name for entry in tmp_path.iterdir()} == {"cache", "log"}
    drawn = [entry.name.split("-") for entry in log.iterdir()]
    assert sorted(int(seed) for seed, _, _ in drawn) == list(range(7))  # each of them once
    assert len({process for _, process, _ in drawn} - {str(os.getpid())}) == min(number, 4)  # there are four shards
    assert {device for _, _, device in drawn} == {"cpu.0", "cpu.1"}
    assert reports == sorted(reports)
    assert reports[-1] == 7


def test_statistics_are_those_of_the_files(tmp_path: Path, whole: dict[str, bytes]) -> None:
    """Those of a run that was interrupted are read from its shards: the same bits."""
    recipe = make_recipe()
    with CacheWriter(tmp_path / "cache", recipe) as writer:
        draw_shards(Noise().open(recipe, "cpu"), writer.staging, recipe, writer.missing(), float)
    with CacheWriter(tmp_path / "cache", recipe) as writer:
        assert writer.missing() == []
        assert content(writer.finish().path) == whole


def test_an_error_of_a_worker_is_the_caller_s(tmp_path: Path, whole: dict[str, bytes]) -> None:
    with pytest.raises(CacheError, match="it must go well, and does not"):
        draw(tmp_path / "cache", make_recipe(), WorkerPool(workers=2), Noise(fail_at=5))
    assert content(draw(tmp_path / "cache", make_recipe(), WorkerPool(workers=2), Noise())) == whole


def test_a_worker_that_dies(tmp_path: Path, whole: dict[str, bytes]) -> None:
    with pytest.raises(CacheError, match=r"`workers` must live until .*TerminatedWorkerError.* run the same command"):
        draw(tmp_path / "cache", make_recipe(), WorkerPool(workers=2), Noise(die_at=5))
    assert not (tmp_path / "cache").exists()
    assert content(draw(tmp_path / "cache", make_recipe(), WorkerPool(workers=3), Noise())) == whole


def test_an_interrupt_ends_the_workers(tmp_path: Path, whole: dict[str, bytes]) -> None:
    def interrupt(done: float) -> None:
        if done >= 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        draw(tmp_path / "cache", make_recipe(400), WorkerPool(workers=2), Noise(seconds=0.05), interrupt)
    assert 1 <= len(list((tmp_path / "cache.partial").glob("*.safetensors"))) < 200


def test_killed_with_its_workers_at_work(tmp_path: Path) -> None:
    """Its orphans see it and stop; whoever goes on at once, with them still alive, ends in the same bytes."""
    count = 60
    code = (
        "from tests.trajectories.test_workers import *\n"
        f"noise = Noise(seconds=0.1, log=Path({str(tmp_path / 'log')!r}))\n"
        f"draw(Path({str(tmp_path / 'cache')!r}), make_recipe({count}), WorkerPool(workers=2), noise)"
    )
    (tmp_path / "log").mkdir()
    written = kill_after(4, code, tmp_path / "cache.partial")
    assert 4 <= len(written) < count // 2
    path = draw(tmp_path / "cache", make_recipe(count), WorkerPool(), Noise())
    expected = draw(tmp_path / "expected", make_recipe(count), WorkerPool(), Noise())
    assert content(path) == content(expected)
    drawn = len(list((tmp_path / "log").iterdir()))
    orphans = {int(entry.name.split("-")[1]) for entry in (tmp_path / "log").iterdir()}
    deadline = time.monotonic() + 30
    while any(_lives(orphan) for orphan in orphans) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert [orphan for orphan in orphans if _lives(orphan)] == []
    assert len(list((tmp_path / "log").iterdir())) <= drawn + 2 < count


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{process}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_worker_of_another_host_goes_by_the_lease_alone(tmp_path: Path) -> None:
    with workers._lease(tmp_path) as lease:
        assert workers._is_held(lease, on_this_host=True)
        copy = tmp_path / "workers-copy.lease"
        copy.touch()
        assert workers._is_held(copy, on_this_host=False)
        assert not workers._is_held(copy, on_this_host=True)  # nobody locks it
    assert not workers._is_held(lease, on_this_host=False)


def test_memory_does_not_grow_with_the_number_of_trajectories(tmp_path: Path) -> None:
    """Two shards of 2·5·16384·2 bytes = 0.3 MB, a file's copies and float64 slices; the whole cache is 30 shards."""
    recipe = make_recipe(60, (4, 64, 64), steps=2)
    tracemalloc.start()
    draw(tmp_path / "cache", recipe, WorkerPool(), Noise())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    shard = 2 * 5 * 16384 * 2
    assert 2 * shard < peak < 10 * shard


class TestEngines:
    @pytest.mark.dask
    def test_dask(self, tmp_path: Path, whole: dict[str, bytes]) -> None:
        assert content(_run_script(tmp_path, "WorkerPool(workers=2, engine='dask')")) == whole

    @pytest.mark.dask
    def test_dask_with_a_scheduler(self, tmp_path: Path, whole: dict[str, bytes]) -> None:
        cluster = "__import__('distributed').LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)"
        pool = "WorkerPool(workers=2, engine='dask', address=cluster.scheduler_address)"
        assert content(_run_script(tmp_path, pool, cluster)) == whole

    @pytest.mark.ray
    def test_ray(self, tmp_path: Path, whole: dict[str, bytes]) -> None:
        assert content(_run_script(tmp_path, "WorkerPool(workers=2, engine='ray')")) == whole

    @pytest.mark.parametrize(("engine", "module"), [("dask", "distributed"), ("ray", "ray")])
    def test_engine_is_not_installed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, engine: str, module: str
    ) -> None:
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(MissingExtraError, match=rf"`{module}` must be installed .*refine-env\[{engine}\]"):
            draw(tmp_path / "cache", make_recipe(), WorkerPool(workers=2, engine=engine), Noise())

    @pytest.mark.dask
    def test_no_cluster_at_the_address(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import distributed

        def refuse(**kwargs: Any) -> None:
            assert kwargs["address"] == "tcp://nowhere:1"
            raise OSError("timed out\nand more")

        monkeypatch.setattr(distributed, "Client", refuse)
        pool = WorkerPool(workers=2, engine="dask", address="tcp://nowhere:1")
        with pytest.raises(
            ConfigurationError, match=r"running dask cluster, got 'tcp://nowhere:1' \(OSError: timed out and more\)"
        ):
            draw(tmp_path / "cache", make_recipe(), pool, Noise())
        assert not (tmp_path / "cache.partial").exists()


def _run_script(folder: Path, pool: str, cluster: str = "contextlib.nullcontext()") -> Path:
    """Run a script that makes ``folder/cache``; clusters write under HOME and start processes that import it."""
    script = folder / "script.py"
    script.write_text(
        "import contextlib\n"
        "from tests.trajectories.test_workers import *\n"
        "if __name__ == '__main__':\n"
        f"    with {cluster} as cluster:\n"
        f"        draw(Path({str(folder / 'cache')!r}), make_recipe(), {pool}, Noise())\n"
    )
    environment = {**os.environ, "HOME": str(folder), "RAY_TMPDIR": "/tmp", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(script)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / "cache"


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"engine": "mpi"}, "`engine` must be one of 'loky', 'dask', 'ray', got 'mpi'"),
        ({"workers": 0}, "`workers` must be an integer >= 1, got 0"),
        ({"workers": 1, "devices": ("cuda:0", "cuda:1")}, "`workers` must be at least the number of devices, 2, got 1"),
        ({"devices": ("cpu", "cuda:0")}, r"`device` must be one or more torch devices of one kind, got \['cpu', 'cuda"),
        ({"devices": ()}, r"`device` must be one or more torch devices of one kind, got \[\]"),
        ({"address": "tcp://head:8786"}, "`address` must be that of a cluster, got 'tcp://head:8786' for the engine"),
        ({"engine": "ray", "devices": ("cuda:0",)}, "`device` must be without a number on Ray"),
    ],
)
def test_bad_pools(kwargs: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        WorkerPool(**kwargs)


class TestDiffusers:
    """With torch in every worker; one of its processes takes seconds to start."""

    PROMPTS = ("a cat", "dog", "the sun", "moon", "a red fish")

    def generate(self, path: Path, model: Path, **kwargs: Any) -> TrajectoryCache:
        settings = {"num_steps": 3, "batch_size": 2, "shard_size": 2, **kwargs}
        return generate_diffusers(path, model, self.PROMPTS, **settings)

    def test_two_workers_give_the_bytes_of_one(
        self, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("diffusers")
        one = self.generate(tmp_path / "one", tiny_model)
        monkeypatch.chdir(tiny_model.parent)
        two = self.generate(tmp_path / "two", Path(tiny_model.name), workers=2)
        assert content(two.path) == content(one.path)

    def test_bits_do_not_depend_on_the_number_of_threads(self, tiny_model: Path, tmp_path: Path) -> None:
        torch = pytest.importorskip("torch")
        seen = []
        caches = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            try:
                caches.append(
                    self.generate(
                        tmp_path / str(threads), tiny_model, progress=lambda *_: seen.append(torch.get_num_threads())
                    )
                )
                assert torch.get_num_threads() == threads
            finally:
                torch.set_num_threads(1)
        assert caches[0].sha256 == caches[1].sha256
        assert 1 in seen[len(seen) // 2 :]  # also of the second run

    def test_a_worker_with_another_model_is_refused(self, tiny_model: Path, tmp_path: Path) -> None:
        from refine_env.trajectories.generate import _DiffusionSource, _FullSource

        recipe = self.generate(tmp_path / "cache", tiny_model).manifest.recipe
        model = _DiffusionSource(
            model=tiny_model, num_steps=3, scheduler="ddpm", guidance_scale=7.5, dtype="float32", revision=None
        )
        source = _FullSource(model, None)
        assert callable(source.open(recipe, "cpu"))
        with pytest.raises(
            CacheError, match=r"`workers` must have the same model .*, got model sha256:\w+ instead of x"
        ):
            source.open(replace(recipe, model={"id": "tiny", "revision": "x"}), "cpu")
        with pytest.raises(CacheError, match=r"got torch .* instead of 1\.0 on "):
            source.open(replace(recipe, generator={**recipe.generator, "torch": "1.0"}), "cpu")

    def test_workers_take_the_hub_s_commit(self) -> None:
        from refine_env.trajectories.generate import _DiffusionSource

        source = _DiffusionSource(
            model="a/b", num_steps=3, scheduler="ddpm", guidance_scale=7.5, dtype="float32", revision="main"
        )
        sampler: Any = type("Sampler", (), {"revision": "0123abcd"})
        assert source.pinned(sampler).revision == "0123abcd"
        sampler.revision = "sha256:0"
        assert source.pinned(sampler) == source
