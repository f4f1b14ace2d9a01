"""What the command lines of ``agents`` have in common: every error is one sentence on stderr and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from tqdm import tqdm

from refine_env import CacheError, ConfigurationError, MissingExtraError
from refine_env._compiled import tell_of_compiling
from refine_env.errors import TransportError

__all__ = ["exit_codes"]


@contextmanager
def exit_codes(out: Path | None = None, kind: str = "folder") -> Iterator[None]:
    """End the command with 2 for a wrong argument, 3 for a cache, file or connection, 4 for a missing extra.

    Where it has to compile, which happens once in an installation, a line on stderr says so.

    Args:
        out: what the command writes, where that alone can be the cause of an ``OSError``.
        kind: what ``out`` is.
    """
    try:
        with tell_of_compiling(_say_compiling):
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


def _say_compiling() -> None:
    tqdm.write("compiling, once, about 10 s", file=sys.stderr)  # above a progress bar, if there is one


def _exit(sentence: str, code: int) -> typer.Exit:
    typer.echo(f"error: {sentence}", err=True)
    return typer.Exit(code)
