"""Show the episodes of an environment: with a history of each, one painter, the decoder, and a window."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refine_env.dynamics.simulator import NO_ACTION, EpisodeBatch
from refine_env.render.decoder import Decoder, find_decoder, pictures_of, scale_of
from refine_env.render.frame import FramePainter, Pictures
from refine_env.render.history import EpisodeHistory
from refine_env.render.window import Window
from refine_env.trajectories import TrajectoryCache

__all__ = ["EpisodeViewer"]

_TITLE = "refine-env"


class EpisodeViewer:
    """Makes the frames of an environment's episodes, and shows them.

    What is slow or cannot travel, the painter, the decoder and the window, is made when it is first needed, and left
    behind by pickle and copy.

    Args:
        episodes: the episodes of the environment.
        cache: the trajectories of the environment.
        decoder: the choice of a decoder, see :func:`refine_env.render.decoder.find_decoder`.
        fps: frames that a window shows in a second.
    """

    def __init__(self, episodes: EpisodeBatch, cache: TrajectoryCache, decoder: str, fps: float) -> None:
        self._episodes = episodes
        self._cache = cache
        self._choice = decoder
        self._fps = fps
        self._histories = [EpisodeHistory(episodes.config, cache) for _ in range(len(episodes))]
        self._drop()

    def _drop(self) -> None:
        self._painter: FramePainter | None = None
        self._decoder: Decoder | None = None
        self._window: Window | None = None
        self._clean: list[tuple[int, NDArray[np.float32]] | None] = [None] * len(self._histories)
        self._shown: list[tuple[int, NDArray[np.float32]] | None] = [None] * len(self._histories)

    def __getstate__(self) -> dict[str, Any]:
        names = ("_episodes", "_cache", "_choice", "_fps", "_histories")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)
        self._drop()

    def begin(self, i: int) -> None:
        """Note that episode ``i`` has begun anew."""
        episodes = self._episodes
        slot = int(episodes.state["slot"][i])
        self._histories[i].begin(int(episodes.trajectory[i]), episodes.rates[i], slot)
        self._shown[i] = None

    def follow(self, actions: NDArray[np.int64]) -> None:
        """Note that these actions (N,) have been taken."""
        slots = self._episodes.state["slot"]
        for i, history in enumerate(self._histories):
            if actions[i] != NO_ACTION:
                history.note(int(actions[i]), int(slots[i]))

    def frame(self, i: int) -> NDArray[np.uint8]:
        """Return the frame of episode ``i``, uint8 (height, width, 3).

        Raises:
            MissingExtraError: if matplotlib is not installed.
            ConfigurationError, CacheError: if a decoder was named and cannot be used.
        """
        if self._painter is None:
            self._decoder, note = find_decoder(self._cache, self._choice)
            self._painter = FramePainter(
                self._episodes.config,
                with_pictures=self._decoder is not None,
                note=note,
                scale=scale_of(self._decoder),
            )
        history = self._histories[i]
        history.catch_up()
        return self._painter.paint(history, self._pictures(i, history))

    def show(self, i: int) -> None:
        """Show the frame of episode ``i`` in the window.

        Raises:
            MissingExtraError: if matplotlib or pygame is not installed.
            ConfigurationError, CacheError: as :meth:`frame`.
        """
        frame = self.frame(i)
        if self._window is None:
            self._window = Window(_TITLE, self._fps)
        self._window.show(frame)

    def close(self) -> None:
        """Close the window, and let go of the rest."""
        if self._window is not None:
            self._window.close()
        self._drop()

    def _pictures(self, i: int, history: EpisodeHistory) -> Pictures | None:
        """Return the decoded images; each is decoded when its latent is new."""
        if self._decoder is None:
            return None
        clean, shown = self._clean[i], self._shown[i]
        if clean is None or clean[0] != history.trajectory:
            clean = history.trajectory, self._picture(history.trajectory, self._cache.latents(history.trajectory)[0])
            self._clean[i] = clean
        count = len(history.deliveries)
        if shown is None or shown[0] != count:
            shown = count, self._picture(history.trajectory, history.device_latent)
            self._shown[i] = shown
        return Pictures(shown[1], clean[1], self._cache.prompt(history.trajectory))

    def _picture(self, trajectory: int, latent: NDArray[Any]) -> NDArray[np.float32]:
        assert self._decoder is not None
        # One at a time: a decoder's last bits depend on the size of its batch.
        image = self._decoder(latent.reshape(1, *self._cache.latent_shape))
        picture: NDArray[np.float32] = pictures_of(image, self._decoder, self._cache, [trajectory])[0]
        return picture
