from __future__ import annotations

import copy
import gc
import json
import multiprocessing
import pickle
import shutil
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from refine_env import CacheError, CacheFormatError, ConfigurationError, NoiseSchedule, TrajectoryCache
from refine_env.trajectories import cache as cache_module
from refine_env.trajectories import find_damage, generate_gaussian, read_manifest

from .manifests import read_values, write_values

SCHEDULE = NoiseSchedule([1.0, 0.9, 0.6, 0.3, 0.05])
SHAPE = (2, 3, 3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten trajectories in four shards."""
    folder = tmp_path_factory.mktemp("whole") / "cache"
    generate_gaussian(folder, 10, SHAPE, schedule=SCHEDULE, seed=5, shard_size=3, num_train=4)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(whole, tmp_path / "cache")
    return tmp_path / "cache"


def shard(folder: Path, number: int) -> Path:
    return sorted(folder.glob("*.safetensors"))[number]


def test_describes_itself(whole: Path) -> None:
    cache = TrajectoryCache.open(whole)
    assert len(cache) == 10
    assert (cache.num_steps, cache.latent_shape, cache.latent_dim) == (4, SHAPE, 18)
    assert cache.schedule == SCHEDULE
    assert cache.path == whole.resolve()
    assert cache.prompt(9) is None
    assert "10 trajectories" in repr(cache)
    assert cache.manifest.recipe.source == "gaussian"


def test_splits_are_the_first_and_the_rest(whole: Path) -> None:
    cache = TrajectoryCache.open(whole)
    assert cache.indices("train").tolist() == [0, 1, 2, 3]
    assert cache.indices("test").tolist() == [4, 5, 6, 7, 8, 9]
    assert cache.indices("all").tolist() == list(range(10))
    assert cache.indices("all").dtype == np.int64
    with pytest.raises(ConfigurationError, match="`split` must be one of 'train', 'test', 'all', got 'val'"):
        cache.indices("val")


def test_gives_what_the_shards_hold(whole: Path) -> None:
    cache = TrajectoryCache.open(whole)
    stored = [load_file(file) for file in sorted(whole.glob("*.safetensors"))]
    latents = np.concatenate([tensors["latents"] for tensors in stored])
    estimates = np.concatenate([tensors["clean_estimates"] for tensors in stored])
    for index in range(10):
        assert cache.latents(index).dtype == cache.clean_estimates(index).dtype == np.float16
        np.testing.assert_array_equal(cache.latents(index), latents[index], strict=True)
        np.testing.assert_array_equal(cache.clean_estimates(index), estimates[index], strict=True)
        np.testing.assert_array_equal(cache.clean_estimates(index)[0], cache.latents(index)[0])


def test_views_are_not_copies_and_cannot_be_written(whole: Path) -> None:
    cache = TrajectoryCache.open(whole)
    for get in (cache.latents, cache.clean_estimates):
        view = get(4)
        assert np.shares_memory(view, get(4))
        assert not np.shares_memory(view, get(5))
        assert not view.flags.owndata
        assert not view.flags.writeable
        with pytest.raises(ValueError, match="WRITEABLE"):
            view.setflags(write=True)


def test_few_files_stay_open_and_their_views_stay_valid(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "_MAX_OPEN_SHARDS", 2)
    cache = TrajectoryCache.open(whole)
    views = [cache.latents(index) for index in range(10)]
    assert cache._map.cache_info().currsize == 2
    again = TrajectoryCache.open(whole)
    for index, view in enumerate(views):
        np.testing.assert_array_equal(view, again.latents(index))


def test_maps_go_with_their_cache(whole: Path) -> None:
    """At once: who opens caches again and again must not run out of file descriptors before a garbage collection."""
    cache = TrajectoryCache.open(whole)
    shard = weakref.ref(cache._map(0)[0])
    assert shard() is not None
    gc.disable()
    try:
        del cache
        assert shard() is None
    finally:
        gc.enable()


def test_threads_may_share_a_cache(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each looks at every shard while the others have it closed; opening one takes a little."""
    open_at_once = cache_module._map_shard

    def open_slowly(*arguments: Any) -> Any:
        time.sleep(1e-4)
        return open_at_once(*arguments)

    monkeypatch.setattr(cache_module, "_map_shard", open_slowly)
    monkeypatch.setattr(cache_module, "_MAX_OPEN_SHARDS", 1)
    cache = TrajectoryCache.open(whole)
    expected = [cache.latents(i).copy() for i in range(len(cache))]

    def read(first: int) -> bool:
        order = [(first + k) % len(cache) for k in range(100)]
        return all(np.array_equal(cache.latents(i), expected[i]) for i in order)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(read, range(4)))


