"""Checks of single arguments, each failing with one sentence: what, got, what to do."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refine_env.errors import ConfigurationError, printable

__all__ = [
    "check_choice",
    "check_finite",
    "check_flag",
    "check_integer",
    "check_positive",
    "check_quantile",
    "check_snr_db",
    "check_text",
    "did_you_mean",
    "integer_array",
    "real_array",
    "shown",
]

SNR_DB_LIMIT = 200.0


def shown(value: Any) -> str:
    """A value as a message shows it: its representation, as :func:`printable` text; its type if it has none."""
    try:
        text = " ".join(line.strip() for line in repr(value).splitlines())
    except Exception:  # nested too deep, an integer of too many digits, or whatever an object of the caller's raises
        return f"a {type(value).__name__} that cannot be shown"
    return printable(text)


def did_you_mean(unknown: Iterable[Any], known: Mapping[str, str] | Iterable[str]) -> str:
    """A sentence with the known names that resemble the unknown ones, and a space at its end; empty if none does.

    Args:
        unknown: the names that were given.
        known: the names that exist, or a mapping from them to the form in which the sentence shows them.
    """
    forms = dict(known) if isinstance(known, Mapping) else {name: f"`{name}`" for name in known}
    found = [difflib.get_close_matches(name, forms, n=1) for name in unknown if isinstance(name, str)]
    likely = dict.fromkeys(forms[name] for names in found for name in names)
    return f"Did you mean {', '.join(likely)}? " if likely else ""


def integer_array(value: Any) -> NDArray[Any] | None:
    """An array or nested sequence of integers of any width; None for anything else."""
    return _array_of_kind(value, "iu")


def real_array(value: Any) -> NDArray[np.float64] | None:
    """An array or nested sequence of real numbers as float64; None for anything else."""
    array = _array_of_kind(value, "iuf")
    with np.errstate(over="ignore"):  # a wider float may exceed float64: infinity then
        return None if array is None else array.astype(np.float64)


def _array_of_kind(value: Any, kinds: str) -> NDArray[Any] | None:
    try:
        array = np.asarray(value)
    except Exception:  # ragged, nested too deep, or whatever an object of the caller's raises
        return None
    return array if array.dtype.kind in kinds else None


def check_integer(name: str, value: Any, minimum: int, maximum: int | None = None, *, advice: str) -> int:
    """``value`` as an int in ``minimum … maximum``; raises ConfigurationError otherwise."""
    if (
        isinstance(value, bool)
        or not isinstance(value, Integral)
        or int(value) < minimum
        or (maximum is not None and int(value) > maximum)
    ):
        span = f">= {minimum}" if maximum is None else f"in {minimum} … {maximum}"
        raise ConfigurationError(f"`{name}` must be an integer {span}, got {shown(value)}. {advice}")
    return int(value)


def check_finite(name: str, value: Any, *, advice: str) -> float:
    """``value`` as a finite float; raises ConfigurationError otherwise."""
    number = math.nan
    if not isinstance(value, bool) and isinstance(value, Real):
        try:
            number = float(value)
        except OverflowError:  # of an integer or a fraction beyond all floats
            number = math.inf
    if not math.isfinite(number):
        raise ConfigurationError(f"`{name}` must be a finite number, got {shown(value)}. {advice}")
    return number


def check_positive(name: str, value: Any, *, advice: str) -> float:
    """``value`` as a finite float above 0; raises ConfigurationError otherwise."""
    number = check_finite(name, value, advice=advice)
    if number <= 0.0:
        raise ConfigurationError(f"`{name}` must be > 0, got {shown(value)}. {advice}")
    return number


def check_quantile(value: float, name: str = "quantile") -> float:
    """``value`` as a float strictly between 0 and 1; raises ConfigurationError otherwise."""
    number = check_positive(name, value, advice="Give a probability, for example 0.9.")
    if number >= 1.0:
        raise ConfigurationError(
            f"`{name}` must lie strictly between 0 and 1, got {shown(value)}. Give a probability, for example 0.9."
        )
    return number


def check_snr_db(value: Any, name: str = "snr_db") -> float:
    """A mean SNR in dB, finite and within ±200; raises ConfigurationError otherwise."""
    number = check_finite(name, value, advice="Give the mean SNR per subchannel in dB, for example 6.0.")
    if abs(number) > SNR_DB_LIMIT:
        raise ConfigurationError(
            f"`{name}` must lie in -{SNR_DB_LIMIT:g} … {SNR_DB_LIMIT:g} dB, got {shown(value)}. "
            "Give the mean SNR per subchannel in dB, for example 6.0."
        )
    return number


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """``value`` if it is one of ``choices``; raises ConfigurationError otherwise."""
    if not isinstance(value, str) or value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ConfigurationError(f"`{name}` must be one of {listed}, got {shown(value)}. Choose one of them.")
    return str(value)


def check_flag(name: str, value: Any) -> bool:
    """``value`` if it is a bool; raises ConfigurationError otherwise."""
    if not isinstance(value, bool):
        raise ConfigurationError(f"`{name}` must be True or False, got {shown(value)}. Choose one of them.")
    return value


def check_text(name: str, value: str) -> str:
    """``value`` if it can be encoded in UTF-8, as in every file that holds it; raises ConfigurationError otherwise."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigurationError(
            f"`{name}` must be text that UTF-8 can hold, got {value!r:.200}. Write it without what is no character."
        ) from None
    return value
