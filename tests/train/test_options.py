"""Options are written once: bounds, choices and marks hold for the command line and in Python alike."""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Any

import pytest

from agents.policies.learned import ACTIVATIONS
from refine_env import ConfigurationError
from refine_env.dynamics.settings import REWARDS
from refine_env.wrappers import ENCODINGS
from train.diffusion import config as diffusion
from train.options import Options
from train.rl import config as rl

KINDS: tuple[type[Options], ...] = (rl.Config, diffusion.Config)


def options(kind: type[Options]) -> dict[str, tuple[Any, ...]]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: typing.get_args(hints[field.name]) for field in dataclasses.fields(kind)}


@pytest.mark.parametrize("kind", KINDS)
def test_bounds_and_choices_hold_in_python(kind: type[Options]) -> None:
    refused = 0
    for name, (annotation, option, *_) in options(kind).items():
        wrong: list[Any] = [bound + step for bound, step in ((option.min, -1), (option.max, 1)) if bound is not None]
        if annotation is float:
            wrong += [math.nan, math.inf, -1e13]
        elif typing.get_origin(annotation) is typing.Literal:
            wrong.append("nothing")
        for value in wrong:
            with pytest.raises(ConfigurationError, match=rf"`{name}` must be .*, got {value!r}"):
                kind(**{name: value})
        refused += bool(wrong)
    assert refused > 20


def test_choices_are_those_of_what_they_choose() -> None:
    choices = {name: typing.get_args(annotation) for name, (annotation, *_) in options(rl.Config).items()}
    assert choices["encoding"] == ENCODINGS
    assert choices["activation"] == ACTIVATIONS
    assert choices["reward"] == ("relative", *REWARDS)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mark_of_free_options_is_read(kind: type[Options]) -> None:
    free = kind.free()
    assert {"out", "threads"} < free
    assert not free & {"seed", "unet_steps", "total_steps", "cache"}
    assert set(kind().trained_with()) == set(options(kind)) - free
