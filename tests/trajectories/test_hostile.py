"""Whatever a cache's files hold: opening, `info` and `verify` end in success or one CacheError, and print only text."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refine_env import CacheError, CacheFormatError, NoiseSchedule, TrajectoryCache, cli
from refine_env.trajectories import generate_gaussian, read_manifest
from refine_env.trajectories.writer import RECIPE_FILE, CacheWriter

from .manifests import read_values, write_text, write_values

SCHEDULE = NoiseSchedule([1.0, 0.9, 0.6, 0.05])
TERMINAL = "\x1b[2J\x1b]0;title\x07\x9b31m\u202e\r\b\x7f"

# As JSON text, since some of them are no Python values.
HOSTILE = {
    "null": "null",
    "true": "true",
    "minus one": "-1",
    "zero": "0",
    "fraction": "1.5",
    "largest float": "1.7e308",
    "past float": "1e999",
    "infinity": "Infinity",
    "minus infinity": "-Infinity",
    "nan": "NaN",
    "2^70": str(2**70),
    "10^400": "1" + "0" * 400,
    "5000 digits": "9" * 5000,
    "empty list": "[]",
    "empty object": "{}",
    "empty text": '""',
    "list of null": "[null]",
    "lists of lists": "[[1, 2], [3]]",
    "digits": '"12"',
    "zero byte": '"\\u0000"',
    "surrogate": '"\\ud800"',
    "surrogate as a name": '{"\\udfff": 1}',
    "terminal": json.dumps(TERMINAL),
    "terminal as a name": json.dumps({TERMINAL: TERMINAL}),
    "long": json.dumps("long" * 10_000),
    "40 deep": "[" * 40 + "]" * 40,
    "900 deep": '{"a":' * 900 + "1" + "}" * 900,
    "5000 deep": "[" * 5000 + "]" * 5000,
    "5000 objects deep": '{"a":' * 5000 + "1" + "}" * 5000,
}
PLACE = "the place of a hostile value"


def make(path: Path) -> Path:
    return generate_gaussian(path, 5, (1, 2), schedule=SCHEDULE, seed=5, shard_size=3, num_train=2).path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five trajectories in two shards, whose manifest has all fields that one may have."""
    folder = make(tmp_path_factory.mktemp("whole") / "cache")
    values = read_values(folder)
    values["trajectories"][0]["prompt"] = "a cat"
    values |= {
        "model": {"id": "emoji", "revision": "1"},
        "scheduler": {
            "class": "DDPMScheduler",
            "config": {
                "beta_schedule": "linear",
                "beta_start": 0.01,
                "beta_end": 0.02,
                "num_train_timesteps": 9,
                "trained_betas": None,
                "rescale_betas_zero_snr": False,
            },
        },
        "timesteps": [8, 3, 0],
        "guidance_scale": 2.0,
        "batch_size": 3,
        "model_dtype": "float32",
        "device": "cpu",
        "clean_latents": {"name": "x.npy", "sha256": "0"},
        "prompt_source": {"file": "prompts.txt", "sha256": "0", "column": None},
        "note": "CC0",
    }
    write_values(folder, values)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    shutil.copytree(whole, tmp_path / "cache")
    return tmp_path / "cache"


def spoiled(values: Any) -> Iterator[tuple[str, Any]]:
    """Name and copy of JSON values with each of them, first and last ones of lists, in turn replaced by PLACE."""
    if isinstance(values, dict):
        for key in values:
            yield from ((f".{key}{name}", {**values, key: inner}) for name, inner in spoiled(values[key]))
        yield ".more", {**values, "more": PLACE}
    elif isinstance(values, list):
        for index in sorted({0, len(values) - 1}) if values else ():
            for name, inner in spoiled(values[index]):
                yield f"[{index}]{name}", [*values[:index], inner, *values[index + 1 :]]
    yield "", PLACE


def assert_withstood(folder: Path, what: str, capsys: pytest.CaptureFixture[str], *, thorough: bool) -> bool:
    """Open, describe and verify a cache, ``thorough`` with every command; whether it was opened."""
    try:
        cache = TrajectoryCache.open(folder)
    except CacheError as error:
        message = str(error)
        assert message.isprintable(), f"{what}: {message!r}"
        assert len(message) < 1000, what
        assert str(folder) in message, what
        opened, codes, commands = False, {1, 3}, [["verify", "-q"]] * thorough
    else:
        with contextlib.suppress(CacheError):
            cache.verify(deep=True)
        opened, codes, commands = True, {0, 1}, [["info"], *([["info", "--json"], ["verify", "--deep"]] * thorough)]
    for command in commands:
        with pytest.raises(SystemExit, match=r"^\d$") as end:
            cli.main([*command, str(folder)])
        captured = capsys.readouterr()
        assert end.value.code in codes, f"{what}: {command}"
        text = captured.out + captured.err.replace("\rverifying", "verifying")  # the bar's own way back
        assert all(line.isprintable() for line in text.split("\n")), f"{what}: {command}: {text!r}"
        text.encode()
    return opened


