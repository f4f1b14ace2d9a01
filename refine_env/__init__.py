"""Deadline-aware generative AI over a fading channel, as a Gymnasium environment.

Importing the package registers ``refine_env/LatentRefinement-v0``::

    import gymnasium as gym
    import refine_env

    env = gym.make("refine_env/LatentRefinement-v0", snr_db=6.0)
"""

import gymnasium as _gymnasium

from refine_env import coding, link
from refine_env.config import LinkConfig, SystemConfig
from refine_env.env import LatentRefinementEnv
from refine_env.errors import (
    ActionError,
    CacheError,
    CacheFormatError,
    ConfigurationError,
    MissingExtraError,
)
from refine_env.model.schedule import NoiseSchedule
from refine_env.trajectories import TrajectoryCache
from refine_env.vector_env import LatentRefinementVectorEnv

__version__ = "0.1.0"

ENV_ID = "refine_env/LatentRefinement-v0"
"""The environment's id; a change of behavior gets a new version."""

__all__ = [
    "ENV_ID",
    "ActionError",
    "CacheError",
    "CacheFormatError",
    "ConfigurationError",
    "LatentRefinementEnv",
    "LatentRefinementVectorEnv",
    "LinkConfig",
    "MissingExtraError",
    "NoiseSchedule",
    "SystemConfig",
    "TrajectoryCache",
    "__version__",
    "coding",
    "link",
]

if ENV_ID not in _gymnasium.registry:
    _gymnasium.register(
        id=ENV_ID,
        entry_point="refine_env.env:LatentRefinementEnv",
        vector_entry_point="refine_env.vector_env:LatentRefinementVectorEnv",
    )
