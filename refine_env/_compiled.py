"""How the package compiles its Numba kernels, and when what is kept of them on disk is stale."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core import event
from numba.core.caching import FunctionCache

__all__ = ["kernel", "plain", "tell_of_compiling"]

F = TypeVar("F", bound=Callable[..., Any])

_MARK = b"@kernel\n"  # the line that makes a file one of the kernel sources


@cache
def _sources_stamp(package: Path) -> str:
    """SHA-256 of all files of a package that define kernels, names and contents."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        source = path.read_bytes()
        if _MARK in source:
            digest.update(f"{path.relative_to(package).as_posix()} {len(source)}\n".encode())
            digest.update(source)
    return digest.hexdigest()


def _stamp(function: Callable[..., Any]) -> str:
    """Of the kernel sources of this package and of the one that the function belongs to."""
    own = Path(inspect.getfile(function)).resolve()
    while (own.parent / "__init__.py").is_file():
        own = own.parent
    packages = {Path(__file__).resolve().parent, own}
    return " ".join(_sources_stamp(package) for package in sorted(packages) if package.is_dir())


class _KernelCache(FunctionCache):
    """Numba's cache on disk, valid for one state of all kernel sources.

    A kernel's machine code contains that of the kernels it calls, and constants and tuples of other files. Numba
    itself looks at the kernel's own file alone.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)  # type: ignore[no-untyped-call]
        # Numba compares this before it unpickles the rest of an index, which may name a tuple that was renamed since.
        self._cache_file._version = f"{numba.__version__} {_stamp(function)}"


def kernel(function: F) -> F:
    """Compile a function to machine code at its first call, and keep that on disk where possible.

    IEEE arithmetic in the order as written (no fast-math), so a kernel and its plain NumPy twin agree
    and results do not depend on the processor. The GIL is released. Where no folder for the compiled
    code is writable, it is compiled anew in every process. What is kept is used while no file that defines
    kernels has changed, so kernels may call kernels of other files.
    """
    # Nobody calls a kernel from C; a wrapper for that would be compiled for each.
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": False, "no_cfunc_wrapper": True}
    compiled: Any = numba.njit(**options)(function)
    with suppress(RuntimeError):  # no writable place for the cache
        compiled._cache = _KernelCache(function)
    return cast(F, compiled)


def plain(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """The Python function behind a kernel: for arrays, and where a single call is not worth compiling for."""
    python: Callable[..., Any] = getattr(compiled, "py_func", compiled)
    return python


class _First(event.Listener):
    """Calls a function at the first event, and never again."""

    def __init__(self, tell: Callable[[], None]) -> None:
        self._tell: Callable[[], None] | None = tell

    def on_start(self, event: Any) -> None:
        tell, self._tell = self._tell, None
        if tell is not None:
            tell()

    def on_end(self, event: Any) -> None:
        """Nothing is said of it."""


@contextmanager
def tell_of_compiling(tell: Callable[[], None]) -> Iterator[None]:
    """Call a function once, as soon as something has to be compiled within the block that is not on disk."""
    with event.install_listener("numba:compile", _First(tell)):
        yield
