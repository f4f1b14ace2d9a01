"""Figures of an evaluation for a browser, as plotly's own objects: functions of tables."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.figures.canvas import SNR_LABEL
from agents.figures.curves import IMAGE_PANELS
from agents.figures.series import interval_columns, no_delivery_level, policy_curves, zero_floor
from agents.figures.style import DASHES, GRAY, MARKERS, NOTE_COLOR, rows_by_policy, styles_by_policy
from refine_env.dynamics.settings import EnvSettings
from refine_env.errors import import_extra
from refine_env.evaluation import Table

__all__ = [
    "EXTRA",
    "LEGEND_ABOVE",
    "LOG_AXIS",
    "default_snr",
    "draw_distribution",
    "draw_fig3a",
    "draw_fig3b",
    "import_plotly",
    "make_axis",
    "make_layout",
]

EXTRA = "report"

_MOST_POINTS = 200
"""The most points of a distribution; with more episodes it shows that many quantiles."""


def import_plotly() -> Any:
    """Plotly's figures.

    Raises:
        MissingExtraError: if plotly is not installed.
    """
    return import_extra("plotly.graph_objects", EXTRA)


def default_snr(snrs: Iterable[float]) -> float:
    """The SNR [dB] that is shown first: the one nearest to the environment's default."""
    default = EnvSettings().snr_db
    assert isinstance(default, float)
    return min(snrs, key=lambda snr_db: abs(snr_db - default))


def _text(text: str) -> str:
    """Text for plotly, which takes some HTML for markup."""
    return escape(text, quote=False)


def _line_style(style: Mapping[str, Any]) -> dict[str, Any]:
    """A style of :mod:`agents.figures.style` in plotly's terms."""
    symbol = MARKERS[style["marker"]]
    if style.get("markerfacecolor") == "white" and not symbol.endswith("-open"):
        symbol += "-open"
    return {
        "name": _text(style["label"]),
        "line": {
            "color": style["color"],
            "width": style["linewidth"] * 1.3,
            "dash": DASHES[style.get("linestyle", "-")],
        },
        "marker": {
            "symbol": symbol,
            "size": 8,
            "color": style["color"],
            "line": {"width": 1.5 if symbol.endswith("-open") else 0, "color": style["color"]},
        },
    }


def make_layout(**own: Any) -> dict[str, Any]:
    """A layout with what all figures have in common."""
    return {
        "template": "none",
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#222222"},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "margin": {"l": 75, "r": 50, "t": 20, "b": 50},
        "modebar": {"orientation": "v"},
        "hoverlabel": {"namelength": -1},
        **own,
    }


def make_axis(title: str, **own: Any) -> dict[str, Any]:
    """An axis with what all axes have in common."""
    return {"title": {"text": title, "standoff": 8}, "gridcolor": "#E4E4E4", "zeroline": False, **own}


LOG_AXIS = {"type": "log", "exponentformat": "power", "dtick": 1}
LEGEND_ABOVE = {"orientation": "h", "yanchor": "bottom", "y": 1.02, "x": 0.0}


def _add_lines(
    figure: Any,
    summary: Table,
    column: str,
    floor: float = -math.inf,
    *,
    grouped: bool = False,
    **own: Any,
) -> None:
    """Add a line with error bars for each policy; a value of exactly 0 stands, hollow, at a floor above 0.

    ``grouped`` lines of one policy are hidden and shown together, in all panels.
    """
    low, high = interval_columns(column)
    for curve in policy_curves(summary, column, floor):
        style, rows = _line_style(curve.style), curve.rows
        symbol = style["marker"]["symbol"]
        if floor > 0.0:
            hollow = symbol if symbol.endswith("-open") else f"{symbol}-open"
            style["marker"]["symbol"] = [symbol if row[column] else hollow for row in rows]
        below, above = curve.bars
        figure.add_scatter(
            **style,
            x=curve.snrs_db,
            y=curve.values,
            mode="lines+markers",
            error_y={
                "type": "data",
                "symmetric": False,
                "array": above,
                "arrayminus": below,
                "thickness": 1,
                "width": 3,
            },
            customdata=[[row[column], row[low], row[high], row["episodes"]] for row in rows],
            legendgroup=_text(curve.policy) if grouped else None,
            **own,
        )


