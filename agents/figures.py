"""Figures as functions of tables on disk: ``python -m agents.figures DIR``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from agents.studies.distortion import DIFFUSION_COLUMNS, QUANTIZATION_COLUMNS, read_distortion_table
from agents.studies.images import read_tiles
from refine_env import ConfigurationError
from refine_env.commands import command, run
from refine_env.errors import import_extra
from refine_env.evaluation import SUMMARY_COLUMNS, Table, read_table
from refine_env.metrics import MAX_PSNR_DB

__all__ = [
    "DASHES",
    "IMAGE_PANELS",
    "MARKERS",
    "draw_all",
    "draw_fig2a",
    "draw_fig2b",
    "draw_fig3a",
    "draw_fig3b",
    "draw_images",
    "draw_strip",
    "format_mean",
    "main",
    "rows_by_policy",
    "save_figure",
    "styles_by_policy",
    "zero_floor",
]

MARKERS = {
    "o": "circle",
    "s": "square",
    "^": "triangle-up",
    "v": "triangle-down",
    "<": "triangle-left",
    "D": "diamond",
    "d": "diamond-tall",
    "P": "cross",
    "X": "x",
    "x": "x-thin-open",  # lines alone
    "2": "y-up-open",
    "*": "star",
    "p": "pentagon",
    "h": "hexagon",
    "H": "hexagon2",
}
"""Every marker that a style may have, and what it is called in a browser's figure; likewise the dashes."""
DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}

# Okabe and Ito's palette: distinguishable with any color vision; markers and dashes serve in print.
_STYLES: dict[str, dict[str, Any]] = {
    "lookahead": {"label": "Look-ahead", "color": "#000000", "marker": "o", "linewidth": 2.0, "zorder": 5},
    "lookahead-literal": {
        "label": "Look-ahead, literal",
        "color": "#666666",
        "marker": "P",
        "linestyle": ":",
    },
    "lookahead-tight": {"label": "Look-ahead, tight", "color": "#666666", "marker": "X", "linestyle": "--"},
    "persistent-q3": {"label": "Persistent-Q (3 bit)", "color": "#E69F00", "marker": "s"},
    "persistent-q4": {"label": "Persistent-Q (4 bit)", "color": "#56B4E9", "marker": "^"},
    "persistent-q8": {"label": "Persistent-Q (8 bit)", "color": "#009E73", "marker": "v"},
    "persistent-q10": {"label": "Persistent-Q (10 bit)", "color": "#0072B2", "marker": "D"},
    "persistent-q16": {"label": "Persistent-Q (16 bit)", "color": "#CC79A7", "marker": "<"},
    "final-only": {"label": "Final-Only", "color": "#D55E00", "marker": "*", "linestyle": "--"},
    "dp": {"label": "Optimum (DP)", "color": "#B22222", "marker": "d"},
    "dp-current-rate": {"label": "Optimum, rate known", "color": "#B22222", "marker": "p", "linestyle": "--"},
    "dp-inferred": {"label": "Optimum, SNR inferred", "color": "#B22222", "marker": "P", "linestyle": ":"},
    "learned": {"label": "Learned", "color": "#2E8B57", "marker": "H"},
    "lookahead-closed-loop": {"label": "Look-ahead, closed loop", "color": "#000000", "marker": "o", "linestyle": "--"},
    "clairvoyant": {"label": "Clairvoyant bound", "color": "#8B4513", "marker": "2", "linestyle": "-."},
    "random": {"label": "Random", "color": "#999999", "marker": "x", "linestyle": ":"},
}
_SPARE_COLORS = ("#8B4513", "#7B68EE", "#2E8B57", "#B22222")


def _style(agent: str, strangers: list[str]) -> dict[str, Any]:
    """The style of an agent; ``strangers``, those that have none of their own, share what is spare."""
    if agent in _STYLES:
        return dict(_STYLES[agent])
    persistent = re.fullmatch(r"persistent-q(\d+)", agent)
    dashes, color = divmod(strangers.index(agent), len(_SPARE_COLORS))
    return {
        "label": f"Persistent-Q ({persistent[1]} bit)" if persistent else agent,
        "color": _SPARE_COLORS[color],
        "marker": "h",
        "linestyle": list(DASHES)[dashes % len(DASHES)],
    }


