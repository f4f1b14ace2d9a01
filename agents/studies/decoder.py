"""What a device gains that has the prior, too: ``python -m agents.evaluate --study decoder``.

At the deadline the device applies its copy of the network once to what it holds
(:mod:`refine_env.evaluation.decoding`). Every policy is played once, and scored without and with that; dp also plans
with the measured curve of the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import agents
from agents.studies.base import Request, Study, write_tables
from agents.studies.paired import interval, mean_and_interval, resample
from refine_env import SystemConfig, TrajectoryCache
from refine_env.commands import print_table
from refine_env.evaluation import (
    DECODED_COLUMN,
    EPISODE_COLUMNS,
    DecodingScorer,
    DeviceDecoder,
    Entry,
    Table,
    read_table,
)
from refine_env.trajectories.denoising import open_denoiser

__all__ = ["DECODER", "DECODER_COLUMNS", "VARIANTS", "Variant", "play_variants", "read_decoder", "summarize_decoder"]


class Variant(NamedTuple):
    """A policy of the study.

    Attributes:
        label: its name in table and figure.
        agent: of :func:`agents.make`.
        env_kwargs: environment arguments over the agent's own.
    """

    label: str
    agent: str
    env_kwargs: Mapping[str, Any]


# With the moments of the cache: the curves are of its trajectories, too, so that what dp expects can be held to it.
_LATENT, _MEAN = ({"payload": payload, "moments": "measured"} for payload in ("latent", "posterior_mean"))
_CURVE = {"device_decoder": "denoise"}
VARIANTS = (
    Variant("look-ahead, x_t", "lookahead-closed-loop", _LATENT),
    Variant("dp, x_t", "dp", _LATENT),
    Variant("dp with the curve, x_t", "dp", {**_LATENT, **_CURVE}),
    Variant("dp, y_t", "dp", _MEAN),
    Variant("dp with the curve, y_t", "dp", {**_MEAN, **_CURVE}),
)
"""All policies; the first is what the others' decoded errors are compared with."""

_INTERVALS = ("latent_mse", DECODED_COLUMN, "gain", "gain_over_first")
DECODER_COLUMNS: dict[str, type] = {
    "variant": str,
    "agent": str,
    "payload": str,
    "planned_with_curve": str,
    "snr_db": float,
    "episodes": int,
    "delivered_share": float,
    "predicted": float,
    **{f"{name}{end}": float for name in _INTERVALS for end in ("", "_low", "_high")},
}
"""Columns of ``decoder.csv``: per policy and SNR the mean latent MSE without and with the decoder, the ratio of the
two (``gain``), and the first policy's mean with the decoder over the own (``gain_over_first``), each with a 95 %
interval of the paired bootstrap; ``predicted`` is what a dp expects to end with, with the decoder if it plans so."""

_EPISODE_COLUMNS = {"variant": str, **EPISODE_COLUMNS, DECODED_COLUMN: float}
_OPTIONAL = ("predicted",)


def play_variants(
    request: Request, decoder: DeviceDecoder, variants: Sequence[Variant] = VARIANTS
) -> tuple[Table, dict[tuple[str, float], float]]:
    """Episodes of every policy at every SNR on common draws.

    Args:
        request: what is played.
        decoder: of the devices.
        variants: the policies.

    Returns:
        Rows of :data:`refine_env.evaluation.EPISODE_COLUMNS` with the columns ``variant`` and ``decoded_latent_mse``;
        and what policies expect to end with, by variant and SNR, where they say so.
    """
    rows: Table = []
    predicted: dict[tuple[str, float], float] = {}

    def make(config: SystemConfig, variant: Variant) -> agents.Agent:
        agent = agents.make(variant.agent, config)
        value = getattr(agent, "predicted_value", None)
        if value is not None:
            predicted[variant.label, config.single_snr_db("a study")] = float(value)
        return agent

    number = len(variants) * len(request.snrs_db) * request.episodes
    with request.progress(number, "decoder") as progress:
        for snr_db in request.snrs_db:  # one SNR after the other: tables of all optimal policies need much memory
            entries = [
                Entry(
                    lambda config, variant=variant: make(config, variant),  # type: ignore[misc]
                    {
                        **request.env_kwargs,
                        **agents.env_kwargs(variant.agent),
                        **variant.env_kwargs,
                        "snr_db": float(snr_db),
                    },
                )
                for variant in variants
            ]
            tables = request.roll_out(entries, progress, DecodingScorer(decoder))
            for variant, table in zip(variants, tables, strict=True):
                rows += [{"variant": variant.label, **row} for row in table]
    return rows, predicted


