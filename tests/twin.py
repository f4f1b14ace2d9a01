"""The evaluation in plain NumPy, one episode after the other: what its fast paths must equal, and are timed against.

Of the package it takes numbers alone: the noise schedule, the quantizers' levels and the policies' parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

import agents
from agents.policies.lookahead import Lookahead
from refine_env import SystemConfig, TrajectoryCache
from refine_env.coding import LOSSLESS_BITS, LloydMax

Rule = Callable[[int, int, int], int]
"""The action for (slot, server step, device step), asked for where TRANSMIT is legal."""


def plain_rule(name: str, config: SystemConfig) -> Rule:
    """A policy without memory as a plain function."""
    agent = agents.make(name, config)
    if isinstance(agent, Lookahead):
        return lambda slot, server, device: int(agent.table[slot, server, device])
    if name == "final-only":
        action = config.action_of(LOSSLESS_BITS)
        return lambda slot, server, device: action if server == 0 else 0
    action = config.action_of(int(name.removeprefix("persistent-q")))
    return lambda slot, server, device: action


def waterfilling_rates(gains: NDArray[np.float64], total_power: float, symbols_per_slot: float) -> NDArray[np.float64]:
    """Bits of every slot, gains (slots, K): sort the floors 1/g, take the most that all stay under water."""
    floors = np.sort(1.0 / gains, axis=1)
    levels = (total_power + np.cumsum(floors, axis=1)) / np.arange(1, floors.shape[1] + 1)
    active = (levels > floors).sum(axis=1)
    level = np.take_along_axis(levels, active[:, None] - 1, axis=1)
    rates: NDArray[np.float64] = symbols_per_slot * np.log2(np.maximum(level / floors, 1.0)).sum(axis=1)
    return rates


def refine(
    latent: NDArray[np.float16],
    device: NDArray[np.float32],
    gain: float,
    scale: float,
    levels: NDArray[np.float32],
    thresholds: NDArray[np.float32],
) -> NDArray[np.float32]:
    """One delivery ([K] Eqs. 5–7), one ``searchsorted``; what the device then holds."""
    prediction = np.float32(gain) * device
    residual = (latent.astype(np.float32) - prediction) * (np.float32(1.0) / np.float32(scale))
    refined: NDArray[np.float32] = prediction + np.float32(scale) * levels[np.searchsorted(thresholds, residual)]
    return refined


def lookahead_table(
    total: NDArray[np.float64], latency: NDArray[np.int64], deadline: int, *, slack: int = 0, literal: bool = False
) -> NDArray[np.int8]:
    """The look-ahead's actions (T_d + 2, T + 1, T + 1), all steps of a slot at once.

    Args:
        total: promised distortions (T + 1, T + 1, |𝓑|), indexed [t, t_p, b].
        latency: T̂ at every bit depth [slots].
        deadline: T_d.
        slack: 1 for ``lookahead-tight``.
        literal: for ``lookahead-literal``.
    """
    num_steps = len(total) - 1
    table = np.zeros((deadline + 2, num_steps + 1, num_steps + 1), dtype=np.int8)
    here, device = np.arange(num_steps), np.arange(num_steps + 1)
    for n in range(1, deadline + 1):
        slots = np.arange(n, deadline + 1)
        fits = slots[:, None] + latency - slack <= deadline
        depth = np.where(fits.any(axis=1), fits.shape[1] - 1 - fits[:, ::-1].argmax(axis=1), -1)
        steps = np.maximum(0, here[:, None] - (slots - n))
        promised = np.where(depth >= 0, total[steps[:, None, :], device[:, None], depth], np.inf)
        wait, single = promised.argmin(axis=2), promised.min(axis=2)
        fresher = (depth >= 0) & (literal | (steps != here[:, None]))
        second = np.where(fresher, total[steps, here[:, None], depth], np.inf)
        dual = np.stack([np.where(slots >= n + own, second, np.inf).min(axis=1) for own in latency], axis=1)
        now = np.where(wait == 0, depth[0] + 1, 0)
        sends_first = np.isfinite(dual.min(axis=1))[:, None] & (dual.min(axis=1)[:, None] <= single)
        actions = np.where(sends_first, dual.argmin(axis=1)[:, None] + 1, now)
        table[n, :num_steps] = np.where(device > here[:, None], actions, 0)
    return table


class Twin:
    """Episodes on the paper's coder.

    Args:
        cache: the trajectories.
        config: the system, of a single SNR.
        split: which trajectories are drawn.
        rule: the policy.
    """

    def __init__(self, cache: TrajectoryCache, config: SystemConfig, split: str, rule: Rule) -> None:
        self.cache, self.config, self.rule = cache, config, rule
        self.indices = cache.indices(split)
        self.power = config.total_power(config.single_snr_db("the twin"))
        self.alpha_bar = config.schedule.alpha_bar
        self.tables = {
            bits: (LloydMax(bits).levels.astype(np.float32), LloydMax(bits).thresholds.astype(np.float32))
            for bits in config.bit_depths
            if bits != LOSSLESS_BITS
        }

    def play(self, seed: int) -> dict[str, Any]:
        """Play the episode of that seed: its trajectory, deliveries and latent MSE."""
        config = self.config
        rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed)))
        trajectory = int(self.indices[rng.integers(self.indices.size)])
        gains = rng.standard_exponential((config.deadline, config.link.num_subchannels))
        rates = waterfilling_rates(gains, self.power, config.symbols_per_slot)
        latents = self.cache.latents(trajectory).reshape(config.num_steps + 1, -1)
        start = config.warm_start
        shared = start is not None and start.shared
        generated_from = config.num_steps if start is None else start.step
        held = generated_from if shared else config.num_steps
        device = latents[held].astype(np.float32)
        chain: list[tuple[int, int]] = []
        uplink, message, sent, size = 0, (config.num_steps, 0), 0.0, config.uplink_bits
        for slot in range(1, config.deadline + 1):
            server = config.num_steps
            if uplink:
                server = generated_from - min(generated_from, max(0, slot - uplink - 1))
            if size == 0.0 and server < held:
                action = self.rule(slot, server, held)
                if action > 0:
                    bits = config.bit_depths[action - 1]
                    message, sent, size = (server, bits), 0.0, float(config.latent_dim * bits)
                    if start is not None and shared and not chain:
                        size += start.name_bits
            if size > 0.0:
                sent += rates[slot - 1]
                if sent >= size:
                    size = 0.0
                    if not uplink:
                        uplink = slot
                    else:
                        device = self.deliver(latents, device, held, *message)
                        held = message[0]
                        chain.append(message)
        error = device.astype(np.float64) - latents[0]
        return {"trajectory": trajectory, "chain": chain, "latent_mse": float(np.mean(error * error))}

    def deliver(
        self, latents: NDArray[np.float16], device: NDArray[np.float32], held: int, step: int, bits: int
    ) -> NDArray[np.float32]:
        """What the device holds after a delivery; the first has no prediction and scale 1."""
        if bits == LOSSLESS_BITS:
            return latents[step].astype(np.float32)
        if held == self.config.num_steps:
            return refine(latents[step], device, 0.0, 1.0, *self.tables[bits])
        new, old = self.alpha_bar[step], self.alpha_bar[held]
        return refine(latents[step], device, np.sqrt(new / old), np.sqrt((new - old) / old), *self.tables[bits])