def rows_by_policy(rows: Table) -> dict[str, Table]:
    """Rows of a summary by policy, in order of appearance.

    A policy goes by its agent's name. Where the rows differ in coder or payload, whose numbers do not compare as those
    of one system do, it is named, too: for example ``lookahead (forward)``.
    """
    varied = [column for column in ("coder", "payload") if len({row[column] for row in rows}) > 1]
    policies: dict[str, Table] = {}
    for row in rows:
        details = ", ".join(str(row[column]) for column in varied)
        policies.setdefault(f"{row['agent']} ({details})" if details else row["agent"], []).append(row)
    return policies


def styles_by_policy(policies: dict[str, Table]) -> dict[str, dict[str, Any]]:
    """How to draw every policy; those of one agent share its color and differ in marker fill and dashes."""
    styles: dict[str, dict[str, Any]] = {}
    seen: dict[str, int] = {}
    strangers = list(dict.fromkeys(rows[0]["agent"] for rows in policies.values() if rows[0]["agent"] not in _STYLES))
    for policy, rows in policies.items():
        agent = rows[0]["agent"]
        repeat = seen[agent] = seen.get(agent, -1) + 1
        style = {"linewidth": 1.3, "markersize": 5.0, **_style(agent, strangers)}
        style["label"] += policy.removeprefix(agent)
        if repeat:
            style |= {"linestyle": ("--", ":", "-.")[(repeat - 1) % 3], "markerfacecolor": "white"}
        styles[policy] = style
    return styles


def zero_floor(values: Iterable[float]) -> float:
    """Where a logarithmic axis shows a value of exactly 0: a decade below that of the smallest positive one."""
    smallest = min((value for value in values if value > 0.0), default=1.0)
    return float(10.0 ** (math.floor(math.log10(smallest)) - 1))


def format_mean(mean: float, low: float, high: float) -> tuple[str, str]:
    """A mean as 1.83e-3 and its interval as 1.7–2.0, in the mean's power of ten; exact zeros as 0."""
    if mean == 0.0:
        return "0", ""
    exponent = math.floor(math.log10(mean))
    unit = 10.0**exponent
    return f"{mean / unit:.2f}e{exponent}", f"{low / unit:.1f}–{high / unit:.1f}"


def _handles(axes: Any) -> tuple[list[Any], list[str]]:
    """Legend entries without their error bars."""
    handles, labels = axes.get_legend_handles_labels()
    return [handle[0] if isinstance(handle, tuple) else handle for handle in handles], labels


def _new_figure(width: float, height: float) -> Any:
    return import_extra("matplotlib.figure", "plot").Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Any, out: Path, name: str) -> list[Path]:
    """Write ``name.png`` and ``name.pdf``; the same figure gives the same bytes."""
    written = []
    out.mkdir(parents=True, exist_ok=True)
    for suffix in ("png", "pdf"):
        path, temporary = out / f"{name}.{suffix}", out / f"{name}.{suffix}.tmp"
        # No dates in the files: the same table gives the same bytes.
        figure.savefig(temporary, format=suffix, dpi=200, metadata={"CreationDate": None} if suffix == "pdf" else None)
        temporary.replace(path)
        written.append(path)
    return written


def _note(axes: Any, text: str, place: tuple[float, float], offset: tuple[float, float], **kwargs: Any) -> None:
    """A small gray remark at x in axes fractions, y in data."""
    kwargs = {"fontsize": 8, "color": "#666666", **kwargs}
    axes.annotate(text, place, xycoords=("axes fraction", "data"), xytext=offset, textcoords="offset points", **kwargs)


def _grid(axes: Any) -> None:
    axes.grid(visible=True, which="major", linewidth=0.4, alpha=0.5)


