"""A window for frames, with pygame."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refine_env.errors import import_extra

__all__ = ["Window"]


class Window:
    """A window that opens with its first frame.

    Args:
        title: the title of the window.
        fps: frames a second; a frame is not shown before it is due.
    """

    def __init__(self, title: str, fps: float) -> None:
        self._title = title
        self._fps = fps
        self._pygame: Any = None
        self._screen: Any = None
        self._clock: Any = None

    def show(self, frame: NDArray[np.uint8]) -> None:
        """Show a frame (H, W, 3).

        Raises:
            MissingExtraError: if pygame is not installed.
        """
        if self._screen is None:
            self._pygame = import_extra("pygame", "render")
            self._pygame.init()
            self._pygame.display.init()
            self._pygame.display.set_caption(self._title)
            self._screen = self._pygame.display.set_mode((frame.shape[1], frame.shape[0]))
            self._clock = self._pygame.time.Clock()
        self._screen.blit(self._pygame.surfarray.make_surface(frame.swapaxes(0, 1)), (0, 0))
        self._pygame.event.pump()
        self._clock.tick(self._fps)
        self._pygame.display.flip()

    def close(self) -> None:
        """Close the window, if it is open."""
        if self._screen is not None:
            self._pygame.display.quit()
            self._pygame.quit()
            self._pygame = self._screen = self._clock = None
