"""The package's own error types; each message is one sentence of what, got, and what to do."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = [
    "ActionError",
    "BitstreamError",
    "CacheError",
    "CacheFormatError",
    "ConfigurationError",
    "MissingExtraError",
    "ModelNotFoundError",
    "NamesAdapter",
    "RenderModeError",
    "TransportError",
    "describe_error",
    "import_extra",
    "printable",
]


class ConfigurationError(ValueError):
    """An argument, or a combination of arguments, that describes no valid system."""


class UnexpectedArgumentError(ConfigurationError, TypeError):
    """A keyword that is no argument: also Python's own error for that, by which some libraries probe environments."""


class ActionError(ValueError):
    """An action outside the action space, or an illegal one where the environment raises on these."""


class BitstreamError(ValueError):
    """Bytes that are no message, or a message that does not fit what the device holds."""


class TransportError(ConnectionError):
    """A connection between server and device that failed, or a peer that does not speak their protocol."""


class CacheError(Exception):
    """A trajectory cache that is missing, damaged or cannot be written."""


class CacheFormatError(CacheError):
    """A trajectory cache whose files do not match what its manifest, or this version, says."""


class ModelNotFoundError(CacheError):
    """A diffusion model whose weights are not here, or cannot be loaded."""


class RenderModeError(ConfigurationError, TypeError):
    """A render mode that the environment does not have.

    A TypeError too: libraries that try one render mode first, such as Stable-Baselines3, expect that and go on
    without.
    """


class MissingExtraError(ImportError):
    """A feature whose optional dependencies are not installed."""


def printable(text: object, limit: int = 200) -> str:
    """Text that somebody else wrote, as a message may show it: on one line, at most so long, and nothing but text.

    What a terminal would obey, and what cannot be encoded, is escaped as Python's ``repr`` does it.

    Args:
        text: anything; its ``str``.
        limit: characters; what is cut off leaves an ellipsis.
    """
    whole = str(text)
    shown = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in whole[:limit]
    )
    return shown if len(whole) <= limit and len(shown) <= limit else f"{shown[: limit - 1]}…"


def describe_error(error: Exception) -> str:
    """Return the kind and the message of another library's error, as a message may show them; they may quote a file."""
    return printable(" ".join(f"{type(error).__name__}: {error}".split()))


class NamesAdapter(type):
    """The metaclass of vector environments: the representation of such a class names the adapter to Stable-Baselines3.

    That library refuses Gymnasium's vector environments with a message that shows nothing of them but the class.
    """

    def __repr__(cls) -> str:
        return f"{super().__repr__()} (a vector environment: put refine_env.sb3.RefinementVecEnv around it)"


def import_extra(module: str, extra: str) -> ModuleType:
    """Import an optional dependency where it is used.

    Args:
        module: dotted name, e.g. ``"matplotlib.pyplot"``.
        extra: the extra of this distribution that installs it.

    Raises:
        MissingExtraError: if it is not installed; the message names the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise
        raise MissingExtraError(
            f"`{module.split('.')[0]}` must be installed for this, and it is not. "
            f"Install the extra: pip install 'refine-env[{extra}]' (from a clone: pip install -e '.[{extra}]')."
        ) from None