def draw_fig3a(summary: Table, out: Path) -> list[Path]:
    """Latent MSE at the deadline against SNR ([K] Fig. 3a), log axis, with 95 % intervals.

    Means of exactly 0 are drawn, hollow, at a marked floor a decade below the smallest positive mean.

    Args:
        summary: rows with :data:`refine_env.evaluation.SUMMARY_COLUMNS`.
        out: folder for ``fig3a.png`` and ``fig3a.pdf``.

    Returns:
        The files written.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    figure = _new_figure(6.4, 4.6)
    floor = zero_floor(row["latent_mse"] for row in summary)
    axes = figure.subplots()
    zeros = False
    policies = rows_by_policy(summary)
    styles = styles_by_policy(policies)
    for policy, unsorted in policies.items():
        rows = sorted(unsorted, key=lambda row: row["snr_db"])
        snrs = [row["snr_db"] for row in rows]
        means = [row["latent_mse"] or floor for row in rows]
        style = styles[policy]
        below = [
            mean - max(row["ci_low"], floor) if row["latent_mse"] else 0.0
            for mean, row in zip(means, rows, strict=True)
        ]
        above = [max(0.0, row["ci_high"] - mean) for mean, row in zip(means, rows, strict=True)]
        axes.errorbar(snrs, means, yerr=[[max(0.0, b) for b in below], above], capsize=2.0, **style)
        at_floor = [snr for snr, row in zip(snrs, rows, strict=True) if row["latent_mse"] == 0.0]
        if at_floor:
            zeros = True
            axes.plot(
                at_floor,
                [floor] * len(at_floor),
                linestyle="none",
                marker=style["marker"],
                markersize=style["markersize"] + 1.0,
                markerfacecolor="white",
                markeredgecolor=style["color"],
                zorder=6,
            )
    axes.set_yscale("log")
    level = sum(row["no_delivery_mse"] for row in summary) / len(summary)
    axes.axhline(level, color="#999999", linewidth=0.8, linestyle=":")
    _note(axes, "nothing delivered", (1.0, level), (-3, 3), ha="right")
    if zeros:
        axes.axhline(floor, color="#999999", linewidth=0.8)
        _note(axes, "exactly 0 (hollow)", (0.0, floor), (4, 4))
        axes.set_ylim(bottom=floor / 2.0)
    axes.set_xlabel("mean SNR per subchannel [dB]")
    axes.set_ylabel("latent MSE at the deadline")
    _grid(axes)
    axes.set_xticks(sorted({row["snr_db"] for row in summary}))
    figure.legend(*_handles(axes), fontsize=8, loc="outside upper center", ncols=4, frameon=False)
    return save_figure(figure, out, "fig3a")


IMAGE_PANELS = {
    "lpips": "LPIPS at the deadline (lower is better)",
    "psnr_db": "PSNR at the deadline [dB]",
    "ssim": "SSIM at the deadline",
}


def draw_fig3b(summary: Table, out: Path) -> list[Path]:
    """Quality of the decoded image at the deadline against SNR: LPIPS ([K] Fig. 3b), PSNR and SSIM, a panel each.

    With 95 % intervals. Identical images have a PSNR of :data:`refine_env.metrics.MAX_PSNR_DB`. A metric that the
    table does not have is left out.

    Args:
        summary: rows with :data:`refine_env.evaluation.SUMMARY_COLUMNS`.
        out: folder for ``fig3b.png`` and ``fig3b.pdf``.

    Returns:
        The files written.

    Raises:
        ConfigurationError: if the table has no image metric at all.
        MissingExtraError: if matplotlib is not installed.
    """
    columns = [name for name in IMAGE_PANELS if any(row[name] is not None for row in summary)]
    if not columns:
        raise ConfigurationError(
            "`summary` must have image metrics for Fig. 3b, got none. "
            "Make them with: python -m agents.evaluate --images"
        )
    figure = _new_figure(0.4 + 3.3 * len(columns), 3.7)
    panels = figure.subplots(1, len(columns), squeeze=False)[0]
    policies = rows_by_policy(summary)
    styles = styles_by_policy(policies)
    for axes, column in zip(panels, columns, strict=True):
        for policy, unsorted in policies.items():
            rows = sorted((row for row in unsorted if row[column] is not None), key=lambda row: row["snr_db"])
            means = [row[column] for row in rows]
            below = [max(0.0, row[column] - row[f"{column}_low"]) for row in rows]
            above = [max(0.0, row[f"{column}_high"] - row[column]) for row in rows]
            snrs = [row["snr_db"] for row in rows]
            axes.errorbar(snrs, means, yerr=[below, above], capsize=2.0, **styles[policy])
        if column == "psnr_db":
            axes.axhline(MAX_PSNR_DB, color="#999999", linewidth=0.8)
            axes.set_ylim(top=MAX_PSNR_DB * 1.08)
            _note(axes, "100 dB and above", (0.0, MAX_PSNR_DB), (4, 3))
        axes.set_xlabel("mean SNR per subchannel [dB]")
        axes.set_ylabel(IMAGE_PANELS[column])
        _grid(axes)
    figure.legend(*_handles(panels[0]), fontsize=8, loc="outside upper center", ncols=4, frameon=False)
    return save_figure(figure, out, "fig3b")


def draw_strip(tiles: Table, clean: NDArray[np.uint8], prompt: str, out: Path) -> list[Path]:
    """What each policy shows at the deadline, by SNR, in one episode.

    Args:
        tiles: rows with ``agent``, ``snr_db``, ``coder``, ``payload``, ``episode`` and ``image``, as
            :func:`agents.studies.images.read_tiles` gives them.
        clean: image of x_0, uint8 (height, width, 3).
        prompt: of the trajectory; may be empty.
        out: folder for ``strip.png`` and ``strip.pdf``.

    Returns:
        The files written.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    policies = rows_by_policy(tiles)
    styles = styles_by_policy(policies)
    snrs = sorted({row["snr_db"] for row in tiles})
    figure = _new_figure(1.6 + 0.75 * (len(snrs) + 1), 0.7 + 0.78 * len(policies))
    figure.get_layout_engine().set(w_pad=0.01, h_pad=0.025, wspace=0.0, hspace=0.0)
    grid = figure.subplots(
        len(policies), len(snrs) + 2, squeeze=False, gridspec_kw={"width_ratios": [*[1.0] * len(snrs), 0.12, 1.0]}
    )
    for line, (policy, rows) in zip(grid, policies.items(), strict=True):
        images = {row["snr_db"]: row["image"] for row in rows}
        for axes, image in zip(line, [*(images.get(snr) for snr in snrs), None, clean], strict=True):
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_linewidth(0.4)
            axes.spines[:].set_visible(image is not None)
            if image is not None:
                axes.imshow(image, interpolation="nearest")
        line[0].set_ylabel(styles[policy]["label"], rotation=0, ha="right", va="center", fontsize=8)
    for axes, title in zip(grid[0], [*(f"{snr:g} dB" for snr in snrs), "", "$x_0$"], strict=True):
        axes.set_title(title, fontsize=8)
    if prompt:
        figure.suptitle(f"“{prompt}”", fontsize=9)
    return save_figure(figure, out, "strip")


