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
from html import escape
from pathlib import Path
from typing import Annotated, Any

import typer

from agents.figures import IMAGE_PANELS, format_mean, rows_by_policy, styles_by_policy
from agents.interactive import EXTRA, draw_distribution, draw_fig3a, draw_fig3b, import_plotly
from agents.player import make_player
from agents.studies.images import Decoder, open_decoder
from refine_env import ConfigurationError, TrajectoryCache
from refine_env._validation import check_integer
from refine_env.commands import command, run
from refine_env.dynamics.settings import EnvSettings
from refine_env.errors import import_extra
from refine_env.evaluation import EPISODE_COLUMNS, SUMMARY_COLUMNS, Table, read_table, write_atomically
from refine_env.metrics import MAX_PSNR_DB

__all__ = ["REPORT_FILE", "command_of", "main", "read_run", "write_report"]

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
        MissingExtraError: if plotly is not installed; for images, Pillow.
    """
    check_integer("player_episodes", player_episodes, 0, advice="Give for example 1; 0 leaves the player out.")
    import_plotly()
    summary = read_table(folder / "summary.csv", SUMMARY_COLUMNS)
    episodes = read_table(folder / "episodes.csv", EPISODE_COLUMNS)
    run = read_run(folder)
    figures = {"fig3a": draw_fig3a(summary)}
    if columns := [name for name in IMAGE_PANELS if any(row[name] is not None for row in summary)]:
        figures["fig3b"] = draw_fig3b(summary, columns)
    figures["distribution"] = draw_distribution(episodes)
    player, notes = make_player(episodes, run, player_episodes, decoder)
    path = out or folder / REPORT_FILE
    write_atomically(path, _page(summary, episodes, run, figures, player, notes))
    return path


_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 70rem; margin: 2rem auto;
  padding: 0 1.5rem; }
h1 { font-size: 1.7rem; line-height: 1.25; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; }
p, dl { max-width: 50rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; }
dt { color: #595959; }
dd { margin: 0; overflow-wrap: anywhere; }
code, pre { font: .9em ui-monospace, monospace; background: #f4f4f4; }
pre { padding: .6rem .8rem; white-space: pre-wrap; overflow-wrap: anywhere; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
caption { text-align: left; color: #595959; padding-bottom: .4rem; }
th, td { padding: .25rem .7rem; text-align: right; vertical-align: top; border-bottom: 1px solid #ddd; }
thead th { vertical-align: bottom; border-bottom: 2px solid #888; }
td small { display: block; color: #595959; white-space: nowrap; }
td.lowest { background: #fff3c4; font-weight: 700; }
td.lowest small { font-weight: 400; }
.figure { min-height: 440px; }
#player { min-height: 700px; }
form { display: flex; flex-wrap: wrap; gap: .4rem 1.2rem; align-items: center; margin: .8rem 0; }
select, button { font: inherit; padding: .15rem .5rem; }
#player-title { font-weight: 600; margin: 0; max-width: none; }
#player-now { display: block; min-height: 3em; max-width: none; }
#player-pictures { display: flex; gap: 1.5rem; }
#player-pictures figure { margin: .5rem 0; width: 12rem; }
#player-pictures img { width: 8rem; image-rendering: pixelated; border: 1px solid #ddd; }
figcaption, .small { font-size: .85rem; color: #595959; }
"""

