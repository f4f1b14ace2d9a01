"""An evaluation as one HTML page: ``python -m agents.report DIR``.

The page is a function of the tables on disk, needs no network, and loads nothing: plotly.js is inside it. Its episode
player shows episodes played over again by their seeds.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from agents.figures.curves import image_columns
from agents.figures.series import summary_cells
from agents.figures.style import rows_by_policy, styles_by_policy
from agents.report.player import make_player
from agents.report.plots import EXTRA, draw_distribution, draw_fig3a, draw_fig3b, import_plotly
from agents.studies.base import common_settings
from agents.studies.images import Decoder, open_decoder
from refine_env import ConfigurationError, TrajectoryCache
from refine_env._validation import check_integer
from refine_env.commands import command
from refine_env.errors import import_extra
from refine_env.evaluation import EPISODE_COLUMNS, SUMMARY_COLUMNS, Table, read_table, write_atomically
from refine_env.metrics import MAX_PSNR_DB

__all__ = ["REPORT_FILE", "command_of", "import_libraries", "main", "read_run", "write_report"]

_TEMPLATES = Path(__file__).parent / "templates"

REPORT_FILE = "report.html"
_CONFIG = {
    "displaylogo": False,
    "responsive": True,
    # Named one by one: what plotly puts there by itself includes a button that uploads the figure.
    "modeBarButtons": [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
    "plotlyServerURL": "",
}


def read_run(folder: Path) -> dict[str, Any] | None:
    """An evaluation's ``run.json``; None where there is none.

    Raises:
        ConfigurationError: if the file is no JSON object, or one with other things in it.
    """
    path = folder / "run.json"
    if not path.is_file():
        return None
    remedy = "Make it anew with: python -m agents.evaluate"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"`run.json` must be a JSON object, got {path} ({error}). {remedy}") from None
    for name, kind in (
        ("agents", list),
        ("snr_db", list),
        ("env_kwargs", dict),
        ("config", dict),
        ("cache", dict),
        ("versions", dict),
    ):
        if not isinstance(run, dict) or not isinstance(run.get(name), kind):
            raise ConfigurationError(
                f"`run.json` must have {name!r} as a JSON {'array' if kind is list else 'object'}, got {path} without. "
                f"{remedy}"
            )
    return dict(run)


def write_report(
    folder: Path,
    out: Path | None = None,
    *,
    player_episodes: int = 1,
    decoder: Decoder | None = None,
) -> Path:
    """Write the page of an evaluation.

    Args:
        folder: with ``episodes.csv``, ``summary.csv`` and, for the episode player, ``run.json``.
        out: the file; None is ``report.html`` in that folder.
        player_episodes: episodes in the player per policy and SNR.
        decoder: of the cache's model, to show what the device holds as an image.

    Returns:
        The file.

    Raises:
        ConfigurationError: if a table is missing or not one, or ``player_episodes`` is negative.
        MissingExtraError: if plotly or jinja2 is not installed; for images, Pillow.
    """
    check_integer("player_episodes", player_episodes, 0, advice="Give for example 1; 0 leaves the player out.")
    import_libraries()
    summary = read_table(folder / "summary.csv", SUMMARY_COLUMNS)
    episodes = read_table(folder / "episodes.csv", EPISODE_COLUMNS)
    run = read_run(folder)
    figures = {"fig3a": draw_fig3a(summary)}
    if columns := image_columns(summary):
        figures["fig3b"] = draw_fig3b(summary, columns)
    figures["distribution"] = draw_distribution(episodes)
    player, notes = make_player(episodes, run, player_episodes, decoder)
    path = out or folder / REPORT_FILE
    write_atomically(path, _render(summary, episodes, run, figures, player, notes))
    return path


def import_libraries() -> None:
    """Import what the page is made with.

    Raises:
        MissingExtraError: if plotly or jinja2 is not installed.
    """
    import_plotly()
    import_extra("jinja2", EXTRA)


def _script_hash(script: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() + "'"


def _render(
    summary: Table,
    episodes: Table,
    run: dict[str, Any] | None,
    figures: Mapping[str, Any],
    player: dict[str, Any] | None,
    notes: Sequence[str],
) -> str:
    """The page, ``templates/page.html`` with all that it shows."""
    jinja2 = import_extra("jinja2", EXTRA)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # The filter `tojson` writes no character that HTML would take for markup.
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}
    plotly_js = import_extra("plotly.offline", EXTRA).get_plotlyjs()
    style, script = ((_TEMPLATES / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    policies = rows_by_policy(summary)
    labels = [policy_style["label"] for policy_style in styles_by_policy(policies).values()]
    snrs_db = sorted({row["snr_db"] for row in summary})
    columns = [name for name in SUMMARY_COLUMNS if any(row[name] is not None for row in summary)]
    data = {"config": _CONFIG, **{f"{name}-data": figure.to_plotly_json() for name, figure in figures.items()}}
    return str(
        environment.get_template("page.html").render(
            # The browser itself refuses what is not in the file: no address may be loaded, and no script but these two
            # may run.
            content_policy=f"default-src 'none'; script-src {_script_hash(plotly_js)} {_script_hash(script)}; "
            "style-src 'unsafe-inline'; img-src data: blob:",
            style=style,
            scripts=[plotly_js, script],
            data=data if player is None else {**data, "player-data": player},
            num_snrs=len(snrs_db),
            max_psnr_db=MAX_PSNR_DB,
            terms=_terms(run, summary, labels, snrs_db),
            command=None if run is None else command_of(run),
            # A label breaks before its bit depth, not within it.
            labels=[label.replace(" bit)", "\u00a0bit)") for label in labels],
            lines=list(summary_cells(policies, snrs_db)),
            has_zeros=any(row["latent_mse"] == 0.0 for row in episodes),
            player=player,
            notes=notes,
            columns=columns,
            rows=[[_shown(row[name]) for name in columns] for row in summary],
        )
    )


def _shown(value: Any) -> str:
    """A value of the summary: numbers to four digits, nothing where there is none."""
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def command_of(run: Mapping[str, Any]) -> str:
    """The command that repeats an evaluation, its tables to the byte.

    Args:
        run: as :func:`read_run` gives it.
    """
    kwargs, images, decoder = run["env_kwargs"], run.get("images"), run.get("device_decoder") or {}
    start = kwargs.get("warm_start") or {}
    options = {
        "--agents": ",".join(map(str, run["agents"])),
        "--snr-db": ",".join(str(snr_db).removesuffix(".0") for snr_db in run["snr_db"]),
        "--episodes": run.get("episodes"),
        "--seed": run.get("seed"),
        "--cache": kwargs.get("cache"),
        "--split": kwargs.get("split"),
        "--bit-depths": ",".join(map(str, kwargs.get("bit_depths") or [])) or None,
        "--deadline": kwargs.get("deadline"),
        "--payload": kwargs.get("payload"),
        "--latency-quantile": kwargs.get("latency_quantile"),
        "--moments": kwargs.get("moments"),
        "--device-decoder": kwargs.get("device_decoder"),
        "--model": decoder.get("model"),
        "--device": decoder.get("device"),
        "--target-mse": run.get("target_mse"),
        "--warm-start": f"{start.get('step')}{',shared' if start.get('shared') else ''}" if start else None,
        "--name-bits": start.get("name_bits"),
    }
    if images:
        options |= {
            "--metrics": ",".join(map(str, images.get("metrics", []))) or None,
            "--image-episodes": images.get("episodes"),
            "--lpips-weights": images.get("lpips_weights"),
            "--model": images.get("model", {}).get("id"),
            "--device": images.get("device"),
        }
    given = [word for name, value in options.items() if value is not None for word in (name, str(value))]
    flags = [flag for flag, asked in (("--anytime", run.get("anytime")), ("--images", images)) if asked]
    return shlex.join(["python", "-m", "agents.evaluate", *given, *flags])


def _terms(
    run: dict[str, Any] | None, summary: Table, labels: Sequence[str], snrs_db: Sequence[float]
) -> dict[str, Any]:
    """What was run, by term."""
    counts = sorted({row["episodes"] for row in summary})
    terms: dict[str, Any] = {
        "policies": ", ".join(labels),
        "SNR per subchannel [dB]": ", ".join(f"{snr_db:g}" for snr_db in snrs_db),
        "episodes per policy and SNR": str(counts[0]) if len(counts) == 1 else f"{counts[0]} – {counts[-1]}",
    }
    if run is None:
        return terms
    kwargs, cache = run["env_kwargs"], run["cache"]
    system = next((value for value in run["config"].values() if isinstance(value, dict)), {})
    schedule = system.get("schedule")
    terms |= {
        "seed": run.get("seed"),
        "cache": f"{cache.get('name')}, {cache.get('trajectories')} trajectories, split {kwargs.get('split')}",
        "SHA-256 of the cache": cache.get("sha256"),
        "latent dimensions M": system.get("latent_dim"),
        "diffusion steps T": len(schedule["alpha_bar"]) - 1
        if isinstance(schedule, dict) and "alpha_bar" in schedule
        else None,
        "deadline T_d [slots]": kwargs.get("deadline"),
        "generation starts from": f"x_{start.get('step')}{', which the device has, too' if start.get('shared') else ''}"
        if (start := system.get("warm_start"))
        else None,
        "bit depths": ", ".join(map(str, kwargs.get("bit_depths") or [])) or None,
        "versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
    }
    return {name: value for name, value in terms.items() if value is not None}


@command
def main(
    folder: Annotated[Path, typer.Argument(help="Folder with the tables of agents.evaluate.")] = Path("results/fig3a"),
    out: Annotated[Path | None, typer.Option(help="The file.", show_default="report.html beside the tables")] = None,
    player_episodes: Annotated[int, typer.Option(help="Episodes in the player per policy and SNR.", max=10_000)] = 1,
    images: Annotated[bool, typer.Option(help="Show what the device holds as an image, too.")] = False,
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder of the cache's model.", show_default="as the cache says")
    ] = None,
    device: Annotated[str, typer.Option(help="Torch device for the images.")] = "cpu",
) -> None:
    """Write the HTML page of an evaluation, from its tables.

    Exit codes: 0 done, 2 a table is missing or not one, 3 the page cannot be written, or the cache or model is missing
    or damaged, 4 plotly is not installed, or what decodes images.
    """
    decoder = None
    if images:
        run = read_run(folder)
        name = common_settings(run["env_kwargs"] if run else {}).cache
        decoder = open_decoder(TrajectoryCache.open(name), model, device=device)
    path = write_report(folder, out, player_episodes=player_episodes, decoder=decoder)
    typer.echo(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