def test_statistics_are_those_of_the_stored_values(whole: Path) -> None:
    cache = TrajectoryCache.open(whole)
    x = np.stack([cache.latents(index).astype(np.float64).reshape(5, -1) for index in range(10)])
    y = np.stack([cache.clean_estimates(index).astype(np.float64).reshape(4, -1) for index in range(10)])
    np.testing.assert_allclose(cache.mean_square, (x**2).mean(axis=(0, 2)), rtol=1e-12)
    np.testing.assert_allclose(
        cache.second_moments, np.einsum("ntm,num->tu", x[:4], x[:4]) / (4 * 18), rtol=0, atol=1e-12
    )
    np.testing.assert_allclose(
        cache.clean_second_moments, np.einsum("ntm,num->tu", y[:4], y[:4]) / (4 * 18), rtol=0, atol=1e-12
    )
    mmse = [((y[:4, t] - x[:4, 0]) ** 2).mean() for t in range(4)] + [(x[:4, 0] ** 2).mean()]
    np.testing.assert_allclose(cache.mmse, mmse, rtol=0, atol=1e-12)
    for array in (cache.mean_square, cache.second_moments, cache.clean_second_moments, cache.mmse):
        assert not array.flags.writeable


@pytest.mark.parametrize("index", [-1, 10, np.int64(11)])
@pytest.mark.parametrize("method", ["latents", "clean_estimates", "prompt", "seed"])
def test_index_out_of_range(whole: Path, method: str, index: int) -> None:
    cache = TrajectoryCache.open(whole)
    with pytest.raises(IndexError, match=rf"`index` must be in 0 … 9, got {index}\. The cache 'cache' holds 10"):
        getattr(cache, method)(index)


def test_sha256_identifies_the_content(whole: Path, tmp_path: Path) -> None:
    cache = TrajectoryCache.open(whole)
    same = generate_gaussian(tmp_path / "same", 10, SHAPE, schedule=SCHEDULE, seed=5, shard_size=3, num_train=4)
    other = generate_gaussian(tmp_path / "other", 10, SHAPE, schedule=SCHEDULE, seed=6, shard_size=3, num_train=4)
    assert cache.sha256 == same.sha256 != other.sha256


def test_pickle_reopens_and_deepcopy_shares(whole: Path) -> None:
    cache = TrajectoryCache.open(whole)
    cache.latents(0)
    blob = pickle.dumps(cache)
    assert len(blob) < 1000
    again = pickle.loads(blob)
    assert again.sha256 == cache.sha256
    np.testing.assert_array_equal(again.latents(7), cache.latents(7))
    assert copy.deepcopy({"cache": cache})["cache"] is cache


def test_pickle_of_a_cache_that_changed(folder: Path) -> None:
    blob = pickle.dumps(TrajectoryCache.open(folder))
    generate_gaussian(folder, 10, SHAPE, schedule=SCHEDULE, seed=8, overwrite=True)
    with pytest.raises(CacheError, match="must be the cache that was pickled"):
        pickle.loads(blob)


def total(cache: TrajectoryCache) -> float:
    return float(sum(cache.latents(index).astype(np.float64).sum() for index in cache.indices("all")))


def test_travels_to_a_spawned_process(whole: Path) -> None:
    cache = TrajectoryCache.open(whole)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(total, (cache,)) == total(cache)