_SCRIPT = """
"use strict";
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const config = read("config");
for (const node of document.querySelectorAll("[data-figure]")) {
  const figure = read(node.dataset.figure);
  Plotly.newPlot(node, figure.data, figure.layout, config);
}
// Plotly rejects, without a reason, the promise of an animation that another one interrupts, such as a pause.
window.addEventListener("unhandledrejection", (event) => { if (event.reason === undefined) event.preventDefault(); });
if (document.getElementById("player")) {
  const plot = document.getElementById("player");
  const player = read("player-data");
  const selects = ["agent", "snr", "episode"].map((name) => document.getElementById("choose-" + name));
  let slot = player.first.slot;
  let episode;
  const show = () => {
    document.getElementById("player-now").textContent = episode ? episode.slots[slot - 1] : "";
    if (!player.pictures.length || !episode) return;
    const [number, caption] = episode.pictures[slot - 1];
    document.getElementById("picture-now").src = player.pictures[number];
    document.getElementById("picture-now").alt = "decoded: " + caption;
    document.getElementById("caption-now").textContent = caption;
    document.getElementById("picture-clean").src = player.pictures[episode.clean];
  };
  const choose = () => {
    episode = player.episodes[selects.map((select) => select.value).join("-")];
    document.getElementById("player-title").textContent = episode ? episode.title : "This episode is not here.";
    show();
    return episode ? episode.data : [];
  };
  const jump = (to) => {
    const frame = { duration: 0, redraw: true };
    slot = Math.min(Math.max(to, 1), player.frames.length);
    Plotly.animate(plot, [String(slot)], { mode: "immediate", frame, transition: { duration: 0 } });
  };
  selects[1].value = String(player.first.snr);
  Plotly.newPlot(plot, { data: choose(), layout: player.layout, frames: player.frames, config }).then(() => {
    plot.on("plotly_animatingframe", (event) => { slot = Number(event.name); show(); });
    for (const select of selects) {
      select.addEventListener("change", () => Plotly.react(plot, choose(), plot.layout, config));
    }
    document.getElementById("back").addEventListener("click", () => jump(slot - 1));
    document.getElementById("forward").addEventListener("click", () => jump(slot + 1));
    document.getElementById("player-form").addEventListener("submit", (event) => event.preventDefault());
    jump(slot);
  });
}
"""