_MODEL_COLOR, _SIMULATED_COLOR, _IMAGE_COLOR = "#000000", "#0072B2", "#D55E00"


def draw_fig2a(table: Table, out: Path) -> list[Path]:
    """Diffusion distortion against the step t ([K] Fig. 2a): model, simulation, and 1/PSNR of the decoded image.

    The right axis, of 1/PSNR, is the left one times a constant, the geometric mean of the two simulated curves' ratio:
    where they lie on each other, pixel and latent distortion are proportional. It is left out where the table has no
    images. Below, what simulation is over the model. Bands are 95 % intervals over trajectories.

    Args:
        table: rows with :data:`agents.studies.distortion.DIFFUSION_COLUMNS`.
        out: folder for ``fig2a.png`` and ``fig2a.pdf``.

    Returns:
        The files written.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    figure = _new_figure(5.6, 5.0)
    axes, below = figure.subplots(2, 1, sharex=True, gridspec_kw={"height_ratios": [3.2, 1.0]})
    rows = [row for row in table if row["step"] > 0]  # at t = 0 all are zero
    steps = [row["step"] for row in rows]
    style: dict[str, Any] = {"linewidth": 1.5}
    model = [row["model"] for row in rows]
    axes.plot(steps, model, "--", color=_MODEL_COLOR, label="model, Eq. (9)", zorder=4, **style)
    _line_with_band(axes, rows, "simulated", color=_SIMULATED_COLOR, label="simulated", **style)
    axes.set_yscale("log")
    axes.set_ylabel(r"latent distortion $E\,\Vert x_t-x_0\Vert^2/M$")
    handles, labels = axes.get_legend_handles_labels()
    if rows[0]["image_mse"] is not None:
        twin = axes.twinx()
        _line_with_band(
            twin, rows, "image_mse", color=_IMAGE_COLOR, linestyle="-.", label="1/PSNR of the decoded image", **style
        )
        twin.set_yscale("log")
        twin.set_ylabel("1/PSNR (pixel MSE on [0, 1])", color=_IMAGE_COLOR)
        twin.tick_params(axis="y", which="both", colors=_IMAGE_COLOR)
        ratio = math.exp(sum(math.log(row["image_mse"] / row["simulated"]) for row in rows) / len(rows))
        twin.set_ylim(*(ratio * limit for limit in axes.get_ylim()))
        handles, labels = (a + b for a, b in zip((handles, labels), twin.get_legend_handles_labels(), strict=True))
    axes.legend(handles, labels, fontsize=8, loc="lower right")
    offsets = [{**row, **_offset_band(row)} for row in rows]
    below.axhline(0.0, color=_MODEL_COLOR, linestyle="--", linewidth=1.0, zorder=4)
    _line_with_band(below, offsets, "offset_db", color=_SIMULATED_COLOR, **style)
    below.set_xlabel("step $t$ (0 is the clean latent)")
    below.set_ylabel("simulated /\nmodel [dB]")
    reached = [row["offset_db"] for row in rows]
    below.set_ylim(1.15 * min(-1.0, *reached), 1.15 * max(1.0, *reached))
    for panel in (axes, below):
        _grid(panel)
    return save_figure(figure, out, "fig2a")


def _offset_band(row: dict[str, Any]) -> dict[str, float]:
    """The interval of ``offset_db`` that follows from that of ``simulated``."""
    return {f"offset_db{end}": 10.0 * math.log10(row[f"simulated{end}"] / row["model"]) for end in ("_low", "_high")}


def draw_fig2b(table: Table, out: Path) -> list[Path]:
    """Quantization distortion against the bit depth ([K] Fig. 2b): model and simulation.

    A first transmission and refinements, each with a color; bars are 95 % intervals over trajectories.

    Args:
        table: rows with :data:`agents.studies.distortion.QUANTIZATION_COLUMNS`.
        out: folder for ``fig2b.png`` and ``fig2b.pdf``.

    Returns:
        The files written.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    figure = _new_figure(5.6, 3.9)
    axes = figure.subplots()
    transmissions: dict[tuple[int, int], Table] = {}
    for row in table:
        transmissions.setdefault((row["device_step"], row["step"]), []).append(row)
    last = max(row["device_step"] for row in table)
    colors = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    for number, ((device_step, step), rows) in enumerate(transmissions.items()):
        color, marker = colors[number % len(colors)], "osv^D<"[number % 6]
        bits = [row["bits"] for row in rows]
        what = f"$x_{{{step}}}$"
        label = (
            f"{what}, first transmission" if device_step == last else f"{what} to a device with $x_{{{device_step}}}$"
        )
        means = [row["simulated"] for row in rows]
        errors = [
            [max(0.0, row["simulated"] - row["simulated_low"]) for row in rows],
            [max(0.0, row["simulated_high"] - row["simulated"]) for row in rows],
        ]
        axes.plot(bits, [row["model"] for row in rows], "--", color=_MODEL_COLOR, linewidth=1.0, zorder=4)
        axes.errorbar(
            bits, means, errors, color=color, marker=marker, markersize=4.5, linewidth=1.2, capsize=2.0, label=label
        )
    handles, labels = _handles(axes)
    (model,) = axes.plot([], [], "--", color=_MODEL_COLOR, linewidth=1.0)
    axes.set_yscale("log")
    axes.set_xticks(sorted({row["bits"] for row in table}))
    axes.set_xlabel("bits per dimension $b$")
    axes.set_ylabel(r"quantization distortion $E\,\Vert\hat x_t-x_t\Vert^2/M$")
    _grid(axes)
    axes.legend([*handles, model], [*labels, "model, Eq. (10)"], fontsize=8, loc="lower left")
    return save_figure(figure, out, "fig2b")


