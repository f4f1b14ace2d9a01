"""What is kept of compiled kernels is used while no kernel source has changed, and not after."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

CALLEE = """
from typing import NamedTuple
from refine_env._compiled import kernel

class Line(NamedTuple):
    slope: float

@kernel
def value(line, x):
    return line.slope * x + {offset}
"""
CALLER = """
from refine_env._compiled import kernel
from package.callee import Line, value

@kernel
def twice(line, x):
    return 2.0 * value(line, x)

"""
RUN = """
from package.caller import Line, twice
print(twice(Line(3.0), 1.0), sum(twice.stats.cache_hits.values()))
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "callee.py").write_text(CALLEE.format(offset=1.0))
    (folder / "caller.py").write_text(CALLER)
    return folder


def run(package: Path) -> str:
    """What the caller gives in a fresh process, and how many of its overloads were found on disk."""
    path = os.pathsep.join([str(ROOT), str(package.parent)])
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    environment.pop("NUMBA_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", RUN], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    return done.stdout.strip()


def test_a_caller_is_compiled_anew_when_a_callee_in_another_file_changes(package: Path) -> None:
    assert run(package) == "8.0 0"
    assert run(package) == "8.0 1"
    # As an upgrade in place does it: the same size, and a time of its own.
    callee = package / "callee.py"
    before = callee.stat()
    callee.write_text(CALLEE.format(offset=2.0))
    os.utime(callee, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert run(package) == "10.0 0"
    assert run(package) == "10.0 1"


def test_a_renamed_tuple_is_no_error(package: Path) -> None:
    assert run(package) == "8.0 0"
    for path in (package / "callee.py", package / "caller.py"):
        path.write_text(path.read_text().replace("Line", "Affine"))
    (package / "caller.py").write_text((package / "caller.py").read_text() + "\nLine = Affine\n")
    assert run(package) == "8.0 0"


def test_a_file_without_kernels_does_not_matter(package: Path) -> None:
    assert run(package) == "8.0 0"
    (package / "other.py").write_text("x = 1\n")
    assert run(package) == "8.0 1"
