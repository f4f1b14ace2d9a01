"""Hostile arguments: whatever is given, the environments work or refuse with one short sentence of their own."""

from __future__ import annotations

import dataclasses
import itertools
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import refine_env
from refine_env import (
    ActionError,
    CacheError,
    ConfigurationError,
    LatentRefinementEnv,
    LatentRefinementVectorEnv,
    LinkConfig,
    NoiseSchedule,
    SystemConfig,
)
from refine_env.dynamics.settings import EnvSettings
from refine_env.model.distortion import SecondMoments

ENV_ARGUMENTS = (*(field.name for field in dataclasses.fields(EnvSettings)), "render_mode")
LINK_ARGUMENTS = tuple(field.name for field in dataclasses.fields(LinkConfig))
PLACES = (
    *(("env", name) for name in ENV_ARGUMENTS),
    *(("link", name) for name in LINK_ARGUMENTS),
    *(("options", name) for name in ("trajectory", "rates", "prompt")),
    ("rates", "all"),
    ("reset", "seed"),
    ("reset", "options"),
    ("step", "action"),
    ("vector", "num_envs"),
    ("vector", "autoreset_mode"),
    ("vector options", "reset_mask"),
    ("vector reset", "seed"),
    ("vector step", "actions"),
)


class Odd:
    """An object that has neither equality nor a representation."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no equality")

    def __repr__(self) -> str:
        raise RuntimeError("no representation")


def nested(depth: int) -> list[Any]:
    inner: list[Any] = []
    for _ in range(depth):
        inner = [inner]
    return inner


CIRCLE: list[Any] = []
CIRCLE.append(CIRCLE)
NUMBERS: list[Any] = [
    *(0, 1, -1, 2**63, 2**70, -(2**70), 10**400, -(10**400), 10**5000, True, False),
    *(0.5, -0.0, 1e308, 5e-324, float("nan"), float("inf"), -float("inf"), 1j),
    *(Decimal("1e500"), Fraction(10**400, 3), np.float64("nan"), np.float32(3), np.int8(-3), np.uint64(2**63 + 5)),
    np.bool_(True),
]
OBJECTS: list[Any] = [
    *(None, object(), Odd(), int, len, NotImplemented, Ellipsis, np.datetime64("2026-01-01"), Path("/nowhere")),
    *("", "x", "a" * 5000, "\ud800", "\0", np.str_("x"), b"", b"x", bytearray(b"x"), memoryview(b"ab")),
    *(np.array(3), np.array(np.nan), np.array([]), np.array([1, 2]), np.array([3.0]), np.zeros((2, 2))),
    *(np.array(["x", "y"]), np.array([1, None], dtype=object)),
    *([], [1], [1, 2], [0, 24], [1, [2, 3]], [[1, 2], [3]], [10**400, 1], [1, 10**400], ["\ud800", 1], [np.nan, 1]),
    *(CIRCLE, nested(3000), (), {}, {"a": 1}, {1: 2}, {"\ud800": 1}, set(), {1, 2}, range(10**6), iter([1])),
]
HOSTILE = [*NUMBERS, *OBJECTS]


def play(kwargs: dict[str, Any], placed: list[tuple[tuple[str, str], Any]], *, vector: bool) -> None:
    """Make an environment with these arguments, reset it and act in it."""
    given: dict[str, dict[str, Any]] = {kind: {} for kind in ("env", "link", "options", "reset", "vector", "step")}
    for (kind, name), value in placed:
        if kind == "rates":
            given["options"]["rates"] = [value] * kwargs["deadline"]
        else:
            given[kind.removeprefix("vector ")][name] = value
    arguments = {**kwargs, **({"link": given["link"]} if given["link"] else {}), **given["env"]}
    reset = {**({"options": given["options"]} if given["options"] else {}), **given["reset"]}
    env: Any
    if vector:
        env = LatentRefinementVectorEnv(**{"num_envs": 2, **given["vector"]}, **arguments)
        action: Any = np.zeros(env.num_envs, dtype=np.int64)
    else:
        env, action = LatentRefinementEnv(**arguments), 0
    env.reset(**reset)
    for value in given["step"].values():
        action = value
    env.step(action)


def refused_by_a_sentence(kwargs: dict[str, Any], placed: list[tuple[tuple[str, str], Any]], *, vector: bool) -> bool:
    try:
        play(kwargs, placed, vector=vector)
    except (ConfigurationError, CacheError, ActionError) as error:
        message = str(error)
        assert "must" in message, message
        assert len(message) < 1500, message  # the longest has the names of all arguments, and what was given, cut
        return True
    return False


@pytest.mark.parametrize("place", PLACES, ids=" ".join)
def test_every_argument_takes_or_refuses_whatever_it_is_given(tiny_kwargs: dict[str, Any], place: Any) -> None:
    vectors = (True,) if place[0].startswith("vector") else (False,) if place[0] == "step" else (False, True)
    refused = [
        refused_by_a_sentence(tiny_kwargs, [(place, value)], vector=vector)
        for value, vector in itertools.product(HOSTILE, vectors)
    ]
    assert any(refused)


def test_hostile_arguments_together(tiny_kwargs: dict[str, Any], rng: np.random.Generator) -> None:
    for _ in range(300):
        chosen = [PLACES[i] for i in rng.choice(len(PLACES), rng.integers(2, 5), replace=False)]
        placed = [(place, HOSTILE[rng.integers(len(HOSTILE))]) for place in chosen]
        vector = any(kind.startswith("vector") for kind, _ in chosen) or rng.random() < 0.5
        if ("step", "action") in chosen:
            vector = False
            placed = [(place, value) for place, value in placed if not place[0].startswith("vector")]
        refused_by_a_sentence(tiny_kwargs, placed, vector=vector)


@pytest.mark.parametrize("make", [NoiseSchedule, SecondMoments])
def test_arrays_of_a_system_are_arrays_or_refused(make: Any) -> None:
    for value in HOSTILE:
        with pytest.raises(ConfigurationError, match="must be"):
            make(value)


@pytest.mark.parametrize("value", HOSTILE, ids=lambda value: type(value).__name__)
def test_a_system_takes_or_refuses_any_dimension(value: Any) -> None:
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and 1 <= value <= 2**62:
        assert SystemConfig(snr_db=0.0, latent_dim=value).latent_dim == value
    else:
        with pytest.raises(ConfigurationError, match="`latent_dim` must be an integer in 1 … "):
            SystemConfig(snr_db=0.0, latent_dim=value)


UNKNOWN = [
    ({"dead_line": 60}, "Did you mean `deadline`\\?"),
    ({"snr": 6.0}, "Did you mean `snr_db`\\?"),
    ({"fading": "rician"}, "Did you mean link={'fading': …}\\?"),
    ({"num_subchannel": 6}, "Did you mean link={'num_subchannels': …}\\?"),
    ({"qqq": 6}, "argument 'qqq'. Correct the spelling"),
    ({"link": {"k_factor": 6.0}}, "Did you mean `k_factor_db`\\?"),
    ({"link": {1: 6.0}}, "got {1: 6.0}. Leave out"),
]


@pytest.mark.parametrize(("kwargs", "message"), UNKNOWN, ids=str)
def test_unknown_arguments_are_told_the_likely_one(
    tiny_kwargs: dict[str, Any], kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        gym.make(refine_env.ENV_ID, **{**tiny_kwargs, **kwargs})
    with pytest.raises(ConfigurationError, match=message):
        gym.make_vec(refine_env.ENV_ID, num_envs=2, **{**tiny_kwargs, **kwargs})
