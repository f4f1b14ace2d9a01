"""Compare policies over a range of SNRs: ``python -m agents.evaluate``.

Writes ``episodes.csv``, ``summary.csv`` and ``run.json``, prints the table, and draws ``fig3a`` where
matplotlib is installed.
"""

from __future__ import annotations

import json
import math
import platform
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer

import agents
from refine_env import CacheError, ConfigurationError, MissingExtraError, __version__
from refine_env.config import PAPER_BIT_DEPTHS, PAPER_DEADLINE
from refine_env.evaluation import (
    EPISODE_COLUMNS,
    SUMMARY_COLUMNS,
    Table,
    episode_seeds,
    roll_out,
    summarize,
    write_atomically,
    write_table,
)
from refine_env.settings import EnvSettings

__all__ = ["DEFAULT_AGENTS", "DEFAULT_SNRS_DB", "evaluate", "main"]

DEFAULT_AGENTS = (
    "lookahead",
    "persistent-q3",
    "persistent-q4",
    "persistent-q8",
    "persistent-q10",
    "persistent-q16",
    "final-only",
)
DEFAULT_SNRS_DB = tuple(float(snr_db) for snr_db in range(0, 31, 3))
_DEFAULT_BIT_DEPTHS = ",".join(map(str, PAPER_BIT_DEPTHS))
_DEFAULT_SNR_LIST = ",".join(f"{snr_db:g}" for snr_db in DEFAULT_SNRS_DB)


def evaluate(
    names: tuple[str, ...],
    snrs_db: tuple[float, ...],
    *,
    episodes: int,
    seed: int,
    env_kwargs: dict[str, Any],
    progress: Any = None,
) -> Table:
    """Episodes of every policy at every SNR on common draws: row k of every agent at one SNR has the same seed.

    Args:
        names: of the policies, see :func:`agents.names`.
        snrs_db: mean SNRs [dB].
        episodes: per policy and SNR.
        seed: of the evaluation.
        env_kwargs: environment arguments; a policy's own ``agents.env_kwargs`` come on top.
        progress: called with the number of episodes that have just ended.

    Raises:
        ConfigurationError: if a name, SNR or count is out of range.
        CacheError: if the cache is missing or damaged.
    """
    rows: Table = []
    for snr_db in snrs_db:
        for name in names:
            rows.extend(
                roll_out(
                    partial(agents.make, name),
                    env_kwargs={**env_kwargs, **agents.env_kwargs(name), "snr_db": snr_db},
                    episodes=episodes,
                    seed=seed,
                    progress=progress,
                )
            )
    return rows


