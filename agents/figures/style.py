"""How policies look in every figure: the one source of colors, markers and dashes, for print and for the browser."""

from __future__ import annotations

import re
from typing import Any

from refine_env.evaluation import Table

__all__ = [
    "BLACK",
    "BLUE",
    "DASHES",
    "GRAY",
    "GREEN",
    "MARKERS",
    "NOTE_COLOR",
    "ORANGE",
    "PURPLE",
    "SKY_BLUE",
    "VERMILION",
    "YELLOW",
    "rows_by_policy",
    "styles_by_policy",
]

# Okabe and Ito's palette: distinguishable with any color vision; markers and dashes serve in print.
BLACK, ORANGE, SKY_BLUE, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, VERMILION, PURPLE = "#F0E442", "#0072B2", "#D55E00", "#CC79A7"
GRAY, NOTE_COLOR = "#999999", "#666666"
_BROWN, _VIOLET, _SEA_GREEN, _RED = "#8B4513", "#7B68EE", "#2E8B57", "#B22222"

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
    "x": "x-thin-open",  # made of lines alone
    "2": "y-up-open",
    "*": "star",
    "p": "pentagon",
    "h": "hexagon",
    "H": "hexagon2",
}
"""Matplotlib's name of every marker that a style may have, with plotly's name of it."""

DASHES = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}
"""Matplotlib's name of every dash pattern, with plotly's name of it."""

_STYLES: dict[str, dict[str, Any]] = {
    "lookahead": {"label": "Look-ahead", "color": BLACK, "marker": "o", "linewidth": 2.0, "zorder": 5},
    "lookahead-literal": {"label": "Look-ahead, literal", "color": NOTE_COLOR, "marker": "P", "linestyle": ":"},
    "lookahead-tight": {"label": "Look-ahead, tight", "color": NOTE_COLOR, "marker": "X", "linestyle": "--"},
    "persistent-q3": {"label": "Persistent-Q (3 bit)", "color": ORANGE, "marker": "s"},
    "persistent-q4": {"label": "Persistent-Q (4 bit)", "color": SKY_BLUE, "marker": "^"},
    "persistent-q8": {"label": "Persistent-Q (8 bit)", "color": GREEN, "marker": "v"},
    "persistent-q10": {"label": "Persistent-Q (10 bit)", "color": BLUE, "marker": "D"},
    "persistent-q16": {"label": "Persistent-Q (16 bit)", "color": PURPLE, "marker": "<"},
    "final-only": {"label": "Final-Only", "color": VERMILION, "marker": "*", "linestyle": "--"},
    "final-adaptive": {"label": "Final, adaptive rate", "color": VERMILION, "marker": "s"},
    "final-adaptive-closed-loop": {
        "label": "Final, adaptive rate, closed loop",
        "color": VERMILION,
        "marker": "D",
        "linestyle": "-.",
    },
    "dp-final": {"label": "Final, optimal (DP)", "color": VERMILION, "marker": "d", "linestyle": ":"},
    "dp": {"label": "Optimum (DP)", "color": _RED, "marker": "d"},
    "dp-current-rate": {"label": "Optimum, rate known", "color": _RED, "marker": "p", "linestyle": "--"},
    "dp-anytime": {"label": "Optimum, anytime", "color": _RED, "marker": "v", "linestyle": "-."},
    "dp-inferred": {"label": "Optimum, SNR inferred", "color": _RED, "marker": "P", "linestyle": ":"},
    "learned": {"label": "Learned", "color": _SEA_GREEN, "marker": "H"},
    "lookahead-closed-loop": {"label": "Look-ahead, closed loop", "color": BLACK, "marker": "o", "linestyle": "--"},
    "clairvoyant": {"label": "Clairvoyant bound", "color": _BROWN, "marker": "2", "linestyle": "-."},
    "random": {"label": "Random", "color": GRAY, "marker": "x", "linestyle": ":"},
}
_SPARE_COLORS = (_BROWN, _VIOLET, _SEA_GREEN, _RED)


def _style(agent: str, strangers: list[str]) -> dict[str, Any]:
    """The style of an agent; ``strangers``, the agents without a style of their own, share the spare colors."""
    if agent in _STYLES:
        return dict(_STYLES[agent])
    at_one_depth = re.fullmatch(r"(persistent|final)-q(\d+)", agent)
    dashes, color = divmod(strangers.index(agent), len(_SPARE_COLORS))
    return {
        "label": f"{at_one_depth[1].capitalize()}-Q ({at_one_depth[2]} bit)" if at_one_depth else agent,
        "color": _SPARE_COLORS[color],
        "marker": "h",
        "linestyle": list(DASHES)[dashes % len(DASHES)],
    }


def rows_by_policy(rows: Table) -> dict[str, Table]:
    """Rows of a table by policy, in order of appearance.

    A policy goes by the name of its agent. Where the rows differ in coder or payload, these are named, too, for example
    ``lookahead (forward)``: numbers of different systems do not compare as those of one system do.
    """
    varied = [column for column in ("coder", "payload") if len({row[column] for row in rows}) > 1]
    policies: dict[str, Table] = {}
    for row in rows:
        details = ", ".join(str(row[column]) for column in varied)
        policies.setdefault(f"{row['agent']} ({details})" if details else row["agent"], []).append(row)
    return policies


def styles_by_policy(policies: dict[str, Table]) -> dict[str, dict[str, Any]]:
    """How to draw every policy; the policies of one agent share its color and differ in marker fill and dashes."""
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
