"""Checks of single arguments, each failing with one sentence: what, got, what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

from refine_env.errors import ConfigurationError

__all__ = [
    "check_choice",
    "check_finite",
    "check_flag",
    "check_integer",
    "check_positive",
    "check_quantile",
    "check_snr_db",
    "check_text",
]

SNR_DB_LIMIT = 200.0


def check_integer(name: str, value: Any, minimum: int, maximum: int | None = None, *, advice: str) -> int:
    """``value`` as an int in ``minimum … maximum``; raises ConfigurationError otherwise."""
    if (
        isinstance(value, bool)
        or not isinstance(value, Integral)
        or int(value) < minimum
        or (maximum is not None and int(value) > maximum)
    ):
        span = f">= {minimum}" if maximum is None else f"in {minimum} … {maximum}"
        raise ConfigurationError(f"`{name}` must be an integer {span}, got {value!r}. {advice}")
    return int(value)


def check_finite(name: str, value: Any, *, advice: str) -> float:
    """``value`` as a finite float; raises ConfigurationError otherwise."""
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise ConfigurationError(f"`{name}` must be a finite number, got {value!r}. {advice}")
    return float(value)


def check_positive(name: str, value: Any, *, advice: str) -> float:
    """``value`` as a finite float above 0; raises ConfigurationError otherwise."""
    number = check_finite(name, value, advice=advice)
    if number <= 0.0:
        raise ConfigurationError(f"`{name}` must be > 0, got {value!r}. {advice}")
    return number


def check_quantile(value: float, name: str = "quantile") -> float:
    """``value`` as a float strictly between 0 and 1; raises ConfigurationError otherwise."""
    number = check_positive(name, value, advice="Give a probability, for example 0.9.")
    if number >= 1.0:
        raise ConfigurationError(
            f"`{name}` must lie strictly between 0 and 1, got {value!r}. Give a probability, for example 0.9."
        )
    return number


def check_snr_db(value: Any, name: str = "snr_db") -> float:
    """A mean SNR in dB, finite and within ±200; raises ConfigurationError otherwise."""
    number = check_finite(name, value, advice="Give the mean SNR per subchannel in dB, for example 6.0.")
    if abs(number) > SNR_DB_LIMIT:
        raise ConfigurationError(
            f"`{name}` must lie in -{SNR_DB_LIMIT:g} … {SNR_DB_LIMIT:g} dB, got {value!r}. "
            "Give the mean SNR per subchannel in dB, for example 6.0."
        )
    return number


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """``value`` if it is one of ``choices``; raises ConfigurationError otherwise."""
    if value not in choices:
        listed = ", ".join(repr(choice) for choice in choices)
        raise ConfigurationError(f"`{name}` must be one of {listed}, got {value!r}. Choose one of them.")
    return str(value)


def check_flag(name: str, value: Any) -> bool:
    """``value`` if it is a bool; raises ConfigurationError otherwise."""
    if not isinstance(value, bool):
        raise ConfigurationError(f"`{name}` must be True or False, got {value!r}. Choose one of them.")
    return value


def check_text(name: str, value: str) -> str:
    """``value`` if UTF-8 can hold it, as every file that keeps it must; raises ConfigurationError otherwise."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigurationError(
            f"`{name}` must be text that UTF-8 can hold, got {value!r:.200}. Write it without what is no character."
        ) from None
    return value
