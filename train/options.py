"""Options of a training: the fields of a frozen dataclass, each of which carries its ``typer.Option``.

An option's name, default, help and bounds are written once, in that field. From there the command line gets its
signature, :class:`Options` what it refuses, and a finished run the command that it can be repeated with.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
import shlex
import sys
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

from refine_env._validation import check_choice
from refine_env.commands import parse_list, set_parameters
from refine_env.errors import ConfigurationError, import_extra

__all__ = [
    "FREE",
    "Options",
    "parse_numbers",
    "require_extra",
    "show_log",
    "takes_options",
    "unreadable_checkpoint",
]

_LARGEST = 1e12
_MOST_NUMBERS, _LARGEST_WIDTH = 100, 65536

FREE = object()
"""Marks, in a field's annotation, an option that does not change what is trained: an interrupted run may go on with
another value."""


class Options:
    """Base of the frozen dataclasses of options.

    Attributes:
        MODULE: the module whose command has these options.
    """

    MODULE: ClassVar[str]

    def __post_init__(self) -> None:
        """Refuse what the options' bounds and choices exclude, in Python as on the command line.

        Raises:
            ConfigurationError: if a number is outside its bounds, or a text is none of the choices.
        """
        for name, (kind, option, *_) in _annotations(type(self)).items():
            value = getattr(self, name)
            if typing.get_origin(kind) is typing.Literal:
                check_choice(name, value, typing.get_args(kind))
            elif isinstance(value, (int, float)):
                _check_number(name, value, option.min, option.max)

    @classmethod
    def free(cls) -> set[str]:
        """Names of the options that do not change what is trained."""
        return {name for name, annotation in _annotations(cls).items() if FREE in annotation}

    def trained_with(self) -> dict[str, Any]:
        """The options that the weights depend on, by name."""
        free = self.free()
        return {name: value for name, value in vars(self).items() if name not in free}

    def command_line(self, names: Iterable[str]) -> str:
        """The command line that gives these options the values that they have here."""
        words = ["python", "-m", self.MODULE]
        for name in names:
            value, option = getattr(self, name), "--" + name.replace("_", "-")
            words += [option if value else "--no-" + option[2:]] if isinstance(value, bool) else [option, str(value)]
        return shlex.join(words)


def _annotations(kind: type) -> dict[str, tuple[Any, ...]]:
    """Type, ``typer.Option`` and marks of every field."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: typing.get_args(hints[field.name]) for field in dataclasses.fields(kind)}


def _check_number(name: str, value: float, least: float | None, most: float | None) -> None:
    if isinstance(value, float) and not abs(value) <= _LARGEST:
        raise ConfigurationError(
            f"`{name}` must be a number of at most {_LARGEST:g} in size, got {value!r}. The training computes in "
            "float32, which does not hold the square of a larger one."
        )
    low, high = -math.inf if least is None else least, math.inf if most is None else most
    if not low <= value <= high:
        bounds = f">= {low:g}" if most is None else f"in {low:g} … {high:g}"
        raise ConfigurationError(f"`{name}` must be {bounds}, got {value!r}. Choose a number there.")


def takes_options(kind: type[Options]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command, which takes ``**options``, the fields of a dataclass as the signature that Typer reads."""
    annotated: Any = typing.Annotated
    annotations = _annotations(kind)
    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=annotated[annotations[field.name][:2]],
        )
        for field in dataclasses.fields(typing.cast("Any", kind))
    ]

    def give(function: Callable[..., None]) -> Callable[..., None]:
        set_parameters(function, parameters)
        return function

    return give


def parse_numbers(name: str, text: str, kind: type) -> tuple[Any, ...]:
    """Numbers with commas between, at most 100; integers have to be in 1 … 65536.

    Raises:
        ConfigurationError: if the text is no such list.
    """
    least, most = (1, _LARGEST_WIDTH) if kind is int else (-sys.float_info.max, sys.float_info.max)
    what, limit = ("positive integers", f", none above {most}") if kind is int else ("numbers", "")
    return parse_list(
        name,
        text,
        kind,
        what=f"{what} with commas between",
        advice=f"Give e.g. 64,64 or 0,24; at most {_MOST_NUMBERS}{limit}.",
        valid=lambda values: len(values) <= _MOST_NUMBERS and all(least <= value <= most for value in values),
    )


def require_extra(extra: str, packages: Iterable[str]) -> None:
    """Raise MissingExtraError unless every package of an optional dependency can be imported."""
    for package in packages:
        import_extra(package, extra)


def show_log() -> None:
    """Write what the trainings log to the standard error, each line with the time of day."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")


def unreadable_checkpoint(option: str, path: Path, why: str) -> ConfigurationError:
    """The error of a checkpoint that cannot be gone on with, in a folder that an option names."""
    return ConfigurationError(
        f"`{option}` must hold a checkpoint that can be read, got {str(path)!r} ({why}). "
        f"Delete it to begin anew, or give another {option}."
    )