def _line_with_band(axes: Any, rows: Table, column: str, *, color: str, **style: Any) -> None:
    places = [row["step"] for row in rows]
    axes.plot(places, [row[column] for row in rows], color=color, **style)
    low, high = ([row[column + end] for row in rows] for end in ("_low", "_high"))
    axes.fill_between(places, low, high, color=color, alpha=0.2, linewidth=0.0)


def draw_images(folder: Path, out: Path, episode: int = 0) -> list[Path]:
    """Fig. 3b and the strip, from a folder's ``summary.csv`` and ``images.npz``, as far as there is something to draw.

    Raises:
        ConfigurationError: if a table is not one, or ``episode`` is none whose images were kept.
        MissingExtraError: if matplotlib is not installed.
    """
    written: list[Path] = []
    summary = read_table(folder / "summary.csv", SUMMARY_COLUMNS)
    if any(row["scored_episodes"] for row in summary):
        written += draw_fig3b(summary, out)
        if all(row["lpips"] is None for row in summary):
            typer.echo(
                "fig3b has no panel for LPIPS: the table has none. Add it with: "
                "python -m agents.evaluate --images --lpips-weights FILE"
            )
    if (folder / "images.npz").is_file():
        written += draw_strip(*read_tiles(folder / "images.npz", episode), out)
    return written


