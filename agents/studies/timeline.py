"""One draw, played sequentially and progressively: what [K] Fig. 1 sketches, measured.

``python -m agents.evaluate --study fig1`` plays Final-Only, which computes and then sends, and the look-ahead, which
sends while the server computes, on the same trajectory and channel, and notes slot by slot what the server computes,
what is on the link and what the device shows.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import typer
from numpy.typing import NDArray

import agents
from agents.studies.base import Request, Study
from agents.studies.images import Decoder, decode, scale_arrays, scale_in, to_tile
from refine_env import ENV_ID, ConfigurationError, TrajectoryCache
from refine_env.evaluation import Table, episode_seeds, play_episode, read_table, write_atomically, write_table
from refine_env.radiomap import PowerScale
from refine_env.render import AUTO_DECODER, EpisodeHistory, Message
from refine_env.render.decoder import find_decoder, pictures_of, scale_of

__all__ = [
    "FIG1",
    "MESSAGE_COLUMNS",
    "SCHEMES",
    "SLOT_COLUMNS",
    "Timeline",
    "play_timeline",
    "read_timelines",
]

SCHEMES = {"sequential": "final-only", "progressive": "lookahead"}
"""The two schemes of [K] Fig. 1, with the policies that follow them."""

_DRAW: dict[str, type] = {"scheme": str, "agent": str, "snr_db": float, "episode": int}

SLOT_COLUMNS: dict[str, type] = {
    **_DRAW,
    "seed": int,
    "trajectory": int,
    "slot": int,
    "server_step": int,
    "rate": float,
    "latent_mse": float,
}
"""Columns of ``slots.csv``: in each slot t(n) at the server, the rate of the link [bit per latent dimension], and the
latent MSE that the device shows after the slot; slot 0 is before the first one."""

MESSAGE_COLUMNS: dict[str, type] = {
    **_DRAW,
    "step": int,
    "bits": int,
    "first_slot": int,
    "last_slot": int,
    "sent": float,
}
"""Columns of ``messages.csv``: what was on the link, ``bits`` = 0 the prompt; an empty ``last_slot`` is a message that
the deadline cut off, ``sent`` the share of it that had flowed."""

_IMAGES = "timeline.npz"


class Timeline(NamedTuple):
    """One scheme on one draw.

    Attributes:
        slots: rows of :data:`SLOT_COLUMNS`.
        messages: rows of :data:`MESSAGE_COLUMNS`.
        images: what the device shows from the end of a slot on, by slot, 0 for the start, uint8 (height, width, 3);
            empty where there is no decoder.
        scale: what the colors of the images stand for, where they are radio maps.
    """

    slots: Table
    messages: Table
    images: dict[int, NDArray[np.uint8]]
    scale: PowerScale | None = None


def play_timeline(
    scheme: str, snr_db: float, episode: int, seed: int, env_kwargs: Mapping[str, Any], decoder: Decoder | None
) -> Timeline:
    """Play one scheme on one draw.

    Args:
        scheme: a key of :data:`SCHEMES`.
        snr_db: mean SNR [dB].
        episode: number of the draw.
        seed: seed of the environment.
        env_kwargs: environment arguments.
        decoder: decodes what the device holds; None leaves images out.
    """
    name = SCHEMES[scheme]
    env = gym.make(ENV_ID, **{**env_kwargs, **agents.env_kwargs(name), "snr_db": snr_db})
    config, cache = env.get_wrapper_attr("config"), env.get_wrapper_attr("cache")
    draw = {"scheme": scheme, "agent": name, "snr_db": snr_db, "episode": episode}
    history = EpisodeHistory(config, cache)
    slots: Table = []
    held: dict[int, NDArray[np.float32]] = {}
    for step in play_episode(env, agents.make(name, config), seed=seed):
        slot = int(step.observation["slot"])
        if step.action is None:
            rates = env.get_wrapper_attr("episode_rates") / config.latent_dim
            history.begin(int(step.info["trajectory"]), rates * config.latent_dim, slot)
        else:
            history.note(step.action, slot)
        history.catch_up()
        if step.action is None or step.info["delivered"]:
            held[slot - 1] = history.device_latent.copy()
        slots.append(
            {
                **draw,
                "seed": seed,
                "trajectory": int(step.info["trajectory"]),
                "slot": slot - 1,
                "server_step": config.num_steps if step.before is None else int(step.before["server_step"]),
                "rate": float(rates[slot - 2]) if step.before is not None else 0.0,
                "latent_mse": float(step.info["latent_mse"]),
            }
        )
    messages = [{**draw, **_message_columns(message, history.progress)} for message in history.messages]
    images: dict[int, NDArray[np.uint8]] = {}
    if decoder is not None:
        shape = cache.latent_shape
        decoded = decode(decoder, np.stack([latent.reshape(shape) for latent in held.values()]))
        pictures = pictures_of(decoded, decoder, cache, [slots[0]["trajectory"]] * len(decoded))
        images = {slot: to_tile(picture) for slot, picture in zip(held, pictures, strict=True)}
    env.close()
    return Timeline(slots, messages, images, scale_of(decoder))


def _message_columns(message: Message, progress: float) -> dict[str, Any]:
    through = message.last_slot is not None
    return {**vars(message), "sent": 1.0 if through else progress}


def write_timelines(timelines: Sequence[Timeline], folder: Path) -> list[Path]:
    """Write ``slots.csv``, ``messages.csv`` and, where there are images, ``timeline.npz``; returns their paths."""
    tables = {
        "slots.csv": ([row for one in timelines for row in one.slots], SLOT_COLUMNS),
        "messages.csv": ([row for one in timelines for row in one.messages], MESSAGE_COLUMNS),
    }
    for name, (rows, columns) in tables.items():
        write_table(folder / name, rows, columns)
    written = [folder / name for name in tables]
    shown = [(k, slot, image) for k, one in enumerate(timelines) for slot, image in one.images.items()]
    (folder / _IMAGES).unlink(missing_ok=True)  # an earlier run may have left it
    if shown:
        buffer = io.BytesIO()
        numbers, slots, images = zip(*shown, strict=True)
        np.savez_compressed(
            buffer,
            allow_pickle=False,
            timeline=np.array(numbers),
            slot=np.array(slots),
            image=np.stack(images),
            **scale_arrays(timelines[0].scale),
        )
        write_atomically(folder / _IMAGES, buffer.getvalue())
        written.append(folder / _IMAGES)
    return written


def read_timelines(folder: Path) -> list[Timeline]:
    """Read what :func:`write_timelines` wrote, in its order.

    Raises:
        ConfigurationError: if a file is missing, or not such a table.
    """
    command = "python -m agents.evaluate --study fig1"
    slots = read_table(folder / "slots.csv", SLOT_COLUMNS, optional=(), command=command)
    messages = read_table(folder / "messages.csv", MESSAGE_COLUMNS, optional=("last_slot",), command=command)
    keys = list(dict.fromkeys(tuple(row[name] for name in _DRAW) for row in slots))
    images: list[dict[int, NDArray[np.uint8]]] = [{} for _ in keys]
    scale = None
    path = folder / _IMAGES
    if path.is_file():
        try:
            with np.load(path, allow_pickle=False) as file:
                for number, slot, image in zip(file["timeline"], file["slot"], file["image"], strict=True):
                    images[int(number)][int(slot)] = image
                scale = scale_in(file)
        except (OSError, ValueError, KeyError, IndexError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise ConfigurationError(
                f"`{_IMAGES}` must hold the images of a timeline, got {path} ({type(error).__name__}: {error}). "
                f"Make it with: {command}"
            ) from None
    return [
        Timeline(
            [row for row in slots if tuple(row[name] for name in _DRAW) == key],
            [row for row in messages if tuple(row[name] for name in _DRAW) == key],
            shown,
            scale,
        )
        for key, shown in zip(keys, images, strict=True)
    ]


def _run(request: Request) -> tuple[list[Path], dict[str, Any]]:
    """Play and write all draws that are asked for."""
    cache = TrajectoryCache.open(str(request.env_kwargs["cache"]))
    decoder, note = find_decoder(cache, AUTO_DECODER)
    if note:
        typer.echo(f"No images ({note}).")
    seeds = episode_seeds(request.seed, request.episodes)
    timelines = [
        play_timeline(scheme, snr_db, episode, seed, request.env_kwargs, decoder)
        for snr_db in request.snrs_db
        for episode, seed in enumerate(seeds)
        for scheme in SCHEMES
    ]
    for one in timelines:
        last = one.slots[-1]
        delivered = sum(row["bits"] > 0 and row["last_slot"] is not None for row in one.messages)
        typer.echo(
            f"{last['scheme']} at {last['snr_db']:g} dB, seed {last['seed']}: {delivered} deliveries, "
            f"latent MSE {last['latent_mse']:.2e}, shown: {cache.prompt(last['trajectory']) or 'no prompt'}"
        )
    return write_timelines(timelines, request.out), {"schemes": SCHEMES}


FIG1 = Study("fig1", "sequential and progressive on one draw, slot by slot", (6.0,), 1, _run)
