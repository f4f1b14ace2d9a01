"""Frames of an episode: as text, as pictures, and in a window. Nothing heavy is imported before the first picture."""

from refine_env.render.decoder import AUTO_DECODER, NO_DECODER
from refine_env.render.frame import FRAME_HEIGHT, FRAME_WIDTH
from refine_env.render.history import EpisodeHistory, Message
from refine_env.render.text import ansi_frame
from refine_env.render.viewer import EpisodeViewer

__all__ = [
    "AUTO_DECODER",
    "FRAME_HEIGHT",
    "FRAME_WIDTH",
    "NO_DECODER",
    "EpisodeHistory",
    "EpisodeViewer",
    "Message",
    "ansi_frame",
]
