"""The lowest versions that the light core allows, as constraints for pip: ``python -m tests.floors``."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path


def floors() -> dict[str, str]:
    """Version by distribution, as ``pyproject.toml`` states it."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    return dict(re.match(r"([\w-]+)>=([\d.]+)", line).groups() for line in project["dependencies"])  # type: ignore[union-attr,misc]


if __name__ == "__main__":
    for name, version in floors().items():
        print(f"{name}=={version}")
