"""What the command lines of ``agents`` have in common: every error is one sentence on stderr and an exit code.

A warning is one sentence, too.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from refine_env import CacheError, ConfigurationError, MissingExtraError
from refine_env.errors import TransportError

__all__ = ["exit_codes"]


@contextmanager
def exit_codes(out: Path | None = None, kind: str = "folder") -> Iterator[None]:
    """End the command with 2 for a wrong argument, 3 for a cache, file or connection, 4 for a missing extra.

    Args:
        out: what the command writes, where that alone can be the cause of an ``OSError``.
        kind: what ``out`` is.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            yield
    except MissingExtraError as error:
        raise _exit(str(error), 4) from None
    except ConfigurationError as error:
        raise _exit(str(error), 2) from None
    except (CacheError, TransportError) as error:
        raise _exit(str(error), 3) from None
    except OSError as error:
        if out is None:
            raise _exit(str(error), 3) from None
        sentence = f"`--out` must be a {kind} that can be written, got {str(out)!r} ({error.strerror}). Choose another."
        raise _exit(sentence, 3) from None


def _show_warning(message: Warning | str, *place: Any, **more: Any) -> None:
    """Without the line of code that it came from, which is none of the caller's."""
    typer.echo(f"warning: {message}", err=True)


def _exit(sentence: str, code: int) -> typer.Exit:
    typer.echo(f"error: {sentence}", err=True)
    return typer.Exit(code)
