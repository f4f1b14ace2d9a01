"""Write the frames of an episode as text."""

from __future__ import annotations

from refine_env.config import SystemConfig
from refine_env.dynamics.simulator import EpisodeBatch

__all__ = ["ansi_frame", "start_kind"]

_BAR_WIDTH = 20


def _latent_name(step: int, num_steps: int) -> str:
    return f"x_{step} (noise)" if step == num_steps else f"x_{step}"


def start_kind(config: SystemConfig) -> str:
    """Name what the device starts with: noise, or the midpoint that it shares with the server."""
    return "noise" if config.first_device_step == config.num_steps else "midpoint"


def ansi_frame(episodes: EpisodeBatch, i: int) -> str:
    """Write one line: the slot, the server's progress, the message in flight, and the latent at the device.

    Args:
        episodes: a batch of episodes.
        i: the number of the episode in the batch.
    """
    config, s = episodes.config, episodes.state[i]
    num_steps, deadline = config.num_steps, config.deadline
    slot = min(int(s["slot"]), deadline)
    done = round(_BAR_WIDTH * (num_steps - int(s["server_step"])) / num_steps)
    rate = episodes.rates[i, slot - 1] / config.latent_dim
    left = episodes.remaining_bits()[i] / config.latent_dim
    if s["message_size"] == 0.0:
        channel = "idle"
    elif s["message_bits"] == 0:
        channel = f"prompt, {left:.2f} bit/dim left"
    else:
        channel = f"x_{s['message_step']} at {s['message_bits']} bit, {left:.2f} bit/dim left"
    held = f"x_{s['device_step']} " + (f"at {s['device_bits']} bit" if s["device_bits"] else f"({start_kind(config)})")
    ended = "  [deadline]" if s["slot"] > deadline else ""
    return (
        f"slot {slot:3d}/{deadline}  "
        f"server {'█' * done}{'·' * (_BAR_WIDTH - done)} {_latent_name(int(s['server_step']), num_steps):<12}  "
        f"rate {rate:5.2f} bit/dim  channel {channel:<38}  "
        f"device {held}, MSE {episodes.latent_mse[i]:.3g}{ended}\n"
    )