def _json(value: Any) -> str:
    """JSON that may stand in a script element: no character that HTML would take for markup."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _script_hash(script: str) -> str:
    return "'sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() + "'"


def _page(
    summary: Table,
    episodes: Table,
    run: dict[str, Any] | None,
    figures: Mapping[str, Any],
    player: dict[str, Any] | None,
    notes: Sequence[str],
) -> str:
    policies = rows_by_policy(summary)
    plotly_js = import_extra("plotly.offline", EXTRA).get_plotlyjs()
    # The browser itself refuses what is not in the file: no address may be loaded, no script but these two may run.
    policy = (
        f"default-src 'none'; script-src {_script_hash(plotly_js)} {_script_hash(_SCRIPT)}; "
        "style-src 'unsafe-inline'; img-src data: blob:"
    )
    snrs = sorted({row["snr_db"] for row in summary})
    title = f"Evaluation: {_count(len(policies), 'policy', 'policies')} at {_count(len(snrs), 'SNR', 'SNRs')}"
    data = "".join(
        f'<script type="application/json" id="{name}">{_json(value)}</script>\n'
        for name, value in (
            ("config", _CONFIG),
            *((f"{name}-data", figure.to_plotly_json()) for name, figure in figures.items()),
            *([("player-data", player)] if player else []),
        )
    )
    parts = [
        f"<h1>{escape(title)}</h1>",
        (
            "<p>Latent refinement with a deadline: an edge server generates a latent by reverse diffusion and sends "
            "intermediate samples over a fading channel; scored is the mean square error of the latent that the device "
            "holds at the deadline. Row k of every policy at one SNR is the same episode: the same latents, the same "
            "channel.</p>"
        ),
        _describe_run(run, summary),
        "<h2>Latent MSE against SNR</h2>",
        (
            "<p>Means over episodes with 95 % bootstrap intervals. A click on a name hides or shows it, a double click "
            "shows it alone.</p>"
        ),
        _plot("fig3a", "Latent MSE at the deadline against SNR, a line a policy; the table below has the numbers."),
        _summary_table(summary, policies, snrs),
    ]
    if "fig3b" in figures:
        parts += [
            "<h2>Quality of the decoded image</h2>",
            (
                "<p>Against the decoded x_0; means over the scored episodes with 95 % bootstrap intervals. "
                f"{MAX_PSNR_DB:g} dB stand for identical images.</p>"
            ),
            _plot("fig3b", "Metrics of the decoded image against SNR, a panel a metric, a line a policy."),
        ]
    parts += [
        "<h2>Distribution over episodes</h2>",
        (
            f"<p>Left: empirical distribution of the latent MSE{_floor_note(episodes)}. Right: number of deliveries; "
            "boxes from quartile to quartile with the median, whiskers to the extremes, the mean dashed. The menu "
            "chooses the SNR.</p>"
        ),
        _plot("distribution", "Distribution of latent MSE and of the number of deliveries, a line and a box a policy."),
        "<h2>One episode, slot by slot</h2>",
        *(_player_html(player) if player else []),
        *(f"<p>{escape(note)}</p>" for note in notes),
        "<h2>All columns</h2>",
        _full_table(summary),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n<noscript><p>The figures need JavaScript; the tables do not.</p></noscript>\n"
        + data
        + f"<script>{plotly_js}</script>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _plot(name: str, alternative: str) -> str:
    label = escape(alternative)
    return f'<div class="figure" id="{name}" data-figure="{name}-data" role="img" aria-label="{label}"></div>'


def _floor_note(episodes: Table) -> str:
    zeros = any(row["latent_mse"] == 0.0 for row in episodes)
    return "; an MSE of exactly 0 is at the left end, a decade below the others" if zeros else ""


def command_of(run: Mapping[str, Any]) -> str:
    """The command that repeats an evaluation, its tables to the byte.

    Args:
        run: as :func:`read_run` gives it.
    """
    kwargs, images = run["env_kwargs"], run.get("images")
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
        "--moments": kwargs.get("moments"),
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
    return shlex.join(["python", "-m", "agents.evaluate", *given, *(["--images"] if images else [])])


def _describe_run(run: dict[str, Any] | None, summary: Table) -> str:
    """What was run, as a list of terms."""
    heading = "<h2>What was run</h2>"
    counts = sorted({row["episodes"] for row in summary})
    number = str(counts[0]) if len(counts) == 1 else f"{counts[0]} – {counts[-1]}"
    policies = rows_by_policy(summary)
    terms: dict[str, Any] = {
        "policies": ", ".join(style["label"] for style in styles_by_policy(policies).values()),
        "SNR per subchannel [dB]": ", ".join(f"{snr_db:g}" for snr_db in sorted({row["snr_db"] for row in summary})),
        "episodes per policy and SNR": number,
    }
    if run is None:
        return f"{heading}{_terms(terms)}<p>There is no run.json beside the tables, which would say more.</p>"
    kwargs, cache = run["env_kwargs"], run["cache"]
    system = next((value for value in run["config"].values() if isinstance(value, dict)), {})
    schedule = system.get("schedule")
    steps = len(schedule["alpha_bar"]) - 1 if isinstance(schedule, dict) and "alpha_bar" in schedule else None
    terms |= {
        "seed": run.get("seed"),
        "cache": f"{cache.get('name')}, {cache.get('trajectories')} trajectories, split {kwargs.get('split')}",
        "SHA-256 of the cache": cache.get("sha256"),
        "latent dimensions M": system.get("latent_dim"),
        "diffusion steps T": steps,
        "deadline T_d [slots]": kwargs.get("deadline"),
        "bit depths": ", ".join(map(str, kwargs.get("bit_depths") or [])) or None,
        "versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
    }
    return f"{heading}{_terms(terms)}<p>The same again:</p><pre>{escape(command_of(run))}</pre>"


def _terms(terms: Mapping[str, Any]) -> str:
    items = (
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in terms.items() if value is not None
    )
    return f"<dl>{''.join(items)}</dl>"


def _summary_table(summary: Table, policies: Mapping[str, Table], snrs: Sequence[float]) -> str:
    """Means by SNR and policy, the lowest of every SNR marked."""
    styles = styles_by_policy(dict(policies))
    cells = {(row["snr_db"], policy): row for policy, rows in policies.items() for row in rows}
    lines = []
    for snr_db in snrs:
        best = min(cells[snr_db, policy]["latent_mse"] for policy in policies if (snr_db, policy) in cells)
        line = f'<tr><th scope="row">{snr_db:g}</th>'
        for policy in policies:
            row = cells.get((snr_db, policy))
            if row is None:
                line += "<td>–</td>"
                continue
            mean, interval = format_mean(row["latent_mse"], row["ci_low"], row["ci_high"])
            mark = ' class="lowest"' if row["latent_mse"] == best else ""
            line += f"<td{mark}>{mean}<small>{interval}</small></td>"
        lines.append(line + "</tr>")
    head = "".join(
        f'<th scope="col">{escape(styles[policy]["label"]).replace(" bit)", "&nbsp;bit)")}</th>' for policy in policies
    )
    return (
        '<div class="wide"><table id="summary"><caption>Latent MSE at the deadline: mean, and 95 % bootstrap interval '
        "in the mean’s power of ten. Marked: the lowest mean of the row.</caption>"
        f'<thead><tr><th scope="col">SNR [dB]</th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _full_table(summary: Table) -> str:
    """The summary as it is on disk, numbers to four digits, columns without a value left out."""
    columns = [name for name in SUMMARY_COLUMNS if any(row[name] is not None for row in summary)]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in columns)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td>{escape(f'{value:.4g}' if isinstance(value, float) else '' if value is None else str(value))}</td>"
            for value in (row[name] for name in columns)
        )
        + "</tr>"
        for row in summary
    )
    return (
        "<details><summary>The rows of summary.csv</summary>"
        f'<div class="wide"><table id="columns"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        "</details>"
    )


def _player_html(player: Mapping[str, Any]) -> list[str]:
    choices = player["choices"]

    def select(name: str, label: str) -> str:
        options = "".join(f'<option value="{i}">{escape(text)}</option>' for i, text in choices[name].items())
        hidden = " hidden" if len(choices[name]) == 1 and name == "episode" else ""
        return f'<label{hidden}>{label} <select id="choose-{name}" autocomplete="off">{options}</select></label>'

    count = len(choices["episode"])
    which = "the episode" if count == 1 else f"{count} episodes, from low to high MSE,"
    pictures = [
        (
            '<div id="player-pictures">'
            '<figure><img id="picture-now" src="data:," alt="">'
            '<figcaption>At the device: <span id="caption-now"></span></figcaption></figure>'
            '<figure><img id="picture-clean" src="data:," alt="decoded x_0">'
            "<figcaption>The clean x_0</figcaption></figure></div>"
            f'<p class="small">At most {player["pictures_each"]} deliveries of an episode are decoded, evenly spread, '
            "the last one among them.</p>"
        )
    ]
    return [
        (
            f"<p>Played again by their seeds. Of every SNR it is {which} whose rank in latent MSE, averaged over the "
            f"policies, is {'the median' if count == 1 else 'spread evenly'}; all policies have the same latents and "
            f"channel in it. {_count(len(player['episodes']), 'episode', 'episodes')} in all. At the top the bits that "
            "each slot carries; in the middle what server and device have, and what is on its way; below the error of "
            "what the device holds.</p>"
        ),
        '<form id="player-form">'
        + select("agent", "Policy")
        + select("snr", "SNR")
        + select("episode", "Episode")
        + '<span><button type="button" id="back">◀ one slot</button> '
        '<button type="button" id="forward">one slot ▶</button></span></form>',
        '<p id="player-title"></p>',
        '<output id="player-now" for="choose-agent choose-snr choose-episode"></output>',
        *(pictures if player["pictures"] else []),
        (
            '<div id="player" role="img" aria-label="Rates, steps at server and device, and latent MSE, slot by slot; '
            'the text above says the same of the slot that is shown."></div>'
        ),
    ]


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
        name = EnvSettings.from_kwargs(run["env_kwargs"] if run else {}).cache
        decoder = open_decoder(TrajectoryCache.open(name), model, device=device)
    path = write_report(folder, out, player_episodes=player_episodes, decoder=decoder)
    typer.echo(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    run(main)
