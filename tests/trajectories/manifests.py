"""Manifests as somebody else might write them: any values, with the hash that fits them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from refine_env.trajectories.manifest import MANIFEST_FILE, _seal


def read_values(folder: Path) -> dict[str, Any]:
    """The fields of a cache's manifest, without its hash."""
    values: dict[str, Any] = json.loads((folder / MANIFEST_FILE).read_bytes())
    values.pop("manifest_sha256", None)
    return values


def write_text(folder: Path, text: str, *, sealed: bool = True) -> None:
    """Write the text of a JSON object as a manifest, by default with its hash."""
    body = text.rstrip().removesuffix("}").encode()
    (folder / MANIFEST_FILE).write_bytes(_seal(body) if sealed else text.encode())


def write_values(folder: Path, values: dict[str, Any]) -> None:
    """Write fields as a manifest: with its hash, unless they are of format version 1."""
    write_text(folder, json.dumps(values), sealed=values.get("format_version") != 1)