def summarize_decoder(
    table: Table, predicted: Mapping[tuple[str, float], float], variants: Sequence[Variant] = VARIANTS
) -> Table:
    """Means, gains and their intervals.

    Args:
        table, predicted: what :func:`play_variants` gives.
        variants: the policies.

    Returns:
        Rows of :data:`DECODER_COLUMNS`.
    """
    keys = ("variant", "snr_db")
    held, decoded = (resample(table, keys, column) for column in ("latent_mse", DECODED_COLUMN))
    groups: dict[tuple[Any, ...], Table] = {}
    for row in table:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    of_label = {variant.label: variant for variant in variants}
    return [
        {
            "variant": label,
            "agent": of_label[label].agent,
            "payload": rows[0]["payload"],
            "planned_with_curve": "yes" if "device_decoder" in of_label[label].env_kwargs else "no",
            "snr_db": snr_db,
            "episodes": len(rows),
            "delivered_share": float(np.mean([row["num_deliveries"] > 0 for row in rows])),
            "predicted": predicted.get((label, snr_db)),
            **mean_and_interval("latent_mse", held[label, snr_db]),
            **mean_and_interval(DECODED_COLUMN, decoded[label, snr_db]),
            **interval("gain", held[label, snr_db] / decoded[label, snr_db]),
            **interval("gain_over_first", decoded[variants[0].label, snr_db] / decoded[label, snr_db]),
        }
        for (label, snr_db), rows in groups.items()
    ]


def read_decoder(folder: Path) -> Table:
    """Read ``decoder.csv``.

    Returns:
        Rows of :data:`DECODER_COLUMNS`.

    Raises:
        ConfigurationError: if the file is missing, or not such a table.
    """
    command = "python -m agents.evaluate --study decoder"
    return read_table(folder / "decoder.csv", DECODER_COLUMNS, optional=_OPTIONAL, command=command)


def _print(summary: Table) -> None:
    """The decoded errors and the gains on the terminal."""
    labels = list(dict.fromkeys(row["variant"] for row in summary))
    cells = {(row["variant"], row["snr_db"]): row for row in summary}
    print_table(
        {"SNR [dB]": "right", **dict.fromkeys(labels, "right")},
        (
            [
                f"{snr_db:g}",
                *(
                    f"{cells[label, snr_db][DECODED_COLUMN]:.3g}\n[dim]×{cells[label, snr_db]['gain']:.2f}[/dim]"
                    for label in labels
                ),
            ]
            for snr_db in dict.fromkeys(row["snr_db"] for row in summary)
        ),
        title="latent MSE with the device's decoder",
        notes=["Second line: what the latent MSE without it is times that."],
    )


def _run(request: Request) -> tuple[list[Path], dict[str, Any]]:
    """Play the study, write and show its tables."""
    cache = TrajectoryCache.open(request.env_kwargs["cache"])
    table, predicted = play_variants(request, DeviceDecoder(cache, open_denoiser(cache)))
    summary = summarize_decoder(table, predicted)
    tables = {"episodes.csv": (table, _EPISODE_COLUMNS), "decoder.csv": (summary, DECODER_COLUMNS)}
    written = write_tables(request.out, tables)
    _print(summary)
    return written, {"variants": [variant._asdict() for variant in VARIANTS]}


DECODER = Study(
    "decoder",
    "what a device gains that has the prior, too",
    tuple(map(float, range(-9, 16, 3))),
    300,
    _run,
)
