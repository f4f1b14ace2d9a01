"""The episode player of a report: a few episodes, played again, as plotly's figures and frames."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agents.figures.series import zero_floor
from agents.figures.style import BLACK, BLUE, GRAY, ORANGE, YELLOW, rows_by_policy, styles_by_policy
from agents.report.plots import EXTRA, LEGEND_ABOVE, LOG_AXIS, default_snr, import_plotly, make_axis, make_layout
from agents.report.replay import replay_row
from agents.studies.base import common_settings
from agents.studies.images import Decoder, decode
from refine_env import CacheError, ConfigurationError, TrajectoryCache
from refine_env.errors import import_extra
from refine_env.evaluation import Table
from refine_env.radiomap import color_bar
from refine_env.render.decoder import pictures_of, scale_of

__all__ = ["choose_episodes", "make_player"]

_MOST_IMAGES = 400
_MOST_PIXELS = 64
"""The number of images in the player, about, and their longer side in pixels: they could be most of the page."""

_CHANNEL_COLORS = {"prompt": ORANGE, "latent": BLUE, "idle": "#BBBBBB"}
_MESSAGE_COLOR, _SERVER_COLOR, _DEVICE_COLOR = BLUE, GRAY, BLACK
_FRAME_MS = 200


def choose_episodes(rows: Table, count: int) -> list[int]:
    """Typical episodes of one SNR, the same ones for all its policies.

    Episodes are ordered by their rank in latent MSE, averaged over the policies. Chosen are the quantiles
    1/(2·count), 3/(2·count), … of that order; a single episode is the median.

    Args:
        rows: rows of ``episodes.csv`` at one SNR.
        count: how many to choose.

    Returns:
        Numbers of the episodes, from low MSE to high; only such as every policy has played.
    """
    policies = rows_by_policy(rows).values()
    common = sorted(set.intersection(*({row["episode"] for row in own} for own in policies)))
    ranks = np.zeros(len(common))
    for own in policies:
        by_episode = {row["episode"]: row["latent_mse"] for row in own}
        values = np.array([by_episode[episode] for episode in common])
        ordered = np.sort(values)
        ranks += np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right")
    order = np.argsort(ranks, kind="stable")
    positions = dict.fromkeys(int((2 * k + 1) * len(common) / (2 * count)) for k in range(count))
    return [common[order[position]] for position in positions if position < len(common)]


def make_player(
    episodes: Table, run: dict[str, Any] | None, count: int, decoder: Decoder | None
) -> tuple[dict[str, Any] | None, list[str]]:
    """The data that the script of the page reads, and sentences on what the player does not show.

    The data is None where there is nothing to play.
    """
    if count == 0:
        return None, ["It was left out."]
    if run is None:
        return None, ["There is no run.json beside the tables, so the episodes cannot be played again."]
    try:
        cache = common_settings(run["env_kwargs"]).open_cache()
    except (ConfigurationError, CacheError) as error:
        return None, [f"The episodes cannot be played again. {error}"]
    if cache.sha256 != run["cache"].get("sha256"):
        return None, [
            "The episodes cannot be played again: the cache here is not the one of the evaluation, its hash differs."
        ]
    policies = rows_by_policy(episodes)
    styles = styles_by_policy(policies)
    snrs = sorted({row["snr_db"] for row in episodes})
    chosen = {snr_db: choose_episodes([row for row in episodes if row["snr_db"] == snr_db], count) for snr_db in snrs}
    notes: dict[str, str] = {}
    plays: dict[tuple[int, int, int], tuple[str, dict[str, Any], Table]] = {}
    for i, (policy, rows) in enumerate(policies.items()):
        by_key = {(row["snr_db"], row["episode"]): row for row in rows}
        label = styles[policy]["label"]
        for j, snr_db in enumerate(snrs):
            for k, episode in enumerate(chosen[snr_db]):
                if policy in notes or (snr_db, episode) not in by_key:
                    continue
                row = by_key[snr_db, episode]
                try:
                    trace = replay_row(row, run["env_kwargs"], latents=decoder is not None)
                except ConfigurationError as error:
                    notes[policy] = f"{label} is not here, or not at every SNR. {error}"
                    continue
                plays[i, j, k] = (label, row, trace)
    if not plays:
        return None, list(notes.values())
    traces = [trace for _, _, trace in plays.values()]
    values = [slot["latent_mse"] for trace in traces for slot in trace]
    floor = zero_floor(values)
    entries = {}
    for choice, (label, row, trace) in plays.items():
        prompt = cache.prompt(row["trajectory"])
        of_prompt = "" if prompt is None else f", prompt “{prompt}”"
        entries[_key(choice)] = {
            "title": f"{label} at {row['snr_db']:g} dB: episode {row['episode']}, seed {row['seed']}, "
            f"trajectory {row['trajectory']}{of_prompt}",
            "data": _draw_episode(trace, cache.payload_schedule.num_steps, floor).to_plotly_json()["data"],
            "slots": [_describe(slot, len(trace), cache.payload_schedule.num_steps) for slot in trace],
        }
    pictures: list[str] = []
    each = 0
    if decoder is not None:
        pictures, each = _add_pictures(
            entries, {_key(choice): play[2] for choice, play in plays.items()}, cache, decoder
        )
    deadline = len(traces[0])
    most_chosen = max(len(numbers) for numbers in chosen.values())
    return {
        "layout": _player_layout(deadline, cache.payload_schedule.num_steps, floor, max(values)),
        "frames": [
            {"name": str(slot), "layout": {"shapes": _now_and_later(slot, deadline)}} for slot in range(1, deadline + 1)
        ],
        "episodes": entries,
        "pictures": pictures,
        "pictures_each": each,
        "scale": _describe_scale(decoder),
        "first": {"snr": snrs.index(default_snr(snrs)), "slot": deadline},
        "choices": {
            "agent": {
                i: styles[policy]["label"] for i, policy in enumerate(policies) if any(key[0] == i for key in plays)
            },
            "snr": {j: f"{snr_db:g} dB" for j, snr_db in enumerate(snrs)},
            "episode": {k: f"{k + 1} of {most_chosen}" for k in range(most_chosen)},
        },
    }, list(notes.values())


def _key(choice: tuple[int, int, int]) -> str:
    """The key of an episode: the script of the page joins the values of its three menus like this."""
    return "-".join(map(str, choice))


def _now_and_later(slot: int, deadline: int) -> list[dict[str, Any]]:
    """Shapes that mark a slot and veil those after it."""
    over_all = {"type": "rect", "xref": "x", "yref": "paper", "y0": 0.0, "y1": 1.0, "line": {"width": 0}}
    return [
        {**over_all, "x0": slot - 0.5, "x1": slot + 0.5, "fillcolor": YELLOW, "opacity": 0.35, "layer": "below"},
        {**over_all, "x0": slot + 0.5, "x1": deadline + 1.0, "fillcolor": "white", "opacity": 0.85, "layer": "above"},
    ]


def _player_layout(deadline: int, num_steps: int, floor: float, most: float) -> dict[str, Any]:
    """Layout of the player, the same for all its episodes."""
    immediately = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    forward = {
        "fromcurrent": True,
        "frame": {"duration": _FRAME_MS, "redraw": True},
        "transition": {"duration": 0},
    }
    slider = {
        "active": deadline - 1,
        "steps": [
            {"label": str(slot), "method": "animate", "args": [[str(slot)], immediately]}
            for slot in range(1, deadline + 1)
        ],
        "currentvalue": {"prefix": "slot ", "xanchor": "left"},
        "pad": {"t": 55},
        "x": 0.15,
        "len": 0.85,
    }
    buttons = {
        "type": "buttons",
        "direction": "left",
        "showactive": False,
        "buttons": [
            {"label": "Play", "method": "animate", "args": [None, forward]},
            {"label": "Pause", "method": "animate", "args": [[None], immediately]},
        ],
        "pad": {"t": 75},
        "x": 0.0,
        "xanchor": "left",
        "y": 0.0,
        "yanchor": "top",
    }
    slots = {"range": [0.5, deadline + 1.0], "gridcolor": "#E4E4E4", "zeroline": False}
    layout = make_layout(
        height=700,
        barmode="overlay",
        bargap=0.15,
        hovermode="closest",
        legend=LEGEND_ABOVE,
        xaxis={**slots, "anchor": "y3", "title": {"text": "slot", "standoff": 4}},
        yaxis=make_axis("rate [bit/dim]", domain=[0.76, 1.0], rangemode="tozero", fixedrange=True),
        yaxis2=make_axis("diffusion step t", domain=[0.38, 0.71], range=[-1.5, num_steps + 1.5], fixedrange=True),
        yaxis3=make_axis(
            "latent MSE held",
            **{**LOG_AXIS, "dtick": max(1, round(math.log10(max(most, floor) / floor) / 4))},
            domain=[0.0, 0.33],
            range=[math.log10(floor) - 0.2, math.log10(max(most, floor)) + 0.3],
            fixedrange=True,
        ),
        shapes=_now_and_later(deadline, deadline),
        sliders=[slider],
        updatemenus=[buttons],
    )
    checked: dict[str, Any] = import_plotly().Figure(layout=layout).to_plotly_json()["layout"]
    return checked


def _messages(trace: Table) -> list[dict[str, Any]]:
    """The latents that went onto the link: step, bits, first and last slot, whether the last bit came."""
    messages: list[dict[str, Any]] = []
    going_on = False
    for slot in trace:
        if slot["channel"] == "latent":
            if not going_on:
                messages.append({"step": slot["message_step"], "bits": slot["message_bits"], "first": slot["slot"]})
            messages[-1] |= {"last": slot["slot"], "delivered": slot["delivered"]}
        going_on = slot["channel"] == "latent" and not slot["delivered"]
    return messages


def _draw_episode(trace: Table, num_steps: int, floor: float) -> Any:
    """The traces of one episode, the same ones in the same order for every episode."""
    figure = import_plotly().Figure()
    for channel, color in _CHANNEL_COLORS.items():
        rows = [slot for slot in trace if slot["channel"] == channel]
        figure.add_bar(
            name={"prompt": "carries the prompt", "latent": "carries a latent", "idle": "idle"}[channel],
            x=[slot["slot"] for slot in rows],
            y=[float(f"{slot['rate']:.6g}") for slot in rows],
            width=0.85,
            marker={"color": color},
            hovertemplate="slot %{x}: %{y:.3f} bit/dim",
        )
    slots = [slot["slot"] for slot in trace]

    def add_line(name: str, values: list[Any], hover: str, axis: str, line: Mapping[str, str], **own: Any) -> None:
        figure.add_scatter(
            name=name,
            x=slots,
            y=values,
            mode="lines",
            line={"shape": "hvh", "width": 2.0, **line},
            hovertemplate=f"slot %{{x}}: {hover}",
            yaxis=axis,
            **own,
        )

    at_server, at_device = ([slot[name] for slot in trace] for name in ("server_step", "device_step"))
    server_line, device_line = {"color": _SERVER_COLOR, "dash": "dot"}, {"color": _DEVICE_COLOR}
    add_line("newest step at the server", at_server, "server has x<sub>%{y}</sub>", "y2", server_line)
    add_line("step at the device", at_device, "device holds x<sub>%{y}</sub>", "y2", device_line)
    messages = _messages(trace)
    for name, dash, delivered in (
        ("message in flight", "solid", True),
        ("message that misses the deadline", "dot", False),
    ):
        own = [message for message in messages if message["delivered"] == delivered]
        labels = [
            f"x<sub>{message['step']}</sub> at {message['bits']} bit, slots {message['first']} – {message['last']}"
            for message in own
        ]
        figure.add_scatter(
            name=name,
            x=[x for message in own for x in (message["first"] - 0.5, message["last"] + 0.5, None)],
            y=[y for message in own for y in (message["step"], message["step"], None)],
            text=[text for label in labels for text in (label, label, None)],
            mode="lines",
            line={"color": _MESSAGE_COLOR, "width": 5, "dash": dash},
            opacity=0.6,
            hoverinfo="text",
            showlegend=delivered or bool(own),
            yaxis="y2",
        )
    ends = [slot for slot in trace if slot["delivered"]]
    for axis, values in (("y2", [slot["device_step"] for slot in ends]), ("y3", [slot["latent_mse"] for slot in ends])):
        figure.add_scatter(
            name="delivery",
            x=[slot["slot"] for slot in ends],
            y=[value if axis == "y2" else value or floor for value in values],
            customdata=[[slot["device_step"], slot["device_bits"], slot["latent_mse"]] for slot in ends],
            mode="markers",
            marker={"color": _DEVICE_COLOR, "size": 8},
            hovertemplate="slot %{x}: x<sub>%{customdata[0]}</sub> at %{customdata[1]} bit, MSE %{customdata[2]:.3e}",
            showlegend=axis == "y2",
            legendgroup="delivery",
            yaxis=axis,
        )
    errors = [slot["latent_mse"] for slot in trace]
    shown = [error or floor for error in errors]
    hover = "MSE %{customdata:.3e}"
    add_line("latent MSE held", shown, hover, "y3", device_line, customdata=errors, showlegend=False)
    return figure


def _describe_latent(step: int, bits: int, num_steps: int) -> str:
    if bits == 0:
        return "only noise" if step == num_steps else f"the midpoint x_{step}"
    return f"x_{step} at {bits} bit"


def _describe(slot: Mapping[str, Any], deadline: int, num_steps: int) -> str:
    """A slot in one sentence."""
    message = f"x_{slot['message_step']} at {slot['message_bits']} bit"
    left = f"{slot['remaining_bits']:.2f} bit/dim left"
    link = {
        "prompt": f"carries the prompt, {left}" if slot["remaining_bits"] else "the prompt is through",
        "latent": f"{message} is delivered" if slot["delivered"] else f"carries {message}, {left}",
        "idle": "idle",
    }[slot["channel"]]
    server = "only noise" if slot["server_step"] == num_steps else f"x_{slot['server_step']}"
    device = _describe_latent(slot["device_step"], slot["device_bits"], num_steps)
    return (
        f"Slot {slot['slot']} of {deadline}. Server: {server}. Link ({slot['rate']:.2f} bit/dim): {link}. "
        f"Device: {device}, latent MSE {slot['latent_mse']:.3g}."
    )


def _add_pictures(
    entries: dict[str, Any], traces: Mapping[str, Table], cache: TrajectoryCache, decoder: Decoder
) -> tuple[list[str], int]:
    """Decode what the devices hold, and give every slot of the episodes its picture.

    Where an episode has many deliveries, some of them are decoded, evenly spread, and always the last one.

    Returns:
        The pictures as data URIs, and the largest number of pictures of one episode. Every entry gets ``pictures``,
        a position among them and a caption for each slot, and ``clean``, the position of x_0.
    """
    import_extra("PIL.Image", EXTRA)
    ends = {key: [slot["slot"] for slot in trace if slot["delivered"]] for key, trace in traces.items()}
    each = _limit([len(slots) for slots in ends.values()])
    latents: list[NDArray[np.float32]] = []
    shown: list[int] = []
    position: dict[tuple[int, bytes], int] = {}

    def add(latent: NDArray[Any], trajectory: int) -> int:
        values = latent.astype(np.float32).reshape(cache.latent_shape)
        key = trajectory, values.tobytes()
        if key not in position:
            position[key] = len(latents)
            latents.append(values)
            shown.append(trajectory)
        return position[key]

    for key, trace in traces.items():
        trajectory = trace[0]["trajectory"]
        source = cache.payload(trajectory, "latent")
        entries[key]["clean"] = add(source[0], trajectory)
        slots = ends[key]
        kept = {slots[k] for k in np.linspace(len(slots) - 1, 0, min(each, len(slots))).round().astype(int)}
        first = trace[0]["device_step"]  # no prompt and message are through in one slot
        start = "noise" if first == cache.payload_schedule.num_steps else "midpoint"
        picture = [add(source[first], trajectory), f"the {start} that both ends share"]
        entries[key]["pictures"] = []
        for slot in trace:
            if slot["slot"] in kept:
                held = _describe_latent(slot["device_step"], slot["device_bits"], cache.payload_schedule.num_steps)
                picture = [add(slot["latent"], trajectory), f"{held}, delivered in slot {slot['slot']}"]
            entries[key]["pictures"].append(picture)
    pictures = pictures_of(decode(decoder, np.stack(latents)), decoder, cache, shown)
    return [_data_uri(picture) for picture in pictures], each


def _describe_scale(decoder: Decoder | None) -> dict[str, Any] | None:
    """The color scale of radio maps, its picture from the least power up; None where the images are none."""
    scale = scale_of(decoder)
    if scale is None:
        return None
    bar = np.repeat(color_bar()[::4].swapaxes(0, 1), 4, axis=0)
    return {"bar": _data_uri(bar), "least": f"{scale.black_dbm:g}", "most": f"{scale.white_dbm:g}"}


def _limit(deliveries: Sequence[int]) -> int:
    """The number of pictures of an episode: as many as keep to ``_MOST_IMAGES`` in all, but at least two."""
    limit = 2
    while limit < max(deliveries) and sum(min(count, limit + 1) for count in deliveries) <= _MOST_IMAGES:
        limit += 1
    return limit


def _data_uri(image: NDArray[np.float32]) -> str:
    """An image, floats in [0, 1], as a PNG file in a URI; reduced to at most ``_MOST_PIXELS`` on its longer side."""
    pillow = import_extra("PIL.Image", EXTRA)
    picture = pillow.fromarray(np.asarray(np.rint(image * 255.0), dtype=np.uint8))
    picture.thumbnail((_MOST_PIXELS, _MOST_PIXELS))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
