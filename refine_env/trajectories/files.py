"""Files that somebody else may have written or damaged: whatever is wrong with them becomes a CacheError."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from refine_env.errors import CacheError, CacheFormatError

__all__ = [
    "REMEDY",
    "check_json",
    "disk_errors",
    "hash_file",
    "open_file",
    "parse_json",
    "read_file",
    "reason",
    "shorten",
]

REMEDY = "Restore the file, or generate the cache again."
MAX_JSON_BYTES = 1 << 27
MAX_JSON_DEPTH = 32

_SHOWN_CHARACTERS = 80
_AT_ONCE = getattr(os, "O_NONBLOCK", 0)  # opening a pipe would wait for its writer


@contextmanager
def open_file(file: Path) -> Iterator[BufferedReader]:
    """Open a regular file for reading; whatever the system refuses, while it is open too, is one sentence.

    Raises:
        CacheFormatError: if it is missing, or something else, such as a pipe.
        CacheError: if it cannot be opened or read.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | _AT_ONCE | getattr(os, "O_BINARY", 0))
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # asked first: `fdopen` refuses a folder in its own words
            os.close(descriptor)
            raise CacheFormatError(f"{file} must be a regular file, got a folder, pipe or device. {REMEDY}")
        with os.fdopen(descriptor, "rb") as handle:
            yield handle
    except FileNotFoundError:
        raise CacheFormatError(f"{file} must exist, got no such file. {REMEDY}") from None
    except (OSError, ValueError) as error:
        raise CacheError(f"{file} must be readable, got {reason(error)}. {REMEDY}") from error


def read_file(file: Path) -> bytes:
    """Read the bytes of a JSON file.

    Raises:
        CacheFormatError: if it is missing, no regular file, or too large.
        CacheError: if it cannot be read.
    """
    with open_file(file) as handle:
        if os.fstat(handle.fileno()).st_size > MAX_JSON_BYTES:
            raise CacheFormatError(f"{file} must have at most {MAX_JSON_BYTES} bytes, got more. {REMEDY}")
        return handle.read()


def hash_file(file: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal.

    Raises:
        CacheError: as `open_file`.
    """
    with open_file(file) as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Raise one sentence, a CacheError, where the disk refuses an operation."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise CacheError(
            f"{folder} must be writable, got: {why}. Free space or choose another folder, and run the "
            "same command again; what is written is kept."
        ) from error


def parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object of values that `check_json` allows.

    Args:
        raw: the text, in UTF-8.
        where: what it is the text of, for the message.

    Raises:
        CacheFormatError: if it is anything else.
    """
    try:
        values = json.loads(raw.decode())
        check_json(values)
    except RecursionError:
        problem = f"values nested more than {MAX_JSON_DEPTH} deep"
    except ValueError as error:
        problem = str(error)
    else:
        if isinstance(values, dict):
            return values
        problem = shorten(values)
    raise CacheFormatError(f"{where} must be a JSON object, got {problem}. {REMEDY}") from None


def check_json(values: Any) -> None:
    """Check that JSON values can be computed with, written and printed: what holds for all fields alike.

    Raises:
        ValueError: if a number does not fit a float64, a text is not Unicode (a lone surrogate), or values are
            nested too deep.
    """
    level, depth = [values], 0
    while level:
        if depth > MAX_JSON_DEPTH:
            raise ValueError(f"values nested more than {MAX_JSON_DEPTH} deep")
        inner: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                inner.extend(value)
                inner.extend(value.values())
            elif isinstance(value, list):
                inner.extend(value)
            elif isinstance(value, str):
                if not value.isascii():
                    value.encode()
            elif value is not None and not abs(value) <= sys.float_info.max:
                raise ValueError(f"the number {shorten(value)}, which is not a finite float64")
        level, depth = inner, depth + 1


def shorten(value: Any) -> str:
    """Write a value for a message: its ``repr``, which escapes what a terminal would obey, cut in the middle."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:60]} … {text[-15:]}"


def reason(error: Exception) -> str:
    """Return the system's own words and code for a failed operation."""
    number = getattr(error, "errno", None)
    return f"{os.strerror(number)} ({errno.errorcode.get(number, number)})" if number else str(error)