def describe_run(
    names: tuple[str, ...], snrs_db: tuple[float, ...], episodes: int, seed: int, env_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """What is needed to repeat an evaluation: arguments, systems, the cache's hash and the versions.

    Makes every policy at every SNR once, so that what cannot work is known before the first episode.

    Raises:
        ConfigurationError, CacheError: as :func:`evaluate`.
    """
    settings = EnvSettings.from_kwargs({**env_kwargs, "snr_db": snrs_db[0]})
    cache = settings.open_cache()
    episode_seeds(seed, episodes)
    systems = {}
    for name in names:
        for snr_db in snrs_db:
            own = EnvSettings.from_kwargs({**env_kwargs, **agents.env_kwargs(name), "snr_db": snr_db})
            config = own.config_for(cache)
            agents.make(name, config)
        systems[name] = {key: value for key, value in config.to_dict().items() if key != "snr_db"}
    packages = ("numpy", "scipy", "gymnasium", "numba", "safetensors")
    return {
        "agents": list(names),
        "snr_db": list(snrs_db),
        "episodes": episodes,
        "seed": seed,
        "env_kwargs": env_kwargs,
        "config": systems,
        "cache": {"name": settings.cache, "sha256": cache.sha256, "trajectories": len(cache)},
        "versions": {
            "refine-env": __version__,
            "python": platform.python_version(),
            **{package: metadata.version(package) for package in packages},
        },
    }


def _parse_list(name: str, text: str, kind: type, example: str) -> tuple[Any, ...]:
    try:
        values = tuple(kind(item.strip()) for item in text.split(",") if item.strip())
    except ValueError:
        values = ()
    if not values or len(set(values)) < len(values):
        raise ConfigurationError(
            f"`{name}` must be a comma-separated list without repetition, got {text!r}. For example: {name} {example}"
        )
    return values


def print_table(summary: Table) -> None:
    """The summary on the terminal, within 80 columns: one row an SNR, one column an agent, the lowest mean marked."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as RichTable

    order = list(dict.fromkeys(row["agent"] for row in summary))
    cells = {(row["snr_db"], row["agent"]): row for row in summary}
    view = RichTable(
        title="latent MSE at the deadline, mean over episodes",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    view.add_column("SNR\n[dB]", justify="right")
    for agent in order:
        view.add_column(agent.replace("-", "\n", 1), justify="right", no_wrap=True)
    for snr_db in dict.fromkeys(row["snr_db"] for row in summary):
        best = min(cells[snr_db, agent]["latent_mse"] for agent in order)
        line = [f"{snr_db:g}"]
        for agent in order:
            row = cells[snr_db, agent]
            mean, interval = _scientific(row["latent_mse"], row["ci_low"], row["ci_high"])
            marked = f"[bold]{mean}[/bold]" if row["latent_mse"] == best else mean
            line.append(f"{marked}\n[dim]{interval}[/dim]")
        view.add_row(*line)
    console = Console()
    console.print(view)
    console.print("Second line: 95 % bootstrap interval, in the mean's power of ten. Bold: lowest.", style="dim")


def _scientific(mean: float, low: float, high: float) -> tuple[str, str]:
    """A mean as 1.83e-3 and its interval as 1.7–2.0, in the mean's power of ten; exact zeros as 0."""
    if mean == 0.0:
        return "0", ""
    exponent = math.floor(math.log10(mean))
    unit = 10.0**exponent
    return f"{mean / unit:.2f}e{exponent}", f"{low / unit:.1f}–{high / unit:.1f}"


def main(
    agent_names: Annotated[str, typer.Option("--agents", help="Comma-separated policies.")] = ",".join(DEFAULT_AGENTS),
    snr_db: Annotated[
        str, typer.Option("--snr-db", help="Comma-separated mean SNRs per subchannel in dB.")
    ] = _DEFAULT_SNR_LIST,
    episodes: Annotated[int, typer.Option(help="Episodes per policy and SNR.")] = 200,
    seed: Annotated[int, typer.Option(help="Seed of the evaluation; the same seed gives the same draws.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for tables and figures.")] = Path("results/fig3a"),
    cache: Annotated[str, typer.Option(help="Name or folder of a trajectory cache.")] = "default",
    split: Annotated[str, typer.Option(help="Trajectories: train, test or all.")] = "test",
    bit_depths: Annotated[str, typer.Option(help="Comma-separated bit depths.")] = _DEFAULT_BIT_DEPTHS,
    deadline: Annotated[int, typer.Option(help="Deadline in slots.")] = PAPER_DEADLINE,
    figures: Annotated[bool, typer.Option(help="Draw the figure (needs matplotlib).")] = True,
) -> None:
    """Compare policies on common random numbers and write table, figure and how to repeat the run.

    Exit codes: 0 done, 2 an argument is wrong, 3 a cache is missing or damaged, or the output cannot be written.
    """
    try:
        _run(agent_names, snr_db, episodes, seed, out, cache, split, bit_depths, deadline, figures)
    except ConfigurationError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None
    except (CacheError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(3) from None


def _run(
    agent_names: str,
    snr_db: str,
    episodes: int,
    seed: int,
    out: Path,
    cache: str,
    split: str,
    bit_depths: str,
    deadline: int,
    figures: bool,
) -> None:
    from tqdm import tqdm

    names = _parse_list("--agents", agent_names, str, "lookahead,persistent-q8")
    snrs_db = _parse_list("--snr-db", snr_db, float, "0,3,6")
    env_kwargs: dict[str, Any] = {
        "cache": cache,
        "split": split,
        "bit_depths": list(_parse_list("--bit-depths", bit_depths, int, _DEFAULT_BIT_DEPTHS)),
        "deadline": deadline,
    }
    run = describe_run(names, snrs_db, episodes, seed, env_kwargs)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(
            f"`--out` must be a folder that can be written, got {str(out)!r} ({error.strerror}). Choose another."
        ) from None
    with tqdm(total=len(names) * len(snrs_db) * episodes, unit="episode", desc="evaluate") as bar:
        table = evaluate(names, snrs_db, episodes=episodes, seed=seed, env_kwargs=env_kwargs, progress=bar.update)
    summary = summarize(table)
    write_table(out / "episodes.csv", table, EPISODE_COLUMNS)
    write_table(out / "summary.csv", summary, SUMMARY_COLUMNS)
    write_atomically(out / "run.json", json.dumps(run, indent=1) + "\n")
    print_table(summary)
    written = [out / name for name in ("episodes.csv", "summary.csv", "run.json")]
    if figures:
        from agents.figures import draw_fig3a

        try:
            written += draw_fig3a(summary, out)
        except MissingExtraError as error:
            typer.echo(f"No figure: {error}")
    typer.echo("wrote " + ", ".join(str(path) for path in written))


if __name__ == "__main__":
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(main)
    app()
