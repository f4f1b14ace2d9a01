"""The wheel holds the package with its default cache and its model, and nothing else."""

from __future__ import annotations

import email
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import refine_env

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)],
        check=True,
        capture_output=True,
        timeout=300,
    )
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_contents(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert {name.split("/")[0] for name in names} == {"refine_env", f"refine_env-{refine_env.__version__}.dist-info"}
    assert "refine_env/py.typed" in names
    assert "refine_env/cached_trajectories/default/manifest.json" in names
    assert "refine_env/models/emoji/model_index.json" in names
    shards = [path.name for path in (ROOT / "cached_trajectories" / "default").glob("*.safetensors")]
    assert shards
    for shard in shards:
        assert f"refine_env/cached_trajectories/default/{shard}" in names


def test_metadata(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("dist-info/METADATA"))
    metadata = email.message_from_bytes(wheel.read(name))
    assert metadata["Version"] == refine_env.__version__
    core = [line for line in metadata.get_all("Requires-Dist") or [] if "extra ==" not in line]
    names = {line.split(">")[0].split("<")[0].strip() for line in core}
    assert names == {"numpy", "scipy", "gymnasium", "numba", "safetensors", "typer", "rich", "tqdm"}
    assert set(metadata.get_all("Provides-Extra") or []) == {
        "train", "entropy", "generate", "dask", "ray", "images", "ldm", "perceptual", "plot", "render", "report",
        "test", "all",
    }  # fmt: skip


def test_torch_is_pinned_for_the_tests() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "torch==2.13.0" in project["optional-dependencies"]["test"]
