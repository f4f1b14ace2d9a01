"""Which assumption of [K] holds how well: ``python -m agents.evaluate --study assumptions``.

Three tables. ``chains.csv``: the coding error along chains of refinements, realized against predicted, and the
correlation of coding error and distance to x_0 that Eq. (8) neglects. ``coverage.csv``: how often a message is through
within the latency that Eq. (11) promises. ``guidance.csv``: what guidance does to the latents' power, and so to a
quantizer made for variance 1, which is what flattens [K]'s Fig. 2b.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import agents
from agents.studies.base import Request, Study, common_settings
from agents.studies.distortion import tabulate_quantization
from agents.studies.few_steps import few_step_cache
from agents.studies.paired import mean_and_interval, resample
from refine_env import SystemConfig, TrajectoryCache
from refine_env.coding import CODERS, base_distortion
from refine_env.commands import print_table
from refine_env.config import PAPER_BIT_DEPTHS
from refine_env.evaluation import Entry, Table, bootstrap_interval, read_table, write_table
from refine_env.link import draw_rates, latency_quantiles

__all__ = [
    "ASSUMPTIONS",
    "CHAIN_COLUMNS",
    "COVERAGE_COLUMNS",
    "GUIDANCE_COLUMNS",
    "GUIDED_COLUMNS",
    "read_assumptions",
    "tabulate_chains",
    "tabulate_coverage",
]

LENGTHS = (1, 2, 3, 4, 6, 8)
LAST_STEPS = (0.0, 0.4)  # of T
CHAIN_BITS = (3, 4, 8, 10)
QUANTILES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
GUIDANCE_SCALES = (1.0, 2.0, 4.0, 7.5)
GUIDED_POLICIES = ("lookahead", "persistent-q8")
GUIDED_BITS = (3, 4, 6, 8, 10, 12)
_SIMULATED_MESSAGES = 100_000

CHAIN_COLUMNS: dict[str, type] = {
    "coder": str,
    **dict.fromkeys(("last_step", "bits", "length"), int),
    **dict.fromkeys(("predicted", "realized", "ratio", "ratio_low", "ratio_high"), float),
    **dict.fromkeys(("correlation", "correlation_low", "correlation_high"), float),
    "trajectories": int,
}
"""Columns of ``chains.csv``: for a coder, the last step, the bit depth and the number of messages of a chain from step
0.9 T down, the predicted and the realized coding error (1/M) E‖x̂_t − x_t‖², their ratio, and the correlation of
x̂_t − x_t with x_t − x_0 (empty at t = 0, where the latter is 0), with 95 % intervals over the trajectories."""

COVERAGE_COLUMNS: dict[str, type] = {
    "snr_db": float,
    "bits": int,
    "quantile": float,
    "law": str,
    "slots": int,
    **dict.fromkeys(("coverage", "simulated"), float),
}
"""Columns of ``coverage.csv``: per SNR, bit depth and q, the slots T̂_q that the ``paper``'s and the ``exact`` law
promise, and the probability that the message takes no longer: by the exact law, and in a simulation of 100,000
messages."""

GUIDANCE_COLUMNS: dict[str, type] = {
    "guidance_scale": float,
    **dict.fromkeys(("device_step", "step", "bits"), int),
    **dict.fromkeys(("model", "simulated", "simulated_low", "simulated_high"), float),
    **dict.fromkeys(("power", "largest"), float),
}
"""Columns of ``guidance.csv``: Fig. 2b at each guidance scale (see
:data:`agents.studies.distortion.QUANTIZATION_COLUMNS`), with the mean power (1/M) E‖x_0‖² and the largest |x_0|."""

GUIDED_COLUMNS: dict[str, type] = {
    "guidance_scale": float,
    "agent": str,
    "snr_db": float,
    **dict.fromkeys(("latent_mse", "latent_mse_low", "latent_mse_high"), float),
}
"""Columns of ``guided.csv``: look-ahead and Persistent-Q(8) at each guidance scale and SNR."""

_OPTIONAL = ("correlation", "correlation_low", "correlation_high")


def tabulate_chains(
    cache: TrajectoryCache,
    indices: Sequence[int],
    coder: str,
    *,
    bit_depths: Sequence[int] = CHAIN_BITS,
    lengths: Sequence[int] = LENGTHS,
    last_steps: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Table:
    """Coding errors along chains of refinements, realized against predicted.

    Args:
        cache: the trajectories.
        indices: indices of those to use.
        coder: ``"forward"`` or ``"closed_loop"``; the latter with the model's moments.
        bit_depths: b, the same in every message of a chain.
        lengths: numbers of messages; their steps are evenly spaced from 0.9 T to the last one.
        last_steps: steps that the chains end in; default 0 and 0.4 T.
        progress: called after each trajectory with 1.

    Returns:
        Rows of :data:`CHAIN_COLUMNS`.
    """
    config = SystemConfig(
        snr_db=6.0, latent_dim=cache.latent_dim, schedule=cache.schedule, bit_depths=tuple(bit_depths), coder=coder
    )
    made, model = config.make_coder(), config.refinement_model
    last_steps = _last_steps(cache.num_steps) if last_steps is None else last_steps
    cases = {
        tuple((int(step), bits) for step in _steps(cache.num_steps, last, length)): (last, bits, length)
        for last in last_steps
        for bits in bit_depths
        for length in lengths
    }
    chains = sorted(cases)
    errors = np.empty((len(indices), len(chains)))
    correlations = np.empty_like(errors)
    for i, index in enumerate(indices):
        latents = np.ascontiguousarray(cache.latents(index)).reshape(cache.num_steps + 1, -1)
        _, devices = made.score_chains(latents.view(np.uint16), chains, keep_devices=True)
        for k, chain in enumerate(chains):
            sent = latents[chain[-1][0]].astype(np.float64)
            coding, missing = devices[k] - sent, sent - latents[0]
            errors[i, k] = np.square(coding).mean()
            norms = np.linalg.norm(coding) * np.linalg.norm(missing)
            correlations[i, k] = coding @ missing / norms if norms > 0.0 else np.nan
        if progress is not None:
            progress(1)
    table: Table = []
    for k, chain in enumerate(chains):
        predicted, held = 0.0, cache.num_steps
        for step, bits in chain:
            predicted = float(model.residual_variance(step, held, predicted)) * base_distortion(bits)
            held = step
        last, bits, length = cases[chain]
        low, high = bootstrap_interval(errors[:, k])
        row = {"coder": coder, "last_step": last, "bits": bits, "length": length, "predicted": predicted}
        row |= {"realized": float(errors[:, k].mean()), "ratio": float(errors[:, k].mean()) / predicted}
        row |= {"ratio_low": low / predicted, "ratio_high": high / predicted, "trajectories": len(indices)}
        row |= dict.fromkeys(_OPTIONAL)
        if last > 0:
            row |= dict(
                zip(_OPTIONAL, (float(correlations[:, k].mean()), *bootstrap_interval(correlations[:, k])), strict=True)
            )
        table.append(row)
    return sorted(table, key=lambda row: (row["last_step"], row["bits"], row["length"]))


def _last_steps(num_steps: int) -> list[int]:
    return [round(share * num_steps) for share in LAST_STEPS]


def _steps(num_steps: int, last: int, length: int) -> NDArray[np.int64]:
    """The steps of a chain, evenly spaced; a single message sends the last one."""
    first = num_steps - num_steps // 10
    return np.round(np.linspace(first, last, length)).astype(np.int64) if length > 1 else np.array([last])


def tabulate_coverage(snrs_db: Sequence[float], latent_dim: int, seed: int) -> Table:
    """How often messages take no longer than the latency model promises.

    Args:
        snrs_db: mean SNRs [dB].
        latent_dim: M.
        seed: seed of the simulated slots.

    Returns:
        Rows of :data:`COVERAGE_COLUMNS`.
    """
    table: Table = []
    for snr_db in snrs_db:
        config = SystemConfig(snr_db=float(snr_db), latent_dim=latent_dim)
        exact, sizes = config.rate_law, [latent_dim * bits for bits in config.bit_depths]
        longest = int(latency_quantiles(latent_dim, config.bit_depths, exact, 0.999).max())
        late = exact.latency_sf(sizes, 2 * longest)
        link = config.link
        rates = draw_rates(
            np.random.default_rng([seed, round(1000 * snr_db) % 2**32]),
            _SIMULATED_MESSAGES + 2 * longest,
            link.num_subchannels,
            config.total_power(float(snr_db)),
            config.symbols_per_slot,
        )
        arrived = np.cumsum(rates)
        before = np.concatenate([[0.0], arrived])[:_SIMULATED_MESSAGES]
        for i, bits in enumerate(config.bit_depths):
            # Messages begin in neighboring slots, so that they share slots: many messages, fewer independent ones.
            taken = np.searchsorted(arrived, before + sizes[i]) + 1 - np.arange(_SIMULATED_MESSAGES)
            for quantile in QUANTILES:
                for name, law in (("paper", config.rate_statistics), ("exact", exact)):
                    slots = int(latency_quantiles(latent_dim, [bits], law, quantile)[0])
                    coverage = 1.0 - float(late[i, min(slots, 2 * longest)])
                    table.append(
                        {
                            "snr_db": float(snr_db),
                            "bits": bits,
                            "quantile": quantile,
                            "law": name,
                            "slots": slots,
                            "coverage": coverage,
                            "simulated": float((taken <= slots).mean()),
                        }
                    )
    return table


def _tabulate_guidance(
    request: Request, origin: TrajectoryCache, progress: Callable[[int], None]
) -> tuple[Table, Table]:
    """Fig. 2b, and the two policies, on trajectories of several guidance scales."""
    fig2b: Table = []
    episodes: Table = []
    for scale in GUIDANCE_SCALES:
        same = scale == origin.manifest.recipe.guidance_scale
        cache = origin if same else few_step_cache(origin, "ddpm", origin.num_steps, guidance_scale=scale)
        indices = [int(index) for index in cache.indices(str(request.env_kwargs["split"]))]
        clean = np.array([cache.latents(index)[0] for index in indices], dtype=np.float64)
        described = {"power": float(np.square(clean).mean()), "largest": float(np.abs(clean).max())}
        rows = tabulate_quantization(cache, indices, GUIDED_BITS, [(cache.num_steps, 0), (10, 0)])
        fig2b += [{"guidance_scale": scale, **row, **described} for row in rows]
        kwargs = {**request.env_kwargs, "cache": str(cache.path)}
        entries = [
            Entry(partial(agents.make, policy), {**kwargs, "snr_db": snr_db})
            for policy in GUIDED_POLICIES
            for snr_db in request.snrs_db
        ]
        for table in request.roll_out(entries, progress):
            episodes += [{"guidance_scale": scale, **row} for row in table]
    keys = ("guidance_scale", "agent", "snr_db")
    means = resample(episodes, keys, "latent_mse")
    guided = [
        {**dict(zip(keys, key, strict=True)), **mean_and_interval("latent_mse", values)}
        for key, values in means.items()
    ]
    return fig2b, guided


_TABLES = {
    "chains.csv": CHAIN_COLUMNS,
    "coverage.csv": COVERAGE_COLUMNS,
    "guidance.csv": GUIDANCE_COLUMNS,
    "guided.csv": GUIDED_COLUMNS,
}


def read_assumptions(folder: Path) -> dict[str, Table]:
    """Read the study's tables, by their files' names.

    Raises:
        ConfigurationError: if a file is missing, or not such a table.
    """
    command = "python -m agents.evaluate --study assumptions"
    return {
        name: read_table(folder / name, columns, optional=_OPTIONAL, command=command)
        for name, columns in _TABLES.items()
    }


def _run(request: Request) -> tuple[list[Path], dict[str, Any]]:
    settings = common_settings(request.env_kwargs)
    origin = settings.open_cache()
    indices = [int(index) for index in origin.indices(settings.split)]
    number = len(GUIDANCE_SCALES) * len(GUIDED_POLICIES) * len(request.snrs_db) * request.episodes
    with request.progress(len(CODERS) * len(indices), "chains", "trajectory") as progress:
        chains = [row for coder in CODERS for row in tabulate_chains(origin, indices, coder, progress=progress)]
    coverage = tabulate_coverage(request.snrs_db, origin.latent_dim, request.seed)
    with request.progress(number, "guidance") as progress:
        fig2b, guided = _tabulate_guidance(request, origin, progress)
    tables = dict(zip(_TABLES, (chains, coverage, fig2b, guided), strict=True))
    for name, rows in tables.items():
        write_table(request.out / name, rows, _TABLES[name])
    print_table(
        {"coder, last step, bits": "left", **{f"{length}": "right" for length in LENGTHS}},
        [
            [f"{coder}, {last}, {bits}", *(_shown(r) for r in chains if _case(r) == (coder, last, bits))]
            for coder in CODERS
            for last in _last_steps(origin.num_steps)
            for bits in CHAIN_BITS
        ],
        title="realized over predicted coding error, by the number of messages",
    )
    print_table(
        {"law": "left", **{f"q = {quantile:g}": "right" for quantile in QUANTILES}},
        [[law, *(_range(coverage, law, quantile) for quantile in QUANTILES)] for law in ("paper", "exact")],
        title="probability that a message is through in time: lowest … highest over SNRs and bit depths",
        least_width=110,
    )
    return [request.out / name for name in tables], {"bit_depths": list(PAPER_BIT_DEPTHS), "seed": request.seed}


def _case(row: dict[str, Any]) -> tuple[str, int, int]:
    return row["coder"], row["last_step"], row["bits"]


def _shown(row: dict[str, Any]) -> str:
    return f"{row['ratio']:.3g}"


def _range(table: Table, law: str, quantile: float) -> str:
    values = [row["coverage"] for row in table if (row["law"], row["quantile"]) == (law, quantile)]
    return f"{min(values):.3f} … {max(values):.3f}"


ASSUMPTIONS = Study(
    "assumptions", "which assumption of the paper holds how well", tuple(map(float, range(0, 31, 3))), 200, _run
)