def test_any_value_of_any_field_of_the_manifest(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = opened = 0
    for name, values in spoiled(read_values(folder)):
        text = json.dumps(values)
        for kind, hostile in HOSTILE.items():
            write_text(folder, text.replace(json.dumps(PLACE), hostile))
            opened += assert_withstood(folder, f"{kind} as {name}", capsys, thorough=count % 10 == 0)
            count += 1
    assert count > 2000
    assert 100 < opened < count / 4


def test_any_value_of_any_field_of_a_shard_header(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The manifest gives the file's true size and hash, so that it is the header that is at fault."""
    file = min(folder.glob("*.safetensors"))
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length]) | {"__metadata__": {"format": "pt"}}
    values = read_values(folder)
    count = opened = 0
    for name, spoiled_header in spoiled(header):
        for kind, hostile in HOSTILE.items():
            text = json.dumps(spoiled_header).replace(json.dumps(PLACE), hostile).encode()
            file.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            values["shards"][0].update(bytes=file.stat().st_size, sha256=digest)
            write_values(folder, values)
            opened += assert_withstood(folder, f"{kind} as {name}", capsys, thorough=count % 10 == 0)
            count += 1
    assert count > 400
    assert 50 < opened < count / 2


def test_any_value_of_any_field_of_an_interrupted_generation(whole: Path, tmp_path: Path) -> None:
    recipe = read_manifest(whole)[0].recipe
    staging = tmp_path / "cache.partial"
    count = 0
    for _, values in spoiled(recipe.to_dict() | {"trajectories": [{"prompt": None, "seed": 1}], "alpha_bar": [1.0]}):
        text = json.dumps(values)
        for hostile in HOSTILE.values():
            staging.mkdir(exist_ok=True)
            write_text(staging, text.replace(json.dumps(PLACE), hostile))
            (staging / "manifest.json").rename(staging / RECIPE_FILE)
            with pytest.raises(CacheError, match="must") as caught:
                CacheWriter(tmp_path / "cache", recipe)
            assert str(caught.value).isprintable()
            count += 1
    assert count > 1000


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="pipes in the file system are POSIX's")
@pytest.mark.parametrize("kind", ["shard", "manifest", "device", "folder"])
def test_file_that_is_none(folder: Path, kind: str) -> None:
    """In another process, which can be ended should it wait for a writer."""
    file = folder / "manifest.json" if kind == "manifest" else min(folder.glob("*.safetensors"))
    file.unlink()
    if kind == "device":
        file.symlink_to("/dev/zero")
    elif kind == "folder":
        file.mkdir()
    else:
        os.mkfifo(file)
    code = (
        "import sys\n"
        "from refine_env import TrajectoryCache, CacheError, cli\n"
        "for command in ('info', 'verify'):\n"
        "    try:\n"
        "        cli.main([command, sys.argv[1]])\n"
        "    except SystemExit as end:\n"
        "        print(end.code)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True, timeout=120)
    assert run.stdout == ("3\n3\n" if kind == "manifest" else "3\n1\n"), run.stderr
    assert ("must be the name or the folder" if kind == "manifest" else "must be a regular file, got") in run.stderr


@pytest.mark.parametrize("sealed", [True, False])
def test_whole_file_is_something_else(folder: Path, sealed: bool) -> None:
    for content in (*HOSTILE.values(), "", "{", "{}", "\0" * 8):
        write_text(folder, content, sealed=sealed)
        with pytest.raises(CacheFormatError, match=r"manifest\.json must be a JSON object|`format` in"):
            TrajectoryCache.open(folder)


def test_file_without_end(folder: Path) -> None:
    with (folder / "manifest.json").open("r+b") as handle:
        handle.truncate(1 << 40)  # a hole: it takes no room on the disk
    with pytest.raises(CacheFormatError, match="must have at most 134217728 bytes, got more"):
        TrajectoryCache.open(folder)


class TestSeal:
    def test_every_changed_byte_is_found(self, folder: Path, rng: np.random.Generator) -> None:
        file = folder / "manifest.json"
        raw = file.read_bytes()
        for position in range(len(raw)):
            changed = bytearray(raw)
            changed[position] ^= int(rng.integers(1, 256))
            file.write_bytes(changed)
            with pytest.raises(CacheError, match=r"manifest\.json"):
                TrajectoryCache.open(folder)
        for bit, position in itertools.product(range(8), rng.choice(len(raw), 10, replace=False)):
            changed = bytearray(raw)
            changed[position] ^= 1 << bit
            file.write_bytes(changed)
            with pytest.raises(SystemExit, match="^3$"):
                cli.main(["verify", "-q", str(folder)])

    def test_nothing_is_added_removed_or_disguised_as_the_older_format(self, folder: Path) -> None:
        file = folder / "manifest.json"
        raw = file.read_bytes()
        for changed in (
            raw[:-1],
            raw + b"\n",
            raw.replace(b'"format_version": 2', b'"format_version": 1'),
            json.dumps(read_values(folder)).encode(),
            json.dumps(json.loads(raw)).encode(),
        ):
            file.write_bytes(changed)
            with pytest.raises(CacheFormatError, match=r"`manifest_sha256` in .* must be the hash of what stands"):
                TrajectoryCache.open(folder)


class TestVersion1:
    @pytest.fixture
    def old(self, folder: Path) -> Path:
        write_values(folder, read_values(folder) | {"format_version": 1, "scheduler": None, "timesteps": None})
        return folder

    def test_is_read_and_said_to_be_unprotected(self, old: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert not TrajectoryCache.open(old).manifest.is_sealed
        with pytest.raises(SystemExit, match="^0$"):
            cli.main(["verify", "-q", str(old)])
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "is of format version 1, which holds no hash of itself, so it is not protected" in error

    def test_is_left_as_it_is_or_written_anew(self, tmp_path: Path) -> None:
        old = make(tmp_path / "cache")
        raw = (old / "manifest.json").read_bytes()
        write_values(old, read_values(old) | {"format_version": 1})
        unsealed = (old / "manifest.json").read_bytes()
        make(old)  # the same request: it is finished
        assert (old / "manifest.json").read_bytes() == unsealed
        generate_gaussian(old, 5, (1, 2), schedule=SCHEDULE, seed=5, shard_size=3, num_train=2, overwrite=True)
        assert (old / "manifest.json").read_bytes() == raw

    @pytest.mark.parametrize("name", ["generation.json", "manifest.json"])
    def test_interrupted_generation_goes_on(self, tmp_path: Path, name: str) -> None:
        """From each of the two files that say what is in the making; shards that are there are kept."""
        cache = TrajectoryCache.open(make(tmp_path / "cache"))
        content = {file.name: file.read_bytes() for file in cache.path.iterdir()}
        staging = cache.path.rename(tmp_path / "cache.partial")
        write_values(staging, read_values(staging) | {"format_version": 1})
        (staging / "manifest.json").rename(staging / name)
        first, second = sorted(staging.glob("*.safetensors"))
        second.unlink()
        inode = first.stat().st_ino
        make(cache.path)
        assert {file.name: file.read_bytes() for file in cache.path.iterdir()} == content
        assert (cache.path / first.name).stat().st_ino == inode


class TestDeep:
    """`verify --deep` needs no hash of the manifest: it recomputes."""

    @pytest.fixture
    def old(self, whole: Path, tmp_path: Path) -> Path:
        """Of format version 1, with the ᾱ of a scheduler."""
        beta = np.linspace(0.01, 0.02, 1000)
        timesteps = [900, 400, 0]
        alpha_bar = np.cumprod(1.0 - beta)[timesteps[::-1]]
        folder = generate_gaussian(
            tmp_path / "cache", 5, (1, 2), schedule=NoiseSchedule([1.0, *alpha_bar]), shard_size=3, num_train=2
        ).path
        config = read_values(whole)["scheduler"]["config"] | {"num_train_timesteps": 1000}
        write_values(
            folder,
            read_values(folder)
            | {"format_version": 1, "scheduler": {"class": "DDPMScheduler", "config": config}, "timesteps": timesteps},
        )
        return folder

    def test_whole(self, old: Path, capsys: pytest.CaptureFixture[str]) -> None:
        TrajectoryCache.open(old).verify(deep=True)
        with pytest.raises(SystemExit, match="^0$"):
            cli.main(["verify", "--deep", str(old)])
        assert "second moments, mean squares, seeds, and ᾱ." in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("name", "match"),
        [
            ("mean_square", "`mean_square` in .* must be that of the shards, got another .*greatest difference is"),
            ("second_moments", "`second_moments` in .* must be that of the shards"),
            ("clean_second_moments", "`clean_second_moments` in .* must be that of the shards"),
            ("alpha_bar", "`alpha_bar` in .* must be that of the scheduler's β at its timesteps"),
            ("trajectories", r"`trajectories\[4\].seed` in .* must be \d+, which follows from the base seed 0, got 1"),
            ("seed", r"`trajectories\[0\].seed` in .* must be \d+, which follows from the base seed 3"),
        ],
    )
    def test_changed_field(self, old: Path, name: str, match: str, capsys: pytest.CaptureFixture[str]) -> None:
        values = read_values(old)
        if name == "seed":
            values["seed"] = 3
        elif name == "trajectories":
            values[name][-1]["seed"] = 1
        else:
            rows = values[name][-1] if isinstance(values[name][-1], list) else values[name]
            rows[-1] *= 1.001
        write_values(old, values)
        cache = TrajectoryCache.open(old)
        cache.verify()
        with pytest.raises(CacheFormatError, match=match):
            cache.verify(deep=True)
        with pytest.raises(SystemExit, match="^1$"):
            cli.main(["verify", "--deep", "-q", str(old)])
        assert "is damaged in 1 place." in capsys.readouterr().err

    def test_shards_that_are_not_finite(self, old: Path) -> None:
        """A forged shard with its true hash."""
        file = min(old.glob("*.safetensors"))
        content = file.read_bytes()
        file.write_bytes(content[:-2] + b"\xff\xff")
        values = read_values(old)
        values["shards"][0]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
        write_values(old, values)
        with pytest.raises(CacheFormatError, match="must be that of the shards, got another .*difference is nan"):
            TrajectoryCache.open(old).verify(deep=True)