def draw_all(folder: Path, out: Path, episode: int = 0) -> list[Path]:
    """Every figure that a folder has the tables of.

    Args:
        folder: of the tables.
        out: for the figures.
        episode: that the strip shows.

    Returns:
        The files written.

    Raises:
        ConfigurationError: if there is no table, or one is not as it should be.
        MissingExtraError: if matplotlib is not installed.
    """
    written: list[Path] = []
    for name, columns, draw in (
        ("fig2a.csv", DIFFUSION_COLUMNS, draw_fig2a),
        ("fig2b.csv", QUANTIZATION_COLUMNS, draw_fig2b),
    ):
        if (folder / name).is_file():
            written += draw(read_distortion_table(folder / name, columns), out)
    if (folder / "rungs.csv").is_file():
        from agents.studies.ladder import (  # which needs what is above
            BOUND_COLUMNS,
            LADDER_COLUMNS,
            RUNG_COLUMNS,
            draw_ladder,
        )

        command = "python -m agents.evaluate --study ladder"
        cells = read_table(folder / "ladder.csv", LADDER_COLUMNS, optional=BOUND_COLUMNS, command=command)
        written += draw_ladder(
            cells, read_table(folder / "rungs.csv", RUNG_COLUMNS, optional=BOUND_COLUMNS, command=command), out
        )
    if not written or (folder / "summary.csv").is_file():
        written += draw_fig3a(read_table(folder / "summary.csv", SUMMARY_COLUMNS), out)
        written += draw_images(folder, out, episode)
    return written


@command
def main(
    folder: Annotated[
        Path, typer.Argument(help="Folder with the tables of agents.evaluate or agents.studies.distortion.")
    ] = Path("results/fig3a"),
    out: Annotated[Path | None, typer.Option(help="Folder for the figures.", show_default="that of the tables")] = None,
    episode: Annotated[int, typer.Option(help="Episode that the strip of images shows.")] = 0,
) -> None:
    """Redraw the figures of an evaluation, or of the distortion models, from the tables on disk.

    Exit codes: 0 done, 2 a table is missing or not one, 3 the figures cannot be written, 4 matplotlib is not
    installed.
    """
    written = draw_all(folder, out or folder, episode)
    typer.echo("wrote " + ", ".join(str(path) for path in written))


if __name__ == "__main__":
    run(main)
