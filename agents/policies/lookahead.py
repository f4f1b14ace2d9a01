"""The paper's look-ahead policy ([K] §IV-C), as a table over (slot, server step, device step)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from agents.base import Agent
from refine_env import SystemConfig
from refine_env._compiled import kernel
from refine_env.link import latency_quantiles
from refine_env.model.distortion import total_distortion

__all__ = ["ClosedLoopLookahead", "Lookahead"]


def _largest_feasible(latency: NDArray[np.int64], deadline: int, slack: int) -> NDArray[np.int64]:
    """For every slot n, the index of the largest b with n + T̂_q(Mb) − slack <= T_d; −1 where no b fits (T_d + 1,)."""
    fits = np.arange(deadline + 1)[:, None] + latency - slack <= deadline
    return np.where(fits.any(axis=1), latency.size - 1 - np.argmax(fits[:, ::-1], axis=1), -1)


class Promises(NamedTuple):
    """What the models promise of transmissions.

    Attributes:
        total: distortions, indexed by the step sent, the device step and the bit depth (T + 1, T + 1, |𝓑|).
        latency: T̂_q of every bit depth [slots] (|𝓑|,).
        largest: the largest bit depth, as an index, that is through in time if sent in slot n, −1 if none (T_d + 1,).
    """

    total: NDArray[np.float64]
    latency: NDArray[np.int64]
    largest: NDArray[np.int64]


@kernel
def _best_second(n: int, t: int, promises: Promises, literal: bool) -> tuple[float, int]:
    """Strategy 2: D_2* and the index of the first bit depth.

    Bit depths ascend, and so do the waits τ' of each. Of equally good candidates the first one wins.
    """
    best, first = np.inf, -1
    for b in range(promises.latency.size):
        for second_slot in range(n + promises.latency[b], promises.largest.size):
            second = max(0, t - (second_slot - n))
            depth = promises.largest[second_slot]
            if depth < 0 or (second == t and not literal):
                continue
            distortion = promises.total[second, t, depth]
            if distortion < best:
                best, first = distortion, b
    return best, first


@kernel
def _best_single(n: int, t: int, device: int, promises: Promises) -> tuple[float, int, int]:
    """Strategy 1: D_1*, τ* and the index of the bit depth. Of equally good waits the shortest one wins."""
    best, wait, chosen = np.inf, -1, -1
    for slot in range(n, promises.largest.size):
        depth = promises.largest[slot]
        if depth < 0:
            continue
        distortion = promises.total[max(0, t - (slot - n)), device, depth]
        if distortion < best:
            best, wait, chosen = distortion, slot - n, depth
    return best, wait, chosen


@kernel
def _fill_table(promises: Promises, literal: bool, table: NDArray[np.int8]) -> None:
    """Fill in the actions by slot, server step and device step (T_d + 2, T + 1, T + 1), a table of WAIT before."""
    num_steps = promises.total.shape[0] - 1
    for n in range(1, promises.largest.size):
        for t in range(num_steps):
            second, first_depth = _best_second(n, t, promises, literal)
            for device in range(t + 1, num_steps + 1):
                single, wait, depth = _best_single(n, t, device, promises)
                if first_depth >= 0 and second <= single:
                    table[n, t, device] = first_depth + 1
                elif wait == 0:
                    table[n, t, device] = depth + 1


class Lookahead(Agent):
    """Compare the best single with the best dual transmission that the models promise before the deadline.

    Strategy 1 waits τ slots and sends once, with the largest bit depth whose latency quantile still fits;
    Strategy 2 sends now, and once more later. The smaller predicted distortion (Eqs. 8–10, whichever coder
    runs) decides; ties go to sending now, and to the smallest first bit depth that reaches the best second
    transmission. t(n + τ) is known once generation has begun, so the rule is a function of the slot and of
    the steps at server and device, tabulated once.

    With ``latency_model="exact"`` in the configuration the quantiles are those of the exact law of the link.

    A second transmission of the same step would have σ² = 0 in Eq. (7), a predicted distortion of 0 that no
    quantizer delivers; it has to be strictly fresher here.

    Args:
        config: the system, with a single SNR.
        literal: the second transmission may be of the same step, as the paper's text allows
            (``lookahead-literal``).
        tight: require n + T̂ − 1 <= T_d of a transmission that begins in slot n, since it ends in that slot. [K]
            requires n + T̂ <= T_d (``lookahead-tight``).

    Raises:
        ConfigurationError: if the configuration has an SNR range.
    """

    def __init__(self, config: SystemConfig, *, literal: bool = False, tight: bool = False) -> None:
        name = "lookahead" + ("-literal" if literal else "") + ("-tight" if tight else "")
        super().__init__(config, name=name)
        config.single_snr_db(name)
        # Whatever takes longer than the deadline is late: how much longer does not matter.
        self.latency = latency_quantiles(
            config.latent_dim, config.bit_depths, config.latency_law, config.latency_quantile, config.deadline + 1
        )
        distortion = total_distortion(config.schedule, config.base_distortion)
        self.table = np.zeros((config.deadline + 2, config.num_steps + 1, config.num_steps + 1), dtype=np.int8)
        largest = _largest_feasible(self.latency, config.deadline, int(tight))
        _fill_table(Promises(distortion, self.latency, largest), literal, self.table)

    def decide(self, observation: Mapping[str, NDArray[Any]], legal: NDArray[np.bool_]) -> NDArray[np.int64]:
        """The actions that the table has for slot, server step and device step."""
        actions: NDArray[np.int8] = self.table[
            observation["slot"], observation["server_step"], observation["device_step"]
        ]
        return actions.astype(np.int64)


class ClosedLoopLookahead(Lookahead):
    """The paper's look-ahead with the closed-loop coder.

    Its table is that of the paper's coder, by Eqs. (8)–(10): the distortions do not contain what the closed-loop coder
    gains, the latencies do not contain its side information, and the step that the device holds is never sent again.

    Args:
        config: the system, with a single SNR.

    Raises:
        ConfigurationError: if the configuration has an SNR range.
    """

    env_kwargs: ClassVar[Mapping[str, Any]] = {"coder": "closed_loop", "payload": "latent"}

    def __init__(self, config: SystemConfig) -> None:
        super().__init__(config)
        self.name = "lookahead-closed-loop"
