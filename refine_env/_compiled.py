"""How the package compiles its Numba kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import numba
from numba.core import event

__all__ = ["kernel", "tell_of_compiling"]

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """Compile a function to machine code at its first call, and keep that on disk where possible.

    IEEE arithmetic in the order as written (no fast-math), so a kernel and its plain NumPy twin agree
    and results do not depend on the processor. The GIL is released. Where no folder for the compiled
    code is writable, it is compiled anew in every process.
    """
    # Nobody calls a kernel from C; a wrapper for that would be compiled for each.
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": False, "no_cfunc_wrapper": True}
    try:
        return cast(F, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # no writable place for the cache
        return cast(F, numba.njit(**options)(function))


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
