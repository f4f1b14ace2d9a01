"""The optimal schedule by dynamic programming, for the modeled distortion and the exact law of the link.

[K] calls the optimum intractable. Under the recursion that coding errors follow along a chain of deliveries
(:class:`refine_env.model.distortion.RefinementModel`) and the law of the slots that a message takes it is not: in a
slot n in which the channel is idle, the state is (n, t_p, e_p), t(n) being known once the uplink has ended. Backward
induction gives the least expected distortion at the deadline.

Values are tabulated over e_p at ten points a decade, down to 1e-12 of the largest error, and interpolated linearly.
They are concave, piecewise linear functions of e_p, so that interpolation is exact but where the best action changes
between two points, and never too high; there it is too low by at most (√r − 1)/(√r + 1) = 5.7 %, r = 10^(1/10), where
values rise with e_p. Over thousands of small systems, against a recursion without tables, the value at the start was
never off by more than 0.05 %.

What is minimized may be another :class:`Objective`: the sum over the slots of what the device shows, or the distortion
of a schedule that sends x_0 alone, the best that computing first and sending then can do.

What the policy knows of the channel is one of a few levels of the current slot's rate: a single one for a policy that
does not look at it, several where it does, and where the rate of a slot tells about the next ones they form a Markov
chain. One recursion serves all three.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agents.base import Agent
from refine_env import SystemConfig
from refine_env._compiled import kernel, plain
from refine_env.link import RateChain, RateLaw
from refine_env.model.distortion import RefinementModel
from refine_env.model.rules import (
    distortion,
    is_lossy,
    longest_uplink,
    may_transmit,
    residual_variance,
    server_step,
)

__all__ = ["DynamicProgramming"]

_SMALLEST_ERROR = 1e-12  # of the grid, relative to the largest; below, values are interpolated linearly down to 0
_POINTS_PER_DECADE = 10
_CURRENT_RATE_LEVELS = 24
_RATES_PER_STD, _MOST_RATES = 32, 4096  # of the first slot, over which the law of a level's deliveries is averaged
_CHAIN_LEVELS = 12
_CHAIN_POINTS_PER_DECADE = 6  # where values depend on the level too
_NEGLIGIBLE = 1e-12  # probability of a T_ul for which no table is made just to report the expected value
_ROUNDING = 1e-6  # a relative gain below this is none: waiting is preferred


class ChannelKnowledge(NamedTuple):
    """What a policy knows of the channel, and what follows for its transmissions.

    A level is what it sees of the current slot; a class is what the slots before tell about the next one. There are S
    sizes of messages: |𝓑|, or twice as many where the first message is longer than the others of its bit depth
    (``SystemConfig.all_message_bits``).

    Attributes:
        edges: level i lies between edges[i − 1] (included) and edges[i] [bit/slot] (L − 1,).
        mixing: probability of a slot's level (columns), given the class (rows) (C, L).
        onward: probability of the next slot's class (columns), given a slot's level (rows) (L, C).
        deliveries: P[T_dl = k, class of the slot after | level of the first slot] (S, L, T_d + 1, C).
        tail: P[T_dl > k | level of the first slot] (S, L, T_d + 1).
        slots_before: E[min(T_dl − 1, k) | level of the first slot], of the next k slots those that end before the
            message has arrived (S, L, T_d + 1).
        uplink: P[T_ul = k, class of the slot after] (T_d + 1, C).
    """

    edges: NDArray[np.float64]
    mixing: NDArray[np.float64]
    onward: NDArray[np.float64]
    deliveries: NDArray[np.float64]
    tail: NDArray[np.float64]
    slots_before: NDArray[np.float64]
    uplink: NDArray[np.float64]


def _slots_before(tail: NDArray[np.float64]) -> NDArray[np.float64]:
    """E[min(T_dl − 1, k)], the sum of P[T_dl > j] over j = 1 … k, from P[T_dl > k], both (..., T_d + 1)."""
    sums: NDArray[np.float64] = np.cumsum(tail, axis=-1) - tail[..., :1]
    return sums


def independent_slots(
    law: RateLaw, config: SystemConfig, num_levels: int, *, rate_scale: float = 1.0
) -> ChannelKnowledge:
    """What is known of a link with independent slots: there is one class.

    The law of a level's deliveries is averaged over the rates in it, so what is computed with it is exact for a policy
    that sees just the level, and the levels' average is the law of a policy that sees none.

    Args:
        law: of a slot's rate.
        config: the system.
        num_levels: L; 1 does not look at the rate.
        rate_scale: the rates are those of the law times this.
    """
    levels = law.quantize(num_levels)
    sizes = config.all_message_bits[:, None] / rate_scale
    if num_levels == 1:
        tail = law.latency_sf(sizes, config.deadline)
    else:
        first, last = law.grid[[0, -1]]
        parts = min(_MOST_RATES, math.ceil(_RATES_PER_STD * (last - first) / max(law.std, 1e-300)))
        # No part of the rates lies in two levels, or is enough for a message and not.
        edges = np.unique(np.concatenate([np.linspace(first, last, parts + 1), levels.edges, sizes.ravel()]))
        masses, rates = law.split(edges)
        likely = masses > 0.0
        shares = masses[likely, None]
        starts = np.searchsorted(rates[likely], np.append(-np.inf, levels.edges))
        tails = law.latency_sf(sizes, config.deadline, rates[likely])
        tail = np.add.reduceat(tails * shares, starts, axis=1) / np.add.reduceat(shares, starts, axis=0)
    deliveries = np.zeros_like(tail)
    deliveries[..., 1:] = tail[..., :-1] - tail[..., 1:]
    return ChannelKnowledge(
        levels.edges * rate_scale,
        levels.probabilities[None, :] / levels.probabilities.sum(),
        np.ones((num_levels, 1)),
        deliveries[..., None],
        tail,
        _slots_before(tail),
        law.latency_pmf(config.uplink_bits / rate_scale, config.deadline)[:, None],
    )


def chained_slots(chain: RateChain, config: SystemConfig) -> ChannelKnowledge:
    """What is known of a link with a Markov chain of levels: the class of a slot is its level.

    Args:
        chain: of a slot's rate.
        config: the system.
    """
    levels, deadline = chain.levels, config.deadline
    deliveries = chain.latency_pmf(config.all_message_bits, deadline)
    tail = np.maximum(0.0, 1.0 - np.cumsum(deliveries.sum(axis=-1), axis=-1))
    return ChannelKnowledge(
        levels.edges,
        np.eye(levels.rates.size),
        np.ascontiguousarray(levels.transition),
        deliveries,
        tail,
        _slots_before(tail),
        np.einsum("i,ikj->kj", levels.probabilities, chain.latency_pmf(config.uplink_bits, deadline)),
    )


class Objective(NamedTuple):
    """What a schedule minimizes, and among which schedules.

    Attributes:
        terminal: weight of the distortion at the deadline.
        running: weight of the distortion that the device shows after each of the slots 1 … T_d.
        final_only: whether x_0 alone is sent.
    """

    terminal: float = 1.0
    running: float = 0.0
    final_only: bool = False


AT_DEADLINE = Objective()
"""The expected distortion at the deadline, of any schedule."""


class ErrorGrid(NamedTuple):
    """Coding errors on which values are tabulated.

    Attributes:
        errors: 0, and then evenly spaced logarithms (E,).
        first_log: logarithm of ``errors[1]``.
        points_per_log: grid points per unit of the natural logarithm.
    """

    errors: NDArray[np.float64]
    first_log: float
    points_per_log: float

    @classmethod
    def up_to(cls, largest: float, points_per_decade: int) -> ErrorGrid:
        """The grid whose last point is the largest error."""
        count = int(-np.log10(_SMALLEST_ERROR) * points_per_decade) + 1
        errors = np.append(0.0, np.geomspace(largest * _SMALLEST_ERROR, largest, count))
        return cls(errors, float(np.log(errors[1])), (count - 1) / float(np.log(errors[-1] / errors[1])))


class Recursion(NamedTuple):
    """The recursion of the coding error along deliveries.

    Attributes:
        model: how the distortion develops over a chain of deliveries.
        base: D_base of every bit depth (|𝓑|,).
        grid: the coding errors on which values are tabulated.
        refreshes: the held step may be sent again while it has an error.
        objective: what is minimized.
        decoded: what a device with a decoder ends with, by step and coding error of the grid (T + 1, E); (0, 0) where
            the device shows what it holds.
        first_device_step: t_p of what the device starts with; it holds that only before the first delivery.
    """

    model: RefinementModel
    base: NDArray[np.float64]
    grid: ErrorGrid
    refreshes: bool
    objective: Objective
    decoded: NDArray[np.float64]
    first_device_step: int

    @classmethod
    def of(cls, config: SystemConfig, points_per_decade: int, objective: Objective) -> Recursion:
        """The recursion of a system, with so many grid points per decade of coding errors."""
        model, base = config.refinement_model, config.base_distortion
        largest = np.zeros(config.num_steps + 1)  # error that a delivery of each step can leave
        for t in range(config.num_steps - 1, -1, -1):
            older = slice(t + 1, None)
            largest[t] = model.residual_variance(t, older, largest[older]).max() * base.max()
        grid = ErrorGrid.up_to(max(float(largest.max()), 1e-300), points_per_decade)
        decoded = np.zeros((0, 0))
        if config.decoder_curve is not None:
            decoded = config.decoder_curve.distortion(np.arange(config.num_steps + 1)[:, None], grid.errors)
        refreshes = bool(config.make_coder().refreshes_held_step)
        return cls(model, base, grid, refreshes, objective, decoded, config.first_device_step)


class Table(NamedTuple):
    """Values of all states for one T_ul.

    Attributes:
        server_steps: t(n), index n = 0 … T_d + 1.
        first_row: ``first_row[n] + t_p`` is the row of (n, t_p), t_p >= t(n), in ``values`` (T_d + 2,).
        values: least expected cost from slot n on, before the slot's level is seen, (rows, C, E); slots after T_ul.
            It is the distortion at the deadline unless the objective is another.
        sent: what a transmission begun in slot n is worth by the error that it leaves, deliveries after the deadline
            counted as nothing, (T_d + 2, S, L, E); the sizes are those of :class:`ChannelKnowledge`.
    """

    server_steps: NDArray[np.int64]
    first_row: NDArray[np.int64]
    values: NDArray[np.float64]
    sent: NDArray[np.float64]


class States(NamedTuple):
    """N states in which a policy decides, the channel idle.

    Attributes:
        slots: n, 1 … T_d (N,).
        device_steps: t_p (N,).
        errors: e_p (N,).
        levels: the levels of the slots' rates (N,).
    """

    slots: NDArray[np.int64]
    device_steps: NDArray[np.int64]
    errors: NDArray[np.float64]
    levels: NDArray[np.int64]


@kernel
def _place(error: float, grid: ErrorGrid) -> tuple[int, float]:
    """Index i and weight w with error = (1 − w) errors[i] + w errors[i+1]."""
    errors, i = grid.errors, 0
    if error > errors[1]:
        i = min(1 + int((np.log(error) - grid.first_log) * grid.points_per_log), errors.size - 2)
    return i, (error - errors[i]) / (errors[i + 1] - errors[i])


@kernel
def _costs(recursion: Recursion, step: int, error: float) -> tuple[float, float]:
    """Cost of holding u_t with the error e at the deadline, and of showing it after one slot."""
    shown = distortion(recursion.model, step, error)
    final = shown
    if recursion.decoded.shape[0] > 0:
        i, w = _place(error, recursion.grid)
        final = (1.0 - w) * recursion.decoded[step, i] + w * recursion.decoded[step, i + 1]
    return recursion.objective.terminal * final, recursion.objective.running * shown


@kernel
def _first_size(step: int, knowledge: ChannelKnowledge, recursion: Recursion) -> int:
    """Index of the size of the smallest bit depth's message to a device that holds u_t, see :class:`ChannelKnowledge`.

    Before the first delivery, and only then, the device holds what it started with.
    """
    return knowledge.tail.shape[0] - recursion.base.size if step == recursion.first_device_step else 0


@kernel
def _sending(
    b: int, size: int, level: int, variance: float, held: tuple[float, float], sent: Any, law: Any, recursion: Recursion
) -> float:
    """What a transmission with the b-th bit depth is worth.

    Until the message has arrived the device shows what it holds, and at the deadline, too, if the message is late.

    Args:
        b: index of the bit depth.
        size: index of the message's size.
        level: of the slot's rate.
        variance: s² of its residual.
        held: what :func:`_costs` gives for what the device holds.
        sent: ``Table.sent`` of the slot, (S, L, E).
        law: probability that the message is late, and the expected slots before it arrives, each (S, L).
        recursion: the recursion.
    """
    i, w = _place(variance * recursion.base[b], recursion.grid)
    in_time = (1.0 - w) * sent[size, level, i] + w * sent[size, level, i + 1]
    return float(in_time + law[0][size, level] * held[0] + law[1][size, level] * held[1])


@kernel
def _fill_table(table: Table, first_slot: int, knowledge: ChannelKnowledge, recursion: Recursion) -> None:
    """Backward induction from the deadline to the first slot: fill ``values`` and ``sent``, which are zeros."""
    model, errors, objective = recursion.model, recursion.grid.errors, recursion.objective
    deadline, num_steps = table.server_steps.size - 2, model.clean.size - 1
    classes, levels = knowledge.mixing.shape
    for n in range(deadline + 1, first_slot - 1, -1):
        t = table.server_steps[n]
        sent = table.sent[n]
        if n <= deadline and t < num_steps:
            for b in range(knowledge.tail.shape[0]):
                for k in range(1, deadline + 2 - n):
                    row = table.values[table.first_row[n + k] + t]
                    for level in range(levels):
                        for c in range(classes):
                            probability = knowledge.deliveries[b, level, k, c]
                            if probability > 0.0:
                                for i in range(errors.size):
                                    sent[b, level, i] += probability * row[c, i]
                for level in range(levels):  # what is shown after the slot in which the message arrives
                    arriving = 1.0 - knowledge.tail[b, level, deadline + 1 - n]
                    for i in range(errors.size):
                        sent[b, level, i] += arriving * _costs(recursion, t, errors[i])[1]
        for p in range(t, recursion.first_device_step + 1):
            own = table.values[table.first_row[n] + p]
            if n > deadline:
                for i in range(errors.size):
                    own[:, i] = _costs(recursion, p, errors[i])[0]
                continue
            following = table.values[table.first_row[n + 1] + p]
            law = (knowledge.tail[:, :, deadline + 1 - n], knowledge.slots_before[:, :, deadline + 1 - n])
            first_size = _first_size(p, knowledge, recursion)
            for i in range(errors.size):
                legal = may_transmit(t, p, num_steps, recursion.refreshes, errors[i] > 0.0)
                legal = legal and (t == 0 or not objective.final_only)
                held = _costs(recursion, p, errors[i])
                variance = residual_variance(model, t, p, errors[i])
                for level in range(levels):
                    best = held[1]
                    for c in range(classes):
                        best += knowledge.onward[level, c] * following[c, i]
                    if legal:
                        for b in range(recursion.base.size):
                            worth = _sending(b, first_size + b, level, variance, held, sent, law, recursion)
                            best = min(best, worth)
                    for c in range(classes):
                        own[c, i] += knowledge.mixing[c, level] * best


@kernel
def _fill_expected_cost(
    selected: NDArray[np.int64],
    states: States,
    table: Table,
    knowledge: ChannelKnowledge,
    recursion: Recursion,
    expected: NDArray[np.float64],
) -> None:
    """Fill in the least expected cost after every action (N, 1 + |𝓑|), for the selected states of one table."""
    deadline, objective = table.server_steps.size - 2, recursion.objective
    for k in selected:
        n, p, error, level = states.slots[k], states.device_steps[k], states.errors[k], states.levels[k]
        i, w = _place(error, recursion.grid)
        following = table.values[table.first_row[n + 1] + p]
        held = _costs(recursion, p, error)
        expected[k, 0] = held[1]
        for c in range(following.shape[0]):
            onward = knowledge.onward[level, c]
            expected[k, 0] += onward * ((1.0 - w) * following[c, i] + w * following[c, i + 1])
        t = table.server_steps[n]
        expected[k, 1:] = np.inf
        if t == 0 or not objective.final_only:
            variance = residual_variance(recursion.model, t, p, error)
            law = (knowledge.tail[:, :, deadline + 1 - n], knowledge.slots_before[:, :, deadline + 1 - n])
            first_size = _first_size(p, knowledge, recursion)
            for b in range(recursion.base.size):
                sent = table.sent[n]
                expected[k, b + 1] = _sending(b, first_size + b, level, variance, held, sent, law, recursion)


@dataclass(eq=False)
class Solution:
    """The optimal policy of one system, its tables made as they are needed.

    Args:
        config: the system, with a single SNR.
        knowledge: of the channel.
        points_per_decade: of the grid of coding errors.
        objective: what is minimized.
    """

    config: SystemConfig
    knowledge: ChannelKnowledge
    points_per_decade: int = _POINTS_PER_DECADE
    objective: Objective = AT_DEADLINE
    tables: dict[int, Table] = field(default_factory=dict)

    @cached_property
    def recursion(self) -> Recursion:
        """The recursion along deliveries, and the grid."""
        return Recursion.of(self.config, self.points_per_decade, self.objective)

    def table(self, uplink_slots: int) -> Table:
        """Values of all states after an uplink of T_ul slots."""
        if uplink_slots not in self.tables:
            self.tables[uplink_slots] = self._solve(uplink_slots)
        return self.tables[uplink_slots]

    def _solve(self, uplink_slots: int) -> Table:
        deadline, first_device_step = self.config.deadline, self.config.first_device_step
        knowledge, recursion = self.knowledge, self.recursion
        slots = np.arange(deadline + 2)
        server_steps = np.array([self._server_step(n, uplink_slots) for n in range(deadline + 2)])
        first_slot = min(uplink_slots + 1, deadline + 1)
        rows = np.where(slots < first_slot, 0, first_device_step + 1 - server_steps)
        classes, levels = knowledge.mixing.shape
        table = Table(
            server_steps,
            np.cumsum(rows) - rows - server_steps,
            np.zeros((int(rows.sum()), classes, recursion.grid.errors.size)),
            np.zeros((deadline + 2, len(knowledge.tail), levels, recursion.grid.errors.size)),
        )
        _fill_table(table, first_slot, knowledge, recursion)
        return table

    def _server_step(self, slot: int, uplink_slots: int) -> int:
        """t(n) after an uplink of T_ul slots."""
        steps = self.config.num_steps, self.config.first_server_step
        return int(plain(server_step)(slot, uplink_slots, *steps))

    def at_uplink_end(self, uplink_slots: int) -> NDArray[np.float64]:
        """Least expected cost from the slot after the uplink on, if that has taken T_ul slots, by class (C,)."""
        table = self.table(uplink_slots)
        row: NDArray[np.float64] = table.values[table.first_row[uplink_slots + 1] + self.config.first_device_step]
        return row[:, 0]

    @cached_property
    def predicted_value(self) -> float:
        """Least expected cost over the law of T_ul; with nothing delivered where the uplink never ends."""
        uplink, deadline = self.knowledge.uplink, self.config.deadline
        final, shown = map(float, plain(_costs)(self.recursion, self.config.first_device_step, 0.0))
        nothing = final + deadline * shown
        value = nothing * max(0.0, 1.0 - float(uplink.sum()))
        for slots in range(deadline + 1):
            probability = float(uplink[slots].sum())
            if probability > _NEGLIGIBLE and self._server_step(deadline, slots) == self.config.num_steps:
                value += nothing * probability
            elif probability > _NEGLIGIBLE:
                value += float(uplink[slots] @ self.at_uplink_end(slots)) + slots * shown * probability
        return value

    def expected_cost(self, observation: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
        """The least expected cost from now on after each action, (N, 1 + |𝓑|), as if TRANSMIT were legal.

        Args:
            observation: of N episodes in slots 1 … T_d after the uplink, the channel idle.

        Returns:
            The expected distortion at the deadline, unless the objective is another; infinite for what it excludes.
        """
        config, knowledge = self.config, self.knowledge
        slots = observation["slot"]
        levels = np.zeros(slots.size, dtype=np.int64)
        if knowledge.edges.size:
            rates = observation["channel_history"][:, -1].astype(np.float64) * config.latent_dim
            levels = np.searchsorted(knowledge.edges, rates, side="right")
        states = States(slots, observation["device_step"], _device_errors(observation), levels)
        uplinks = self._uplink_slots(slots, observation["server_step"])
        result = np.empty((slots.size, config.num_actions))
        for uplink_slots in np.unique(uplinks).tolist():
            own = np.flatnonzero(uplinks == uplink_slots)
            _fill_expected_cost(own, states, self.table(uplink_slots), knowledge, self.recursion, result)
        return result

    def _uplink_slots(self, slots: NDArray[np.int64], server_steps: NDArray[np.int64]) -> NDArray[np.int64]:
        """T_ul of each episode, which time and t(n) > 0 tell; with t(n) = 0 any will do for which it is 0."""
        longest: NDArray[np.int64] = longest_uplink(slots, server_steps, self.config.first_server_step)
        usual = int(self.knowledge.uplink.sum(axis=1).argmax())
        return np.where(server_steps > 0, longest, np.minimum(longest, max(1, usual)))


@lru_cache(maxsize=48)
def solution(config: SystemConfig, num_levels: int, objective: Objective = AT_DEADLINE) -> Solution:
    """The optimal policy of a system, kept in memory with its tables.

    Args:
        config: the system, with a single SNR.
        num_levels: of the current slot's rate that the policy tells apart; 1 does not look at it.
        objective: what is minimized.
    """
    if not config.link.channel.independent:
        knowledge = chained_slots(config.rate_chain(_CHAIN_LEVELS), config)
        return Solution(config, knowledge, _CHAIN_POINTS_PER_DECADE, objective)
    return Solution(config, independent_slots(config.rate_law, config, num_levels), objective=objective)


class DynamicProgramming(Agent):
    """The least expected latent MSE at the deadline, by backward induction.

    Optimal for the modeled distortion, this coder, payload and 𝓑, without pre-emption, among policies that do not use
    the current slot's rate. Doing nothing, the last slots and transmissions that end after the deadline need no rules
    of their own: they have values like everything else.

    Args:
        config: the system, with a single SNR.
        current_rate: use the current slot's rate too (``dp-current-rate``).
        final_only: send x_0 alone, at the bit depths and in as many messages as is best (``dp-final``).
        anytime: minimize the mean over the slots 1 … T_d of the latent MSE that the device shows after each, instead
            of the MSE at the deadline (``dp-anytime``).

    Attributes:
        solution: values and actions.

    Raises:
        ConfigurationError: if the configuration has an SNR range.
    """

    env_kwargs: ClassVar[Mapping[str, Any]] = {"coder": "closed_loop", "payload": "latent"}
    plans_with_errors: ClassVar[bool] = True

    def __init__(
        self, config: SystemConfig, *, current_rate: bool = False, final_only: bool = False, anytime: bool = False
    ) -> None:
        parts = {"current-rate": current_rate, "final": final_only, "anytime": anytime}
        name = "-".join(["dp", *(part for part, chosen in parts.items() if chosen)])
        super().__init__(config, name=name)
        config.single_snr_db(name)
        running = 1.0 / config.deadline if anytime else 0.0
        objective = Objective(terminal=float(not anytime), running=running, final_only=final_only)
        self.solution = solution(config, _CURRENT_RATE_LEVELS if current_rate else 1, objective)

    @property
    def predicted_value(self) -> float:
        """Expected latent MSE at the deadline, or its mean over the slots, in the model's sense."""
        return self.solution.predicted_value

    def decide(self, observation: Mapping[str, NDArray[Any]], legal: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The actions of the least expected cost."""
        actions = np.zeros(legal.size, dtype=np.int64)
        if legal.any():
            actions[legal] = best_actions(self.solution.expected_cost(part_of(observation, legal)))
        return actions

    def value(self, observation: Mapping[str, Any]) -> NDArray[np.float64]:
        """Expected latent MSE at the deadline, in the model's sense; of ``dp-anytime``, its sum over the slots to come
        divided by T_d.

        Args:
            observation: of the single or of the vector environment.

        Returns:
            A scalar array, or (N,); NaN in slots in which the channel is busy, the uplink's too: what is under way is
            not observed. At the start it is :attr:`predicted_value`.
        """
        single = np.ndim(observation["slot"]) == 0
        batch = {key: np.asarray(value)[None] if single else value for key, value in observation.items()}
        config, recursion = self.config, self.solution.recursion
        server_steps, device_steps = batch["server_step"], batch["device_step"]
        values = np.full(server_steps.size, np.nan)
        ended = batch["slot"] > config.deadline
        final = config.final_distortion(device_steps[ended], _device_errors(batch)[ended])
        values[ended] = recursion.objective.terminal * final
        idle = ~ended & (batch["remaining_bits"].reshape(-1) == 0.0)
        lossy = plain(is_lossy)(batch["device_bits"])
        legal = plain(may_transmit)(server_steps, device_steps, config.num_steps, recursion.refreshes, lossy)
        if idle.any():
            expected = self.solution.expected_cost(part_of(batch, idle))
            values[idle] = np.where(legal[idle], expected.min(axis=1), expected[:, 0])
        return values[0] if single else values


def best_actions(expected_cost: NDArray[np.float64]) -> NDArray[np.int64]:
    """The actions of the least expected cost, (N, 1 + |𝓑|) to (N,); waiting where nothing is gained."""
    shaded = expected_cost.copy()
    shaded[:, 0] -= _ROUNDING * np.abs(shaded[:, 0])
    actions: NDArray[np.int64] = shaded.argmin(axis=1)
    return actions


def _device_errors(observation: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    """e_p of N episodes (N,)."""
    return np.asarray(observation["device_error"], dtype=np.float64).reshape(-1)


def part_of(observation: Mapping[str, NDArray[Any]], selected: NDArray[np.bool_]) -> dict[str, NDArray[Any]]:
    """The observation of some of the episodes."""
    return {key: value[selected] for key, value in observation.items()}
