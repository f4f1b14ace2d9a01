"""The store of midpoints: whole files or none, every damage noticed, the longest unused deleted first."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from refine_env import CacheError, ConfigurationError
from refine_env._store import DIRECTORY_VARIABLE
from refine_env.trajectories.midpoints import Midpoint, MidpointKey, MidpointStore

ROOT = Path(__file__).parents[2]
KEY = MidpointKey(
    model="sha256:0",
    scheduler='{"class": "DDPMScheduler"}',
    num_steps=5,
    guidance_scale=2.0,
    prompt='a {"sha256":"' + 64 * "0" + '" cät {\\"sha256\\":\\"' + 64 * "0" + '\\"',
    seed=7,
    step=2,
    dtype="float32",
    device="cpu",
    batch_size=2,
    versions="{}",
    condition="0" * 64,
)


def make(key: MidpointKey = KEY, dtype: Any = np.float32) -> Midpoint:
    rng = np.random.default_rng(key.seed)
    return Midpoint(
        key=key, tensors={name: rng.standard_normal((1, 2, 3)).astype(dtype) for name in ("latent", "model_outputs.0")}
    )


def stored(store: MidpointStore, key: MidpointKey = KEY) -> dict[str, NDArray[Any]]:
    found = store.read(key)
    assert found is not None
    return dict(found.tensors)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_what_is_loaded_is_what_was_saved(tmp_path: Path, dtype: Any) -> None:
    store = MidpointStore(tmp_path / "new" / "store")
    assert store.read(KEY) is None
    assert store.sizes() == {}
    assert store.find_damage() == []
    store.write(make(dtype=dtype))
    for name, values in make(dtype=dtype).tensors.items():
        assert stored(store)[name].dtype == dtype
        np.testing.assert_array_equal(stored(store)[name], values)
    assert [file.name for file in store.sizes()] == [KEY.file]
    content = (store.folder / KEY.file).read_bytes()
    for _ in range(20):
        store.write(make(dtype=dtype))
        assert (store.folder / KEY.file).read_bytes() == content
    assert store.find_damage() == []
    assert store.clear() == 1
    assert store.read(KEY) is None


@pytest.mark.parametrize("field", [field.name for field in fields(MidpointKey)])
def test_every_field_of_the_key_makes_another_file(tmp_path: Path, field: str) -> None:
    store = MidpointStore(tmp_path)
    store.write(make())
    value = getattr(KEY, field)
    other = replace(KEY, **{field: value + "x" if isinstance(value, str) else value + 1})
    assert store.read(other) is None


def test_a_key_without_condition_is_that_of_before(tmp_path: Path) -> None:
    """A store that was filled before models saw conditions is as good as it was."""
    text = replace(KEY, condition=None).text
    assert "condition" not in text
    assert replace(KEY, condition=None).file == hashlib.sha256(text.encode()).hexdigest() + ".safetensors"


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    store = MidpointStore(tmp_path)
    store.write(make())
    file = tmp_path / KEY.file
    content = file.read_bytes()
    rng = np.random.default_rng(0)
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= int(rng.integers(1, 256))
        file.write_bytes(changed)
        assert len(store.find_damage()) == 1, place
        if place % 40 == 0:
            with pytest.warns(RuntimeWarning, match=f"{KEY.file} is damaged .* made again"):
                assert store.read(KEY) is None
    file.write_bytes(content[:-1])
    assert len(store.find_damage()) == 1
    file.write_bytes(b"")
    assert len(store.find_damage()) == 1
    store.write(make())
    assert store.find_damage() == []


def test_a_whole_file_under_another_name_is_noticed(tmp_path: Path) -> None:
    store = MidpointStore(tmp_path)
    store.write(make())
    other = replace(KEY, seed=8)
    (tmp_path / KEY.file).rename(tmp_path / other.file)
    assert "another's name" in store.find_damage()[0]
    with pytest.warns(RuntimeWarning, match="another's name"):
        assert store.read(other) is None


def test_the_longest_unused_go_first(tmp_path: Path) -> None:
    keys = [replace(KEY, seed=seed) for seed in range(4)]
    unlimited = MidpointStore(tmp_path)
    for number, key in enumerate(keys[:3]):
        unlimited.write(make(key))
        os.utime(tmp_path / key.file, ns=(number, number))
    size = max(unlimited.sizes().values())
    store = MidpointStore(tmp_path, max_bytes=3 * size)
    stored(store, keys[0])  # used just now
    (tmp_path / f"{KEY.file}x1.tmp").touch()
    os.utime(tmp_path / f"{KEY.file}x1.tmp", (0, 0))
    (tmp_path / f"{KEY.file}x2.tmp").touch()  # somebody may be writing it
    (tmp_path / "mine.safetensors").touch()
    store.write(make(keys[3]))
    assert {file.name for file in store.sizes()} == {keys[index].file for index in (0, 2, 3)}
    assert {entry.name for entry in tmp_path.iterdir() if entry.suffix == ".tmp"} == {f"{KEY.file}x2.tmp"}
    MidpointStore(tmp_path, max_bytes=1).write(make(keys[1]))
    assert {file.name for file in store.sizes()} == {keys[1].file}
    store.clear()
    assert {entry.name for entry in tmp_path.iterdir()} == {"mine.safetensors"}


def test_bad_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"`midpoints` must be a folder, got the file .*file\. Choose another"):
        MidpointStore(tmp_path / "file")
    with pytest.raises(CacheError, match="must be writable"):
        MidpointStore(tmp_path / "file" / "below").write(make())
    with pytest.raises(ConfigurationError, match=r"`max_bytes` must be an integer >= 1, got 0"):
        MidpointStore(tmp_path, max_bytes=0)
    (tmp_path / KEY.file).mkdir()
    with pytest.raises(CacheError, match="must be a regular file"):
        MidpointStore(tmp_path).read(KEY)
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "user"))
    assert MidpointStore().folder == tmp_path / "user" / "midpoints"
    monkeypatch.setenv(DIRECTORY_VARIABLE, "")
    with pytest.raises(ConfigurationError, match=rf"`midpoints` must be a folder where {DIRECTORY_VARIABLE} is empty"):
        MidpointStore()


def test_two_processes_in_one_folder(tmp_path: Path) -> None:
    """Both write and read the same few midpoints, in a store too small for them: never a part of one, nor an error."""
    code = (
        "import sys, dataclasses, numpy\n"
        "from tests.trajectories.test_midpoints import *\n"
        "store = MidpointStore(sys.argv[1], max_bytes=3000)\n"
        "for turn in range(150):\n"
        "    midpoint = make(replace(KEY, seed=turn % 5))\n"
        "    found = store.read(midpoint.key)\n"
        "    if found is None:\n"
        "        store.write(midpoint)\n"
        "    else:\n"
        "        numpy.testing.assert_array_equal(found.tensors['latent'], midpoint.tensors['latent'])\n"
    )
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code, str(tmp_path / "store")],
            cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for _ in range(2)
    ]  # fmt: skip
    for process in running:
        _, error = process.communicate()
        assert process.returncode == 0, error
    assert MidpointStore(tmp_path / "store").find_damage() == []
