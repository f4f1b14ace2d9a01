"""A generation may end at any moment: what is left is never a broken cache, and the next run ends in the same bytes."""

from __future__ import annotations

import errno
import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from refine_env import CacheError, CacheFormatError, ConfigurationError, NoiseSchedule, TrajectoryCache
from refine_env.trajectories import Manifest, Recipe, generate_forward_process, generate_gaussian
from refine_env.trajectories.statistics import gram, squares
from refine_env.trajectories.writer import CacheWriter, fcntl, write_shard

SCHEDULE = NoiseSchedule([1.0, 0.7, 0.2])
SHAPE = (1, 2, 3)


def make(path: Path, *, seed: int = 1, overwrite: bool = False, **kwargs: Any) -> TrajectoryCache:
    """Seven trajectories in three shards."""
    arguments: dict[str, Any] = {"num_train": 4, "shard_size": 3, **kwargs}
    return generate_gaussian(path, 7, SHAPE, schedule=SCHEDULE, seed=seed, overwrite=overwrite, **arguments)


def content(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


class Killed(BaseException):
    """The process is gone: no handler of `Exception` runs, and nothing is cleaned up on purpose."""


class Mortal:
    """Every operation that changes the disk counts; at the given one the process dies, a write in its middle."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, life: int) -> None:
        self.life = life
        for module, name in [
            (os, "replace"),
            (os, "rename"),
            (pathlib.Path, "unlink"),
            (pathlib.Path, "mkdir"),
        ]:
            monkeypatch.setattr(module, name, self.whole(getattr(module, name)))
        monkeypatch.setattr(pathlib.Path, "write_bytes", self.torn(pathlib.Path.write_bytes))
        monkeypatch.setattr(CacheWriter, "close", self.silent(CacheWriter.close))

    def step(self) -> bool:
        self.life -= 1
        return self.life < 0

    def whole(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if self.step():
                raise Killed
            return operation(*args, **kwargs)

        return run

    def torn(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            result = operation(*args, **kwargs)
            if self.step():
                file = next(arg for arg in args if isinstance(arg, Path))
                size = file.stat().st_size
                os.truncate(file, size // 2)
                os.truncate(file, size)  # full length, half of it zeros, as after a power cut
                raise Killed
            return result

        return run

    def silent(self, close: Callable[..., Any]) -> Callable[..., Any]:
        def run(cache_writer: CacheWriter) -> None:
            if self.life < 0:  # a dead process releases its lock, and does no more
                cache_writer._owner = False
            close(cache_writer)

        return run


def run_mortal(life: int, path: Path, **kwargs: Any) -> bool:
    """Whether the run lived to its end."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        Mortal(monkeypatch, life)
        try:
            make(path, **kwargs)
        except Killed:
            return False
        return True


def test_nothing_is_renamed_before_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[int] = set()
    renamed: list[str] = []

    def replace(source: Path, target: Path) -> None:
        assert source.stat().st_ino in synced
        renamed.append(target.name)
        os.rename(source, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "replace", replace)
    cache = make(tmp_path / "cache")
    assert renamed == ["generation.json", *(span.file for span in cache.manifest.recipe.spans), "manifest.json"]
    assert {cache.path.stat().st_ino, tmp_path.stat().st_ino} <= synced


def test_killed_anywhere_and_run_again(tmp_path: Path) -> None:
    whole = content(make(tmp_path / "whole").path)
    for life in itertools.count():
        path = tmp_path / f"cache{life}" / "cache"
        if run_mortal(life, path):
            break
        if path.exists():  # renamed into place by the last operation: then it is whole
            TrajectoryCache.open(path).verify()
        make(path)
        assert content(path) == whole, f"killed at operation {life}"
        assert [entry.name for entry in path.parent.iterdir()] == ["cache"], f"killed at operation {life}"
    assert life > 12


def test_killed_again_and_again(tmp_path: Path) -> None:
    whole = content(make(tmp_path / "whole").path)
    path = tmp_path / "cache"
    lives = itertools.cycle([4, 6, 5])
    runs = 1
    while not run_mortal(next(lives), path):
        runs += 1
    assert 3 <= runs < 20
    assert content(path) == whole


def test_killed_anywhere_while_replacing(tmp_path: Path) -> None:
    old = content(make(tmp_path / "old", seed=1).path)
    new = content(make(tmp_path / "new", seed=2).path)
    between_renames = 0
    for life in itertools.count():
        path = tmp_path / f"cache{life}" / "cache"
        make(path, seed=1)
        if run_mortal(life, path, seed=2, overwrite=True):
            break
        if path.exists():
            assert content(path) in (old, new), f"killed at operation {life}"
        else:
            between_renames += 1
            assert content(path.with_name("cache.replaced")) == old
        make(path, seed=2, overwrite=True)
        assert content(path) == new, f"killed at operation {life}"
        assert [entry.name for entry in path.parent.iterdir()] == ["cache"], f"killed at operation {life}"
    assert life > 16
    assert between_renames == 1


def test_old_cache_comes_back_if_the_new_one_was_not_put_in_its_place(tmp_path: Path) -> None:
    path = make(tmp_path / "cache", seed=1).path
    old = content(path)
    path.rename(tmp_path / "cache.replaced")
    with pytest.raises(CacheError, match="must not be replaced unasked"):
        make(path, seed=2)
    assert content(path) == old


def kill_after(count: int, code: str, staging: Path) -> list[Path]:
    """The shards in ``staging`` when a process that runs ``code`` is killed, at least so many of them."""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    try:
        deadline = time.monotonic() + 60
        while len(list(staging.glob("*.safetensors"))) < count and time.monotonic() < deadline:
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return list(staging.glob("*.safetensors"))


def test_killed_for_good(tmp_path: Path) -> None:
    """A real SIGKILL, in another process."""
    arguments = "60, (1, 32, 32), num_steps=50, seed=4, shard_size=1"
    path = tmp_path / "cache"
    code = (
        "from refine_env.trajectories import generate_gaussian, workers; import time\n"
        "check = workers.check_values\n"
        "workers.check_values = lambda *args: (time.sleep(0.01), check(*args))\n"
        f"generate_gaussian({str(path)!r}, {arguments})"
    )
    written = {file.name: file.stat().st_mtime_ns for file in kill_after(3, code, tmp_path / "cache.partial")}
    assert 3 <= len(written) < 60
    assert not path.exists()
    with pytest.raises(CacheError, match="whose generation was interrupted"):
        TrajectoryCache.open(path)
    cache = generate_gaussian(path, 60, (1, 32, 32), num_steps=50, seed=4, shard_size=1)
    kept = {name: (path / name).stat().st_mtime_ns for name in written}
    assert kept == written  # the written shards were not drawn again
    whole = generate_gaussian(tmp_path / "whole", 60, (1, 32, 32), num_steps=50, seed=4, shard_size=1)
    assert content(cache.path) == content(whole.path)


def test_goes_on_only_with_the_same_arguments(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    assert not run_mortal(5, path)
    before = content(tmp_path / "cache.partial")
    with pytest.raises(
        CacheError,
        match=r"must be generated with the arguments that .* began with, got seed = 2 instead of 1",
    ):
        make(path, seed=2)
    with pytest.raises(CacheError, match=r"got shard_size = 2 instead of 3\. Repeat those .* or delete .*partial"):
        make(path, shard_size=2)
    assert content(tmp_path / "cache.partial") == before
    make(path)


def test_damaged_unfinished_shard_is_drawn_again(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    assert not run_mortal(9, path)
    shard = sorted((tmp_path / "cache.partial").glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-3])
    assert content(make(path).path) == content(make(tmp_path / "whole").path)


def test_generation_that_never_got_anywhere_blocks_nothing(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="must be finite and within float16"):
        generate_forward_process(tmp_path / "cache", np.full((2, *SHAPE), 1e5), schedule=SCHEDULE)
    assert list(tmp_path.iterdir()) == []
    assert not run_mortal(3, tmp_path / "cache")  # killed in the first shard
    assert (tmp_path / "cache.partial" / "generation.json").is_file()
    assert make(tmp_path / "cache", seed=2).seed(0) == make(tmp_path / "other", seed=2).seed(0)


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_files_are_as_readable_as_others(tmp_path: Path) -> None:
    (tmp_path / "other").touch()
    expected = (tmp_path / "other").stat().st_mode
    assert {file.stat().st_mode for file in make(tmp_path / "cache").path.iterdir()} == {expected}


def test_finished_cache_stays(tmp_path: Path) -> None:
    path = make(tmp_path / "cache").path
    before = {file: file.stat().st_mtime_ns for file in path.iterdir()}
    assert len(make(path)) == 7  # the same request again: nothing to do
    with pytest.raises(CacheError, match=r"must not be replaced unasked, got .* seed = 9 instead of 1; .*--overwrite"):
        make(path, seed=9)
    assert {file: file.stat().st_mtime_ns for file in path.iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["cache"]
    assert make(path, seed=9, overwrite=True).seed(0) != make(tmp_path / "other").seed(0)


def test_overwrite_repairs(tmp_path: Path) -> None:
    path = make(tmp_path / "cache").path
    before = content(path)
    next(path.glob("*.safetensors")).write_bytes(b"")
    (path / "manifest.json").write_bytes(b"{")
    with pytest.raises(CacheError, match="an unreadable manifest"):
        make(path)
    make(path, overwrite=True)
    assert content(path) == before


def test_never_touches_what_is_not_its_own(tmp_path: Path) -> None:
    path = make(tmp_path / "cache").path
    (path / "thesis.tex").write_text("years of work")
    with pytest.raises(CacheError, match=r"hold nothing but a cache, got .* with 'thesis.tex' in it"):
        make(path, seed=2, overwrite=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    for overwrite in (False, True):
        with pytest.raises(CacheError, match=r"must be a new folder or hold nothing but a cache, got .*'a.txt'"):
            make(tmp_path / "notes", overwrite=overwrite)
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match="`path` must be a folder, got the file"):
        make(tmp_path / "file")
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "b.txt").touch()
    with pytest.raises(CacheError, match=r"must hold nothing but an interrupted generation, got 'b.txt'"):
        make(tmp_path / "new")
    assert (path / "thesis.tex").read_text() == "years of work"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cache", "file", "new.partial", "notes"]


@pytest.mark.parametrize("name", ["cache.partial", "cache.replaced"])
def test_names_of_caches_in_the_making(tmp_path: Path, name: str) -> None:
    with pytest.raises(CacheError, match=r"and not end in .partial or .replaced, which .* Choose another name"):
        make(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_empty_folder_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    assert len(make(tmp_path / "cache")) == 7


def test_one_writer_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    recipe = make(tmp_path / "whole").manifest.recipe
    with (
        CacheWriter(path, recipe),
        pytest.raises(CacheError, match="by one process at a time, got another one"),
    ):
        make(path)
    make(path)


def copy_shards(cache_writer: CacheWriter, cache: TrajectoryCache) -> None:
    for span in reversed(cache_writer.missing()):
        rows = range(span.start, span.stop)
        tensors = {
            "latents": np.stack([cache.latents(row) for row in rows]),
            "clean_estimates": np.stack([cache.clean_estimates(row) for row in rows]),
        }
        cache_writer.add(write_shard(cache_writer.staging, cache_writer.recipe, span, tensors))


def test_closing_after_publishing_leaves_the_next_writer_s_folder(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    first, second = make(tmp_path / "first", seed=1), make(tmp_path / "second", seed=2)
    with CacheWriter(path, first.manifest.recipe) as earlier:
        copy_shards(earlier, first)
        earlier.finish()
        later = CacheWriter(path, second.manifest.recipe, overwrite=True)
        begun = content(later.staging)
        earlier.close()
        assert content(later.staging) == begun
        assert list(begun) == ["generation.json"]
    with later:
        copy_shards(later, second)
        later.finish()
    assert content(path) == content(second.path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cache", "first", "second"]


@pytest.mark.skipif(fcntl is None, reason="no file locks on this platform")
def test_no_writer_begins_while_another_publishes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each rename of the replacement, before and after, another one tries to begin."""
    path = make(tmp_path / "cache", seed=1).path
    refused = 0
    rename = os.rename

    def try_to_begin() -> None:
        nonlocal refused
        with pytest.raises(CacheError, match="by one process at a time, got another one"):
            make(path, seed=3, overwrite=True)
        refused += 1

    def interleave(source: Path, target: Path) -> None:
        try_to_begin()
        rename(source, target)
        try_to_begin()

    monkeypatch.setattr(os, "rename", interleave)
    make(path, seed=2, overwrite=True)
    monkeypatch.undo()
    assert refused == 4
    assert content(path) == content(make(tmp_path / "other", seed=2).path)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cache", "other"]


@pytest.mark.skipif(fcntl is None, reason="no file locks on this platform")
@pytest.mark.parametrize("seed", [1, 2])
def test_folder_that_was_put_in_its_place_before_it_was_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """A writer opens the growing folder; before it asks for the lock, the one that held it publishes and closes."""
    path = tmp_path / "cache"
    whole = make(tmp_path / "whole", seed=1)
    earlier = CacheWriter(path, whole.manifest.recipe)
    copy_shards(earlier, whole)
    flock = fcntl.flock

    def finish_first(descriptor: int, operation: int) -> None:
        monkeypatch.undo()
        earlier.finish()
        earlier.close()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", finish_first)
    later = make(path, seed=seed, overwrite=True)
    assert content(path) == content(make(tmp_path / "other", seed=seed).path)
    later.verify()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cache", "other", "whole"]


def test_shards_may_be_written_in_any_order(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole")
    with CacheWriter(tmp_path / "cache", whole.manifest.recipe) as cache_writer:
        copy_shards(cache_writer, whole)
        assert cache_writer.missing() == []
        cache = cache_writer.finish()
    assert content(cache.path) == content(whole.path)


def test_shard_of_another_form(tmp_path: Path) -> None:
    recipe = make(tmp_path / "whole").manifest.recipe
    with CacheWriter(tmp_path / "cache", recipe) as cache_writer:
        span = cache_writer.missing()[0]
        tensors = {
            "latents": np.zeros((3, 3, *SHAPE), dtype=np.float16),
            "clean_estimates": np.zeros((3, 2, *SHAPE), dtype=np.float16),
        }
        wide: Any = tensors["latents"].astype(np.float32)
        with pytest.raises(
            CacheFormatError, match=r"`latents` must be float16 of shape \(3, 3, 1, 2, 3\), got float32"
        ):
            write_shard(cache_writer.staging, recipe, span, {**tensors, "latents": wide})
        few = tensors["clean_estimates"][:2]
        with pytest.raises(CacheFormatError, match=r"`clean_estimates` must be float16 of shape .*\(2, 2, 1, 2, 3\)"):
            write_shard(cache_writer.staging, recipe, span, {**tensors, "clean_estimates": few})
        with pytest.raises(CacheFormatError, match=r"00000-of-00003.safetensors must exist"):
            cache_writer.finish()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_disk_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(
        CacheError,
        match=rf"must be writable, got: {os.strerror(number)}\. Free space .* run the same command again",
    ):
        make(tmp_path / "cache")
    monkeypatch.undo()
    assert content(make(tmp_path / "cache").path) == content(make(tmp_path / "whole").path)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"note": "CC\ud800"}, r"`note` must be text that UTF-8 can hold, got 'CC\\ud800'"),
        ({"seed": 10**400}, r"`seed` must be .* got the number 10+ … 0+, which is not a finite float64"),
    ],
)
def test_what_could_not_be_read_again_is_not_begun(tmp_path: Path, arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigurationError, match=match):
        make(tmp_path / "cache", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_disk_that_is_really_full(tmp_path: Path) -> None:
    """A file-size limit makes the write itself fail, inside the safetensors library."""
    code = (
        "import resource, signal\n"
        "from refine_env.trajectories import generate_gaussian\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try:\n"
        f"    generate_gaussian({str(tmp_path / 'cache')!r}, 2, (4, 32, 32), num_steps=10)\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.startswith("CacheError")
    assert "must be writable, got: " in run.stdout
    assert "File too large" in run.stdout
    assert run.stdout.count("\n") == 1
    assert not (tmp_path / "cache").exists()


def test_manifest_is_deterministic_and_names_no_place(tmp_path: Path) -> None:
    first, second = make(tmp_path / "a" / "first"), make(tmp_path / "second")
    assert content(first.path) == content(second.path)
    raw = (first.path / "manifest.json").read_bytes()
    assert str(tmp_path).encode() not in raw
    assert b"first" not in raw
    values = json.loads(raw)
    assert values["format_version"] == 2
    assert values["dtype"] == "float16"
    assert values["splits"] == {"train": [0, 4], "test": [4, 7]}
    assert [shard["start"] for shard in values["shards"]] == [0, 3, 6]
    assert Manifest.from_bytes(raw, "manifest.json").to_bytes() == raw
    assert Recipe.from_bytes(raw, "manifest.json") == first.manifest.recipe


float16_rows = hnp.arrays(
    np.float16,
    st.tuples(st.integers(1, 4), st.integers(1, 130)),
    elements=st.floats(width=16, allow_nan=False, allow_infinity=False),
)


@given(float16_rows)
def test_gram_is_exact(rows: np.ndarray[Any, np.dtype[np.float16]]) -> None:
    """Below 4096 dimensions the one rounding is that of adding three exact sums."""
    exact = [
        [sum(Fraction(float(a)) * Fraction(float(b)) for a, b in zip(x, y, strict=True)) for x in rows] for y in rows
    ]
    scale = [[sum(abs(float(a) * float(b)) for a, b in zip(x, y, strict=True)) for x in rows] for y in rows]
    error = np.abs(gram(rows) - np.array(exact, dtype=np.float64))
    assert (error <= 4 * np.finfo(np.float64).eps * np.array(scale)).all()
    np.testing.assert_array_equal(np.diag(gram(rows)), squares(rows), strict=True)


def test_gram_does_not_depend_on_the_order_of_summation(rng: np.random.Generator) -> None:
    """Values of all magnitudes, 1e-7 to 6e4, whose plain float64 sums differ in the last bits."""
    rows = (rng.standard_normal((5, 4096)) * 10 ** rng.uniform(-6, 4, (5, 4096))).astype(np.float16)
    order = rng.permutation(4096)
    wide = rows.astype(np.float64)
    assert ((wide @ wide.T) != (wide[:, order] @ wide[:, order].T)).any()
    np.testing.assert_array_equal(gram(rows), gram(rows[:, order]), strict=True)
    np.testing.assert_array_equal(np.diag(gram(rows)), squares(rows), strict=True)


def test_gram_over_many_blocks() -> None:
    rows = np.random.default_rng(0).standard_normal((3, 10_000)).astype(np.float16)
    wide = rows.astype(np.float64)
    np.testing.assert_allclose(gram(rows), wide @ wide.T, rtol=0, atol=1e-9)
    np.testing.assert_array_equal(np.diag(gram(rows)), squares(rows), strict=True)
