"""The wheel holds the package with its caches and its models, and nothing else."""

from __future__ import annotations

import email
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import refine_env
from refine_env.trajectories.pipeline import BUNDLED_MODELS
from tests.floors import floors

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
    for model in BUNDLED_MODELS:
        assert f"refine_env/models/{model}/model_index.json" in names
    assert "refine_env/models/radiomap/map.json" in names
    assert "refine_env/models/emoji-glyphs.npz" in names
    for cache, most in (("default", 28), ("radiomap", 16)):
        files = [path for path in (ROOT / "cached_trajectories" / cache).iterdir() if path.suffix != ".partial"]
        assert len(files) > 2
        for file in files:
            assert f"refine_env/cached_trajectories/{cache}/{file.name}" in names
        assert sum(file.stat().st_size for file in files) < most * 1e6


CORE = {"numpy", "scipy", "gymnasium", "numba", "platformdirs", "safetensors", "typer", "rich", "tqdm"}


def test_metadata(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("dist-info/METADATA"))
    metadata = email.message_from_bytes(wheel.read(name))
    assert metadata["Version"] == refine_env.__version__
    core = [line for line in metadata.get_all("Requires-Dist") or [] if "extra ==" not in line]
    names = {line.split(">")[0].split("<")[0].strip() for line in core}
    assert names == CORE
    assert set(metadata.get_all("Provides-Extra") or []) == {
        "train", "entropy", "generate", "dask", "ray", "images", "ldm", "perceptual", "plot", "render", "report",
        "docs", "test", "all",
    }  # fmt: skip


def test_torch_is_pinned_for_the_tests() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "torch==2.13.0" in project["optional-dependencies"]["test"]


def test_every_dependency_of_the_core_has_a_floor() -> None:
    assert set(floors()) == CORE


@pytest.mark.parametrize("options", [(), ("-n", "2")])
@pytest.mark.parametrize("allowed", [True, False])
def test_what_is_skipped_is_said_or_fails(tmp_path: Path, options: tuple[str, ...], allowed: bool) -> None:
    """One line a reason, of tests and whole files alike."""
    (tmp_path / "test_a.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('k', [1, 2])\n"
        "def test_a(k): pytest.skip('needs a moon')\n"
        "def test_b(): pass\n"
    )
    (tmp_path / "test_c.py").write_text("import pytest\npytest.skip('needs a sun', allow_module_level=True)\n")
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "--continue-on-collection-errors", *options]
    result = subprocess.run(
        command if allowed else [*command, "--no-skips"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("left out")]
    if not allowed:
        assert result.returncode != 0
        assert result.stdout.count("must not be skipped here: needs a moon") >= 2
        assert "must not be skipped here: needs a sun" in result.stdout
        assert lines == []
    else:
        assert result.returncode == 0, result.stdout
        assert lines == ["left out: 2 tests: needs a moon", "left out: 1 file: needs a sun"]
