"""The server on the command line: ``python -m agents.send`` plays an episode to ``python -m refine_env.receive``."""

from __future__ import annotations

from typing import Annotated

import gymnasium as gym
import typer

import agents
from refine_env import ENV_ID
from refine_env.commands import CacheOption, SnrOption, SplitOption, command, run
from refine_env.receive import DEFAULT_PORT, describe
from refine_env.transport import Sender

__all__ = ["main"]


@command
def main(
    agent: Annotated[str, typer.Option(help="The policy.")] = "lookahead",
    host: Annotated[str, typer.Option(help="Where the device listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port at which it listens.")] = DEFAULT_PORT,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for the device.")] = 10.0,
    snr_db: SnrOption = 6.0,
    seed: Annotated[int, typer.Option(help="Seed of the episode.", min=0)] = 0,
    cache: CacheOption = "default",
    split: SplitOption = "test",
) -> None:
    """Play the server for one episode: compute, decide, and send what the channel carries.

    Exit codes: 0 done, 2 an argument is wrong, 3 the connection failed, or a cache is missing or damaged.
    """
    env = gym.make(ENV_ID, **{"snr_db": snr_db, "cache": cache, "split": split, **agents.env_kwargs(agent)})
    policy = agents.make(agent, env.unwrapped.config)  # type: ignore[attr-defined]
    sent = Sender(env, policy, timeout=timeout).send((host, port), seed=seed)
    typer.echo(f"{describe(sent)}, latent MSE {sent.latent_mse:.6g}")


if __name__ == "__main__":
    run(main)
