"""Policies by name."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from agents.base import Agent
from agents.policies.clairvoyant import Clairvoyant
from agents.policies.dynamic_programming import DynamicProgramming
from agents.policies.fixed import PersistentQ, RandomAgent
from agents.policies.inference import InferringDynamicProgramming
from agents.policies.learned import SHIPPED, Learned, read_policy
from agents.policies.lookahead import ClosedLoopLookahead, Lookahead
from agents.policies.sequential import ClosedLoopFinalAdaptive, FinalAdaptive, FinalOnly, FinalQ
from refine_env import ConfigurationError, SystemConfig
from refine_env._validation import did_you_mean, shown
from refine_env.config import PAPER_BIT_DEPTHS

__all__ = ["env_kwargs", "make", "names"]

_MAKERS: dict[str, tuple[type[Agent], Callable[..., Agent]]] = {
    "lookahead": (Lookahead, Lookahead),
    "lookahead-literal": (Lookahead, lambda config: Lookahead(config, literal=True)),
    "lookahead-tight": (Lookahead, lambda config: Lookahead(config, tight=True)),
    "lookahead-closed-loop": (ClosedLoopLookahead, ClosedLoopLookahead),
    "dp": (DynamicProgramming, DynamicProgramming),
    "dp-current-rate": (DynamicProgramming, lambda config: DynamicProgramming(config, current_rate=True)),
    "dp-final": (DynamicProgramming, lambda config: DynamicProgramming(config, final_only=True)),
    "dp-anytime": (DynamicProgramming, lambda config: DynamicProgramming(config, anytime=True)),
    "dp-inferred": (InferringDynamicProgramming, InferringDynamicProgramming),
    "clairvoyant": (Clairvoyant, Clairvoyant),
    "final-only": (FinalOnly, FinalOnly),
    "final-adaptive": (FinalAdaptive, FinalAdaptive),
    "final-adaptive-closed-loop": (ClosedLoopFinalAdaptive, ClosedLoopFinalAdaptive),
    "random": (RandomAgent, RandomAgent),
}
_LEARNED = "learned"  # the shipped policy; learned:PATH is the one in that folder
_AT_ONE_DEPTH = {"persistent": PersistentQ, "final": FinalQ}  # NAME-qB for every bit depth B
_OF_ONE_DEPTH = re.compile(rf"({'|'.join(_AT_ONE_DEPTH)})-q([1-9]|1[0-6])")


def names(config: SystemConfig | None = None) -> list[str]:
    """The names that :func:`make` knows.

    Persistent-Q and Final-Q come with the bit depths of ``config`` (default: the paper's).

    Besides these there is ``learned``, the shipped policy, for the system that it was trained for, and
    ``learned:PATH``, the policy in that folder.
    """
    depths = PAPER_BIT_DEPTHS if config is None else config.bit_depths
    return [*_MAKERS, *(f"{kind}-q{bits}" for kind in _AT_ONE_DEPTH for bits in depths)]


def make(name: str, config: SystemConfig, *, neglect_errors: bool = False, **options: Any) -> Agent:
    """The policy of that name, made for a system.

    On the paper's coder, the model of a policy that plans with the coding errors of the closed-loop coder (``dp`` and
    its variants, ``clairvoyant``) neglects these errors. It may end far above the look-ahead there; a warning says so,
    once.

    Args:
        name: one of :func:`names`.
        config: the system, for example ``env.unwrapped.config``.
        neglect_errors: True says that such a plan is meant; nobody is warned.
        **options: options of that policy, for example ``seed`` for ``random``.

    Raises:
        ConfigurationError: if there is no such policy, or it cannot act in that system.
    """
    kind, maker = _find(name)
    try:
        agent = maker(config, **options)
    except TypeError as error:
        known = [option for option in inspect.signature(maker).parameters if option != "config"]
        raise ConfigurationError(
            f"`options` must be those of {name}, got {', '.join(options) or 'none'} ({error}). "
            f"{did_you_mean(options.keys() - set(known), known)}See help({kind.__module__}.{kind.__name__})."
        ) from None
    if kind.plans_with_errors and config.coder == "forward" and not neglect_errors:
        _warn_of_neglected_errors(name)
    return agent


@cache  # one warning in a process, even if the filters of warnings change
def _warn_of_neglected_errors(name: str) -> None:
    warnings.warn(
        f"{name} plans as if there were no coding errors on the paper's coder (coder='forward'), and may end far above "
        "lookahead: use coder='closed_loop', or pass neglect_errors=True if that is meant.",
        stacklevel=3,
    )


def env_kwargs(name: str) -> dict[str, Any]:
    """Environment arguments that the policy of that name is made for, e.g. ``{"coder": "forward", ...}``.

    Raises:
        ConfigurationError: if there is no such policy.
    """
    kind, maker = _find(name)
    if isinstance(maker, partial) and kind is Learned:
        return dict(read_policy(maker.keywords["path"]).description["env_kwargs"])
    return dict(kind.env_kwargs)


def _find(name: str) -> tuple[type[Agent], Callable[..., Agent]]:
    at_one_depth = _OF_ONE_DEPTH.fullmatch(name) if isinstance(name, str) else None
    if at_one_depth:
        kind = _AT_ONE_DEPTH[at_one_depth[1]]
        return kind, partial(kind, bits=int(at_one_depth[2]))
    if isinstance(name, str) and (name == _LEARNED or name.startswith(f"{_LEARNED}:")):
        return Learned, partial(Learned, path=name.removeprefix(f"{_LEARNED}:") if name != _LEARNED else SHIPPED)
    if not isinstance(name, str) or name not in _MAKERS:
        known = [*names(), _LEARNED, f"{_LEARNED}:PATH"]
        advice = f"{did_you_mean([name], known)}Choose one of them."
        if isinstance(name, SystemConfig):
            advice = "The name comes first: agents.make(name, config)."
        raise ConfigurationError(f"`name` must be one of {', '.join(known)}, got {shown(name)}. {advice}")
    return _MAKERS[name]