class TestLookup:
    def test_current_directory(self, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        shutil.copytree(whole, tmp_path / "cached_trajectories" / "mine")
        monkeypatch.chdir(tmp_path)
        assert TrajectoryCache.open("mine").path == (tmp_path / "cached_trajectories" / "mine").resolve()

    def test_a_folder_comes_first(self, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        shutil.copytree(whole, tmp_path / "cached_trajectories" / "mine")
        shutil.copytree(whole, tmp_path / "mine")
        monkeypatch.chdir(tmp_path)
        assert TrajectoryCache.open("mine").path == (tmp_path / "mine").resolve()

    @pytest.mark.parametrize("is_clone", [True, False])
    def test_clone_then_package(
        self, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_clone: bool
    ) -> None:
        package = tmp_path / "clone" / "refine_env"
        shutil.copytree(whole, package / "cached_trajectories" / "default")
        shutil.copytree(whole, package.parent / "cached_trajectories" / "default")
        if is_clone:
            (package.parent / "pyproject.toml").touch()
        monkeypatch.setattr(cache_module.importlib.resources, "files", lambda name: package)
        monkeypatch.chdir(tmp_path)
        expected = (package.parent if is_clone else package) / "cached_trajectories" / "default"
        assert TrajectoryCache.open("default").path == expected.resolve()

    @pytest.mark.parametrize("name", ["nowhere", "some/where/else", "..", ""])
    def test_missing(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(
            CacheError,
            match=rf"must be the name or the folder of a trajectory cache, got '{name}' .*Make one with",
        ):
            TrajectoryCache.open(name)

    def test_unfinished(self, tmp_path: Path) -> None:
        (tmp_path / "begun.partial").mkdir()
        (tmp_path / "begun.partial" / "generation.json").touch()
        with pytest.raises(CacheError, match=r"got '.*begun', whose generation was interrupted\. Run the same"):
            TrajectoryCache.open(tmp_path / "begun")


class TestDamage:
    """`open` finds what is wrong with the structure, `verify` also what is wrong with the data."""

    def test_whole(self, whole: Path) -> None:
        seen: list[tuple[int, int]] = []
        TrajectoryCache.open(whole).verify(lambda done, total: seen.append((done, total)))
        size = sum(file.stat().st_size for file in whole.glob("*.safetensors"))
        assert seen[-1] == (size, size)

    def test_one_bit(self, folder: Path) -> None:
        for number in (1, 3):
            content = bytearray(shard(folder, number).read_bytes())
            content[-1] ^= 1
            shard(folder, number).write_bytes(content)
        cache = TrajectoryCache.open(folder)
        with pytest.raises(CacheFormatError, match=r"00001-of-00004.*SHA-256.*; .*00003-of-00004.*--overwrite"):
            cache.verify()
        damage = find_damage(folder, cache.manifest)
        assert len(damage) == 2

    def test_open_does_not_read_the_data(self, folder: Path) -> None:
        content = bytearray(shard(folder, 0).read_bytes())
        content[-1] ^= 1
        shard(folder, 0).write_bytes(content)
        assert len(TrajectoryCache.open(folder)) == 10

    @pytest.mark.parametrize("length", [0, 4, 100, -1])
    def test_truncated(self, folder: Path, length: int) -> None:
        content = shard(folder, 2).read_bytes()
        shard(folder, 2).write_bytes(content[:length])
        left = len(content[:length])
        with pytest.raises(
            CacheFormatError,
            match=rf"00002-of-00004\.safetensors must have {len(content)} bytes, got {left}\.",
        ):
            TrajectoryCache.open(folder)
        manifest, _ = read_manifest(folder)
        (sentence,) = find_damage(folder, manifest)
        assert "00002-of-00004.safetensors must have" in sentence

    def test_truncated_after_opening(self, folder: Path) -> None:
        cache = TrajectoryCache.open(folder)
        shard(folder, 0).write_bytes(shard(folder, 0).read_bytes()[:-8])
        with pytest.raises(CacheFormatError, match="It changed since the cache was opened"):
            cache.latents(0)

    def test_missing_shard(self, folder: Path) -> None:
        cache = TrajectoryCache.open(folder)
        shard(folder, 1).unlink()
        with pytest.raises(CacheFormatError, match=r"00001-of-00004\.safetensors must exist, got no such file"):
            TrajectoryCache.open(folder)
        with pytest.raises(CacheError, match=r"00001-of-00004\.safetensors must exist"):
            cache.latents(3)
        (sentence,) = find_damage(folder, cache.manifest)
        assert "must exist" in sentence

    def rewrite(self, folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Replace the first shard's tensors, and its size in the manifest."""
        file = shard(folder, 0)
        save_file(change(load_file(file)), file)
        self.edit(folder, lambda values: values["shards"][0].update(bytes=file.stat().st_size))

    def edit(self, folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
        values = read_values(folder)
        change(values)
        write_values(folder, values)

    def test_other_dtype(self, folder: Path) -> None:
        self.rewrite(folder, lambda tensors: tensors | {"latents": tensors["latents"].astype(np.float32)})
        with pytest.raises(CacheFormatError, match=r"`latents` in .*00000.* must have the dtype F16, got 'F32'"):
            TrajectoryCache.open(folder)

    def test_other_shape(self, folder: Path) -> None:
        self.rewrite(folder, lambda tensors: tensors | {"clean_estimates": tensors["clean_estimates"][:, 1:]})
        with pytest.raises(
            CacheFormatError,
            match=r"`clean_estimates` in .*00000.* must have the shape \[3, 4, 2, 3, 3\], got \[3, 3, 2, 3, 3\]",
        ):
            TrajectoryCache.open(folder)

    def test_other_name(self, folder: Path) -> None:
        self.rewrite(folder, lambda tensors: {"x": tensors["latents"], "clean_estimates": tensors["latents"]})
        with pytest.raises(CacheFormatError, match=r"must hold a tensor `latents`, got \['clean_estimates', 'x'\]"):
            TrajectoryCache.open(folder)

    @pytest.mark.parametrize(
        ("header", "match"),
        [
            (b"nothing like JSON", "The safetensors header of .* must be a JSON object, got Expecting value"),
            (b"[]", r"The safetensors header of .* must be a JSON object, got \[\]"),
            (b'{"latents": 3}', "`latents` in .* must have the dtype F16, got None"),
            (
                b'{"latents": {"dtype": "F16", "shape": [3], "data_offsets": null}}',
                r"`latents` in .* must have the shape \[3, 5, 2, 3, 3\], got \[3\]",
            ),
        ],
    )
    def test_no_header(self, folder: Path, header: bytes, match: str) -> None:
        file = shard(folder, 0)
        size = file.stat().st_size
        file.write_bytes((len(header).to_bytes(8, "little") + header).ljust(size, b"\0"))
        with pytest.raises(CacheFormatError, match=match):
            TrajectoryCache.open(folder)

    @pytest.mark.parametrize("shift", [[2, 0], [8, 8], [-4, -4], [10**6, 10**6]])
    def test_offsets_outside_the_file(self, folder: Path, shift: list[int]) -> None:
        file = shard(folder, 0)
        content = file.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        offsets = header["latents"]["data_offsets"]
        header["latents"]["data_offsets"] = [offsets[0] + shift[0], offsets[1] + shift[1]]
        if shift == [-4, -4]:
            header["latents"]["data_offsets"] = [-4, offsets[1] - offsets[0] - 4]
        text = json.dumps(header, separators=(",", ":")).encode().ljust(length)[: length + 8]
        file.write_bytes((len(text).to_bytes(8, "little") + text + content[8 + length :])[: len(content)])
        self.edit(folder, lambda values: values["shards"][0].update(bytes=file.stat().st_size))
        with pytest.raises(CacheFormatError, match="`latents` in .* must lie within the file's"):
            TrajectoryCache.open(folder)

    @pytest.mark.parametrize(
        ("name", "value", "match"),
        [
            ("format", "zip", "`format` in .*manifest.json must be 'refine-env trajectory cache', got 'zip'"),
            (
                "format_version",
                3,
                "`format_version` in .* must be 1 or 2, got 3. Generate the cache again, or use the",
            ),
            ("format_version", "1", "`format_version` in .* must be 1 or 2, got '1'"),
            ("source", "magic", "`source` in .* must be one of 'gaussian', .*, got 'magic'"),
            ("alpha_bar", [1.0, 0.5, 0.7], "`alpha_bar` must be strictly decreasing"),
            ("alpha_bar", "none", "`alpha_bar` in .* must be a list of numbers"),
            ("num_steps", 5, r"`num_steps` in .* must be len\(alpha_bar\) - 1 = 4, got 5"),
            ("dtype", "float32", "`dtype` in .* must be 'float16', got 'float32'"),
            ("latent_shape", [0, 3], "`latent_shape` in .* must be 1 to 62 positive integers"),
            (
                "latent_shape",
                [2, 3, 4],
                r"`latents` in .* must have the shape \[3, 5, 2, 3, 4\], got \[3, 5, 2, 3, 3\]",
            ),
            ("splits", {"train": [0, 4], "test": [5, 10]}, "`splits` in .* must be two adjacent ranges"),
            ("splits", {"train": [0, 4]}, "`splits.test` in .* must be a list of integers, got None"),
            ("trajectories", [], "`trajectories` in .* must be a list of objects, at least one"),
            (
                "trajectories",
                [{"prompt": 3, "seed": 1}],
                r"`trajectories\[0\].prompt` in .* must be a text, got 3",
            ),
            (
                "trajectories",
                [{"seed": -1}],
                r"`trajectories\[0\].seed` in .* must be an integer >= 0, got -1",
            ),
            ("shard_size", 4, "`shards` in .* must be 3 files of 4 of the 10 trajectories"),
            ("shard_size", 0, "`shard_size` in .* must be an integer >= 1, got 0"),
            ("mean_square", [1.0], r"`mean_square` in .* must be finite numbers of shape \(5,\)"),
            (
                "second_moments",
                [[1.0, 2.0], [1.0]],
                r"`second_moments` in .* must be finite numbers of shape",
            ),
            ("clean_second_moments", None, "`clean_second_moments` in .* must be finite numbers"),
            ("clean_estimates", "guess", "`clean_estimates` in .* must be one of 'denoiser', 'linear-mmse'"),
            ("guidance_scale", "x", "`guidance_scale` in .* must be a number"),
            ("generator", None, "`generator` in .* must be an object, got None"),
            ("shards", {}, "`shards` in .* must be a list of objects"),
        ],
    )
    def test_manifest_field(self, folder: Path, name: str, value: Any, match: str) -> None:
        self.edit(folder, lambda values: values.update({name: value}))
        with pytest.raises(CacheFormatError, match=match):
            TrajectoryCache.open(folder)

    def test_shard_names_cannot_leave_the_folder(self, folder: Path) -> None:
        self.edit(folder, lambda values: values["shards"][0].update(file="../secret.safetensors"))
        with pytest.raises(CacheFormatError, match="`shards` in .* must be 4 files"):
            TrajectoryCache.open(folder)

    @pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'"text"'])
    def test_manifest_is_no_json(self, folder: Path, content: bytes) -> None:
        (folder / "manifest.json").write_bytes(content)
        with pytest.raises(CacheFormatError, match="manifest.json must be (a )?JSON"):
            TrajectoryCache.open(folder)

    def test_fields_of_a_later_writer_are_no_damage(self, folder: Path) -> None:
        self.edit(folder, lambda values: values.update(extra={"more": 1}))
        assert len(TrajectoryCache.open(folder)) == 10


def test_imports_are_light() -> None:
    heavy = {"torch", "diffusers", "transformers", "typer", "rich", "tqdm", "matplotlib"}
    code = f"import sys, refine_env.trajectories.pipeline; print(sorted({heavy!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
