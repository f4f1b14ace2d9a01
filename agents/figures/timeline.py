"""One draw, sequential above and progressive below: what is computed, what is sent, what is shown ([K] Fig. 1)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.figures.canvas import add_power_bar, new_figure, save_figure
from agents.figures.style import BLUE, GRAY, NOTE_COLOR, ORANGE, SKY_BLUE, VERMILION
from agents.studies.timeline import Timeline
from refine_env.errors import import_extra
from refine_env.evaluation import Table

__all__ = ["draw_timeline"]

_TITLES = {
    "sequential": "(a) sequential: compute, then send",
    "progressive": "(b) progressive: send while computing",
}
_COMPUTE, _LINK, _DEVICE = 2.75, 1.85, 0.55  # heights of the lanes' centers
_HALF = 0.3  # half the height of a bar
_PIXELS_PER_IMAGE = 30.0  # side of an image [points]
_CLOSEST = 0.09  # between the centers of two images, as a share of the slots
_ROOM = 0.045  # between an image's center and the start or the deadline, likewise
_WIDE = 0.045  # enough for the name of a message, likewise
_ON_WHITE = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # behind text that stands on a lane's line


def draw_timeline(timelines: Sequence[Timeline], out: Path) -> list[Path]:
    """``fig1.png`` and ``.pdf``: the first draw of the study ``fig1``, every scheme of it, and the rate of the link.

    Args:
        timelines: as :func:`agents.studies.timeline.read_timelines` gives them.
        out: folder for the figure.

    Returns:
        The files written.

    Raises:
        MissingExtraError: if matplotlib is not installed.
    """
    first = timelines[0].slots[0]
    shown = [
        one for one in timelines if all(one.slots[0][name] == first[name] for name in ("snr_db", "episode", "seed"))
    ]
    deadline = max(row["slot"] for row in timelines[0].slots)
    heights = [*[3.4] * len(shown), 0.62]
    figure, (*panels, below) = new_figure(
        7.4, 0.9 + 2.35 * len(shown), len(shown) + 1, sharex=True, gridspec_kw={"height_ratios": heights}
    )
    for axes, one in zip(panels, shown, strict=True):
        _draw_scheme(axes, one, deadline)
    rates = [row["rate"] for row in timelines[0].slots[1:]]
    below.stairs(rates, np.arange(deadline + 1), fill=True, color=SKY_BLUE)
    below.set_ylim(0.0, 1.25 * max(*rates, 1e-9))
    below.set_ylabel("rate\n[bit/dim.]", fontsize=7, rotation=0, ha="right", va="center")
    below.tick_params(labelsize=7)
    below.set_xlabel(
        f"slot (mean SNR {first['snr_db']:g} dB; the same latents and the same fading in both)", fontsize=8
    )
    for axes in (*panels, below):
        axes.axvline(deadline, color=VERMILION, linewidth=1.4, zorder=1)
        axes.spines[["top", "right"]].set_visible(False)
    below.set_xlim(-0.02 * deadline, 1.13 * deadline)
    if timelines[0].scale is not None:
        add_power_bar(figure, panels, timelines[0].scale)
    return save_figure(figure, out, "fig1")


def _draw_scheme(axes: Any, one: Timeline, deadline: int) -> None:
    """The three lanes of a scheme."""
    axes.set_ylim(-0.35, 3.3)
    axes.set_yticks([_COMPUTE, _LINK, _DEVICE], ["server", "link", "device shows\n(latent MSE)"], fontsize=8)
    axes.tick_params(axis="both", length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_title(_TITLES[one.slots[0]["scheme"]], fontsize=9, loc="left", pad=4)
    axes.text(deadline, 3.36, "deadline", color=VERMILION, fontsize=8, ha="center", va="bottom")
    for height in (_COMPUTE, _LINK):
        axes.plot([0, deadline], [height, height], color=GRAY, linewidth=0.5, zorder=0)
    _draw_computation(axes, one.slots)
    for message in one.messages:
        _draw_message(axes, message, deadline)
    _draw_device(axes, one, deadline)


def _draw_computation(axes: Any, slots: Table) -> None:
    """A box for every step, darker the nearer to x_0; the steps are named where there is room."""
    num_steps = slots[0]["server_step"]
    steps = [row["server_step"] for row in slots[1:]]  # t(n) of slots 1 … T_d
    # The server is at work in a slot that is followed by a smaller t.
    begun = [(slot, t) for slot, (t, after) in enumerate(zip(steps, [*steps[1:], 0], strict=True), 1) if after < t]
    for slot, t in begun:
        share = 1.0 - (t - 1) / num_steps
        for color, alpha in (("white", 1.0), (BLUE, 0.12 + 0.7 * share)):  # white hides the lane's line
            axes.broken_barh([(slot - 1, 1)], (_COMPUTE - _HALF, 2 * _HALF), color=color, alpha=alpha, linewidth=0)
    if not begun:
        return
    style = {"fontsize": 8, "va": "center"}
    for slot, t in begun:
        if t % 10 == 0 and 0 < t < num_steps:
            axes.text(
                slot - 1,
                _COMPUTE,
                f"$x_{{{t}}}$",
                ha="center",
                color="black" if t > num_steps / 2 else "white",
                **style,
            )
    slot, t = begun[-1]
    if t == 1:
        axes.text(slot + 0.4, _COMPUTE, "$x_0$", ha="left", bbox=_ON_WHITE, **style)


def _draw_message(axes: Any, message: dict[str, Any], deadline: int) -> None:
    """A message on the link; what the deadline cuts off is hatched."""
    start, through = message["first_slot"] - 1, message["last_slot"] is not None
    end = message["last_slot"] if through else deadline
    late = {} if through else {"hatch": "////", "facecolor": "white"}
    color = GRAY if message["bits"] == 0 else ORANGE
    axes.broken_barh(
        [(start, end - start)],
        (_LINK - _HALF, 2 * _HALF),
        **{"facecolor": color, "edgecolor": "black", "linewidth": 0.6, **late},
    )
    if message["bits"] == 0:
        axes.annotate(
            "prompt",
            (end, _LINK),
            (4, 0),
            textcoords="offset points",
            fontsize=7,
            ha="left",
            va="center",
            color=NOTE_COLOR,
            bbox=_ON_WHITE,
        )
        return
    text = f"$x_{{{message['step']}}}$\n{message['bits']} bit"
    if through and end - start >= _WIDE * deadline:
        axes.text((start + end) / 2, _LINK, text, fontsize=7, ha="center", va="center", linespacing=1.0)
    elif not through:
        text = f"$x_{{{message['step']}}}$, {message['bits']} bit: {100 * message['sent']:.0f} % sent, too late"
        axes.text(start - 0.6, _LINK, text, fontsize=7, ha="right", va="center", color=VERMILION, bbox=_ON_WHITE)


def _draw_device(axes: Any, one: Timeline, deadline: int) -> None:
    """What the device shows from each delivery on, as far as there is room, and at the deadline."""
    mse = {row["slot"]: row["latent_mse"] for row in one.slots}
    changes = [0, *(row["last_slot"] for row in one.messages if row["bits"] > 0 and row["last_slot"] is not None)]
    held = {0: "noise"} | {
        row["last_slot"]: f"$\\hat{{x}}_{{{row['step']}}}$"
        for row in one.messages
        if row["bits"] > 0 and row["last_slot"] is not None
    }
    at_end = 1.08 * deadline
    axes.plot([0, at_end], [_DEVICE, _DEVICE], color=GRAY, linewidth=0.5, zorder=0)
    for slot in changes[1:]:
        axes.plot([slot, slot], [_LINK - _HALF, _DEVICE], color=NOTE_COLOR, linewidth=0.8, zorder=0)
    last_place = -float(deadline)
    for slot in changes:
        place = max(float(slot), _ROOM * deadline)
        # What is delivered last is beside the deadline in any case.
        if place - last_place < _CLOSEST * deadline or place > (1.0 - _ROOM) * deadline:
            continue
        _show(axes, place, one.images.get(slot), held[slot], mse[slot])
        last_place = place
    _show(axes, at_end, one.images.get(changes[-1]), held[changes[-1]], mse[deadline], bold=True)


def _show(axes: Any, place: float, image: NDArray[np.uint8] | None, name: str, mse: float, bold: bool = False) -> None:
    """An image, or the name of what is held where there is none, with its latent MSE below."""
    offsetbox = import_extra("matplotlib.offsetbox", "plot")
    if image is None:
        axes.text(
            place, _DEVICE, name, fontsize=8, ha="center", va="center", bbox={"facecolor": "white", "linewidth": 0.6}
        )
    else:
        picture = offsetbox.OffsetImage(image, zoom=_PIXELS_PER_IMAGE / image.shape[0], interpolation="antialiased")
        axes.add_artist(
            offsetbox.AnnotationBbox(
                picture,
                (place, _DEVICE),
                pad=0.05,
                bboxprops={"linewidth": 1.4 if bold else 0.6, "edgecolor": VERMILION if bold else "black"},
            )
        )
    axes.annotate(
        _format_mse(mse),
        (place, _DEVICE),
        (0, -_PIXELS_PER_IMAGE / 2 - 4),
        textcoords="offset points",
        fontsize=7,
        ha="center",
        va="top",
        annotation_clip=False,
    )


def _format_mse(mse: float) -> str:
    if mse >= 0.01 or mse == 0.0:
        return f"{mse:.2g}"
    mantissa, exponent = f"{mse:.0e}".split("e")
    return rf"${mantissa}\cdot10^{{{int(exponent)}}}$"
