"""Tables of episodes and their summaries: the columns, and their form on the disk, CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from refine_env._files import write_atomically
from refine_env.dynamics.process import FULL_LATENT_MSE
from refine_env.errors import ConfigurationError

__all__ = [
    "DECODED_COLUMN",
    "EPISODE_COLUMNS",
    "FURTHER_COLUMNS",
    "IMAGE_COLUMNS",
    "SUMMARY_COLUMNS",
    "Table",
    "episode_columns",
    "read_table",
    "summary_columns",
    "write_table",
]

Table = list[dict[str, Any]]
"""Rows of equal keys."""

IMAGE_COLUMNS = ("psnr_db", "ssim", "lpips")
"""Metrics of the decoded image, in a table of episodes and, as means, in a summary; None, an empty cell, where they
were not computed. Tables without these columns are read as if they were empty."""

DECODED_COLUMN = "decoded_latent_mse"
"""What the device scores with its decoder, in tables that were asked for it: see :class:`DecodingScorer`."""

FURTHER_COLUMNS: dict[str, type] = {
    DECODED_COLUMN: float,
    "anytime_mse": float,
    "slots_to_target": int,
    "task_glyph": float,
    "task_group": float,
    "task_coverage": float,
    "task_transmitter": float,
    "task_truth": float,
    FULL_LATENT_MSE: float,
}
"""Columns that a table of episodes and, as means, a summary have only where they were asked for, after all others.

``anytime_mse`` is the mean over the slots of the latent MSE that the device shows after each; ``slots_to_target`` the
first slot after which that is below the target, T_d + 1 if it never is; ``task_glyph`` and ``task_group`` are 1 where
:class:`refine_env.metrics.GlyphTask` recognizes in the decoded image what it does in the clean one, else 0;
``task_coverage``, ``task_transmitter`` and ``task_truth`` are what :class:`refine_env.metrics.MapTask` says of a radio
map: intersection over union of the covered places with those of the clean map, the share of them with the right one of
two transmitters, and intersection over union with the true map's, the latter two where the cache has what they need;
``full_latent_mse`` the latent MSE against the x_0 of the full run, in all tables of a cache that has full runs."""


def interval_columns(name: str) -> tuple[str, str, str]:
    """A summary's columns of a mean and the ends of its interval."""
    return name, f"{name}_low", f"{name}_high"


_OPTIONAL_COLUMNS = (
    "scored_episodes",
    *(column for name in (*IMAGE_COLUMNS, *FURTHER_COLUMNS) for column in interval_columns(name)),
)

EPISODE_COLUMNS: dict[str, type] = {
    "agent": str,
    "snr_db": float,
    "episode": int,
    "seed": int,
    "trajectory": int,
    "latent_mse": float,
    "no_delivery_mse": float,
    "device_step": int,
    "device_bits": int,
    "num_deliveries": int,
    "bits_sent": float,
    "uplink_slots": int,
    "coder": str,
    "payload": str,
    **dict.fromkeys(IMAGE_COLUMNS, float),
}
"""Columns of a table of episodes. ``no_delivery_mse`` is what the episode's device would score with nothing
delivered, ``device_step`` = T means just that, ``uplink_slots`` = 0 an uplink that never finished."""

SUMMARY_COLUMNS: dict[str, type] = {
    "agent": str,
    "snr_db": float,
    "episodes": int,
    "latent_mse": float,
    "ci_low": float,
    "ci_high": float,
    "no_delivery_mse": float,
    "delivered_share": float,
    "mean_device_step": float,
    "mean_num_deliveries": float,
    "mean_bits_sent": float,
    "coder": str,
    "payload": str,
    "scored_episodes": int,
    **{column: float for name in IMAGE_COLUMNS for column in interval_columns(name)},
}
"""Columns of a summary: one row per agent, SNR, coder and payload, ``ci_low`` … ``ci_high`` a 95 % bootstrap interval
of the mean ``latent_mse``; and likewise the image metrics' means over the ``scored_episodes``, with ``_low`` and
``_high``."""


def episode_columns(rows: Table) -> dict[str, type]:
    """:data:`EPISODE_COLUMNS`, and those of :data:`FURTHER_COLUMNS` that a table of episodes has."""
    return {**EPISODE_COLUMNS, **{name: kind for name, kind in FURTHER_COLUMNS.items() if rows and name in rows[0]}}


def summary_columns(rows: Table) -> dict[str, type]:
    """:data:`SUMMARY_COLUMNS`, and those of :data:`FURTHER_COLUMNS` that a summary has, with their intervals' ends."""
    further = [name for name in FURTHER_COLUMNS if rows and name in rows[0]]
    return {**SUMMARY_COLUMNS, **{column: float for name in further for column in interval_columns(name)}}


def write_table(path: Path, rows: Iterable[Mapping[str, Any]], columns: Mapping[str, type]) -> None:
    """Write rows as CSV, atomically; numbers in full precision."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([row[name] for name in columns] for row in rows)
    write_atomically(path, buffer.getvalue())


def read_table(
    path: Path,
    columns: Mapping[str, type],
    *,
    optional: Collection[str] = _OPTIONAL_COLUMNS,
    command: str = "python -m agents.evaluate",
) -> Table:
    """Read what :func:`write_table` wrote.

    Args:
        path: the file.
        columns: to read.
        optional: those of them that a file may lack or leave empty, which gives None.
        command: that makes such a table, for the messages.

    Raises:
        ConfigurationError: if the file is missing or empty, its columns are not these, or a number is none or not
            finite.
    """
    if not path.is_file():
        raise ConfigurationError(
            f"`{path.name}` must be a table of an evaluation, got no file at {path}. Make one with: {command}"
        )
    remedy = f"Make it anew with: {command}"
    rows: Table = []
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        missing = [name for name in columns if name not in (*(reader.fieldnames or []), *optional)]
        if missing:
            raise ConfigurationError(
                f"`{path.name}` must have the columns {', '.join(columns)}, got none named {', '.join(missing)}. "
                f"{remedy}"
            )
        try:
            rows.extend(
                {
                    name: None if name in optional and row.get(name, "") == "" else _parse(kind, row[name])
                    for name, kind in columns.items()
                }
                for row in reader
            )
        except (ValueError, TypeError, csv.Error) as error:
            raise ConfigurationError(
                f"`{path.name}` must hold a value of the right kind in every column, got {error} in line "
                f"{reader.line_num}. {remedy}"
            ) from None
    if not rows:
        raise ConfigurationError(f"`{path.name}` must have rows, got none below the header. {remedy}")
    return rows


def _parse(kind: type, text: str) -> Any:
    value = kind(text)
    if kind is float and not math.isfinite(value):
        raise ValueError(text)
    return value
