"""The device on the command line: ``python -m refine_env.receive`` decodes what ``python -m agents.send`` sends."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from refine_env.commands import command, run
from refine_env.evaluation import write_atomically
from refine_env.transport import (
    DEFAULT_EPISODE_TIMEOUT,
    DEFAULT_MAX_LATENT_DIM,
    DEFAULT_MAX_NUM_STEPS,
    Receiver,
    Reception,
)

__all__ = ["DEFAULT_PORT", "describe", "main"]

DEFAULT_PORT = 5005


def describe(reception: Reception) -> str:
    """An episode as text: a line for every delivery, and one for what the device holds."""
    lines = [
        f"slot {delivery.slot}: x_{delivery.step} at {delivery.bits} bits, {delivery.num_bytes} bytes"
        for delivery in reception.deliveries
    ]
    nothing = " (only the noise)" if reception.device_step == reception.config.num_steps else ""
    return "\n".join([*lines, f"deadline: the device holds x_{reception.device_step}{nothing}"])


@command
def main(
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at; 0 takes a free one.")] = DEFAULT_PORT,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for a sender, and for each of its frames.")] = 60.0,
    episode_timeout: Annotated[float, typer.Option(help="Seconds that an episode may take.")] = DEFAULT_EPISODE_TIMEOUT,
    max_latent_dim: Annotated[int, typer.Option(help="M that is taken.")] = DEFAULT_MAX_LATENT_DIM,
    max_num_steps: Annotated[int, typer.Option(help="T that is taken.")] = DEFAULT_MAX_NUM_STEPS,
    out: Annotated[Path | None, typer.Option(help="Save what the device holds, float32 (M,), as this .npy.")] = None,
) -> None:
    """Play the device for one episode: listen, decode every delivery, hold a latent at the deadline.

    Exit codes: 0 done, 2 an argument is wrong, 3 the connection failed, or the output cannot be written, 4 the sender
    entropy-codes and the extra for that is not installed.
    """
    with Receiver(
        host,
        port,
        timeout=timeout,
        episode_timeout=episode_timeout,
        max_latent_dim=max_latent_dim,
        max_num_steps=max_num_steps,
    ) as receiver:
        typer.echo("listening on {}:{}".format(*receiver.address))
        reception = receiver.receive()
    if out is not None:
        _save(out, reception)
    typer.echo(describe(reception))


def _save(path: Path, reception: Reception) -> None:
    buffer = io.BytesIO()
    np.save(buffer, reception.latent)
    write_atomically(path, buffer.getvalue())


if __name__ == "__main__":
    run(main)