def draw_fig3a(summary: Table) -> Any:
    """Fig. 3a, as :func:`agents.figures.draw_fig3a` draws it."""
    floor = zero_floor(row["latent_mse"] for row in summary)
    figure = import_plotly().Figure()
    _add_lines(
        figure,
        summary,
        "latent_mse",
        floor,
        hovertemplate="%{x:g} dB: %{customdata[0]:.3e} (95 %: %{customdata[1]:.2e} – %{customdata[2]:.2e}, "
        "%{customdata[3]} episodes)",
    )
    levels = [(no_delivery_level(summary), "dot", "nothing delivered", 1.0, "right")]
    if any(row["latent_mse"] == 0.0 for row in summary):
        levels.append((floor, "solid", "exactly 0 (hollow)", 0.0, "left"))
    for level, dash, text, place, side in levels:
        figure.add_shape(
            type="line",
            xref="paper",
            x0=0.0,
            x1=1.0,
            y0=level,
            y1=level,
            line={"color": GRAY, "width": 1, "dash": dash},
        )
        figure.add_annotation(
            text=text,
            xref="paper",
            x=place,
            xanchor=side,
            y=math.log10(level),  # on a logarithmic axis; a shape's is the value itself
            yanchor="bottom",
            showarrow=False,
            font={"size": 11, "color": NOTE_COLOR},
        )
    return figure.update_layout(
        make_layout(
            height=520,
            legend=LEGEND_ABOVE,
            xaxis=make_axis(SNR_LABEL, tickvals=sorted({row["snr_db"] for row in summary})),
            yaxis=make_axis("latent MSE at the deadline", **LOG_AXIS),
        )
    )


def draw_fig3b(summary: Table, columns: Sequence[str]) -> Any:
    """Metrics of the decoded image against SNR, a panel each, as :func:`agents.figures.draw_fig3b` draws them."""
    figure = import_extra("plotly.subplots", EXTRA).make_subplots(cols=len(columns), horizontal_spacing=0.1)
    for panel, column in enumerate(columns, start=1):
        hover = "%{x:g} dB: %{y:.4g}"
        _add_lines(figure, summary, column, grouped=True, hovertemplate=hover, showlegend=panel == 1, row=1, col=panel)
        figure.update_xaxes(make_axis(SNR_LABEL), col=panel)
        figure.update_yaxes(make_axis(IMAGE_PANELS[column]), col=panel)
    return figure.update_layout(make_layout(height=440, legend=LEGEND_ABOVE))


def _quantiles(values: NDArray[np.float64]) -> tuple[list[float], list[float]]:
    """Values and shares of an empirical distribution function: every step, or as many as are shown of many."""
    count = min(values.size, _MOST_POINTS)
    shares = np.arange(1, count + 1) / count
    return np.quantile(values, shares, method="inverted_cdf").tolist(), shares.tolist()


def draw_distribution(episodes: Table) -> Any:
    """Distribution of latent MSE and number of deliveries over the episodes; a menu chooses the SNR."""
    figure = import_extra("plotly.subplots", EXTRA).make_subplots(
        cols=2, column_widths=[0.62, 0.38], horizontal_spacing=0.2
    )
    floor = zero_floor(row["latent_mse"] for row in episodes)
    policies = rows_by_policy(episodes)
    styles = styles_by_policy(policies)
    snrs = sorted({row["snr_db"] for row in episodes})
    first = default_snr(snrs)
    shown: list[float] = []
    for snr_db in snrs:
        for policy, every in policies.items():
            rows = [row for row in every if row["snr_db"] == snr_db]
            if not rows:
                continue
            style = _line_style(styles[policy])
            values, shares = _quantiles(np.array([row["latent_mse"] for row in rows]))
            figure.add_scatter(
                name=style["name"],
                line={**style["line"], "shape": "hv"},
                mode="lines",
                x=[value or floor for value in values],
                y=shares,
                customdata=values,
                hovertemplate="%{y:.3f} of the episodes at most %{customdata:.3e}",
                legendgroup=_text(policy),
                visible=snr_db == first,
                row=1,
                col=1,
            )
            counts = np.array([row["num_deliveries"] for row in rows], dtype=np.float64)
            low, quarter, middle, three_quarters, high = np.quantile(counts, [0.0, 0.25, 0.5, 0.75, 1.0]).tolist()
            figure.add_box(
                name=style["name"],
                y=[style["name"]],
                orientation="h",
                lowerfence=[low],
                q1=[quarter],
                median=[middle],
                q3=[three_quarters],
                upperfence=[high],
                mean=[float(counts.mean())],
                line={"color": style["line"]["color"], "width": 1.3},
                legendgroup=_text(policy),
                showlegend=False,
                visible=snr_db == first,
                row=1,
                col=2,
            )
            shown += [snr_db, snr_db]
    menu = {
        "type": "dropdown",
        "buttons": [
            {"label": f"{snr_db:g} dB", "method": "restyle", "args": [{"visible": [own == snr_db for own in shown]}]}
            for snr_db in snrs
        ],
        "active": snrs.index(first),
        "x": 0.0,
        "xanchor": "left",
        "y": 1.03,
        "yanchor": "bottom",
    }
    return figure.update_layout(
        make_layout(
            height=470,
            updatemenus=[menu],
            legend={"orientation": "h", "yanchor": "top", "y": -0.17, "x": 0.0},
            xaxis=make_axis("latent MSE at the deadline", **LOG_AXIS),
            yaxis=make_axis("share of episodes", range=[0.0, 1.01]),
            xaxis2=make_axis("deliveries in an episode", type="linear", rangemode="tozero"),
            yaxis2=make_axis("", type="category", autorange="reversed", automargin=True),
        )
    )
