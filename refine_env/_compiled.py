"""How the package compiles its Numba kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

__all__ = ["kernel"]

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """Compile a function to machine code at its first call, and keep that on disk where possible.

    IEEE arithmetic in the order as written (no fast-math), so a kernel and its plain NumPy twin agree
    and results do not depend on the processor. The GIL is released. Where no folder for the compiled
    code is writable, it is compiled anew in every process.
    """
    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": False, "no_cfunc_wrapper": True}
    try:
        return cast(F, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # no writable place for the cache
        return cast(F, numba.njit(**options)(function))
