"""Episodes played at the distortion level: the simulator without latents, scored by the recursion."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

import agents
from refine_env import SystemConfig
from refine_env.dynamics.simulator import EpisodeBatch
from refine_env.link import draw_rates_of_many


def draw_channel(config: SystemConfig, episodes: int, seed: int = 0) -> NDArray[np.float64]:
    """Bits per slot (N, T_d); of independent slots put together from a pool of 200,000, which is much faster."""
    link, power = config.link, config.total_power(config.single_snr_db("a channel"))
    if not link.channel.independent:
        rngs = [np.random.default_rng([seed, k]) for k in range(episodes)]
        powers = np.full(episodes, power)
        return draw_rates_of_many(
            rngs, config.deadline, link.num_subchannels, powers, config.symbols_per_slot, link.channel
        )
    rngs = [np.random.default_rng([seed, k]) for k in range(200)]
    powers = np.full(200, power)
    pool = draw_rates_of_many(rngs, 1000, link.num_subchannels, powers, config.symbols_per_slot, link.channel)
    return np.random.default_rng([seed, 999]).choice(pool.ravel(), (episodes, config.deadline))


def observe(batch: EpisodeBatch, history: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """What the environments show."""
    state, config = batch.state, batch.config
    fields = {name: state[name].copy() for name in ("slot", "server_step", "device_step", "device_bits")}
    return {
        **fields,
        "device_error": state["device_error"].astype(np.float32)[:, None],
        "remaining_bits": (batch.remaining_bits() / config.latent_dim).astype(np.float32)[:, None],
        "channel_history": history,
    }


def play(
    agent: agents.Agent, config: SystemConfig, rates: NDArray[np.float64], *, anytime: bool = False
) -> NDArray[np.float64]:
    """Modeled distortion at the deadline of every episode (N,), or its mean over what is shown after each slot.

    Args:
        agent: plays.
        config: the system.
        rates: bits per slot (N, T_d).
        anytime: the mean over the slots.
    """
    batch = EpisodeBatch(config, None, len(rates))
    for i, channel in enumerate(rates):
        batch.begin(i, 0, channel)
    if isinstance(agent, agents.Clairvoyant):
        agent.reset(len(rates), rates=rates)
    else:
        agent.reset(len(rates))
    history = np.zeros((len(rates), config.deadline), dtype=np.float32)
    shown = np.zeros((config.deadline, len(rates)))
    for slot in range(config.deadline):
        history = np.roll(history, -1, axis=1)
        history[:, -1] = np.minimum(rates[:, slot] / config.latent_dim, config.max_bits_per_dimension)
        actions = agent.select_action(observe(batch, history), {"action_mask": batch.action_mask()})
        batch.advance(np.asarray(actions, dtype=np.int64))
        assert not batch.illegal.any()
        state = batch.state
        shown[slot] = config.refinement_model.distortion(state["device_step"], state["device_error"])
    assert batch.finished().all()
    scores: NDArray[np.float64] = shown.mean(axis=0) if anytime else shown[-1]
    return scores
