"""Deadline-aware generative AI over a fading channel, as a Gymnasium environment.

Importing the package registers ``refine_env/LatentRefinement-v0``, and two set-ups of it for learning::

    import gymnasium as gym
    import refine_env

    env = gym.make("refine_env/LatentRefinement-v0", snr_db=6.0)
"""

import gymnasium as _gymnasium

from refine_env import coding, learning, link
from refine_env.config import LinkConfig, SystemConfig
from refine_env.env import ENV_ID, LatentRefinementEnv
from refine_env.errors import (
    ActionError,
    CacheError,
    CacheFormatError,
    ConfigurationError,
    MissingExtraError,
)
from refine_env.learning import LEARNING_ID, LEARNING_RANGE_ID
from refine_env.model.schedule import NoiseSchedule
from refine_env.trajectories import TrajectoryCache
from refine_env.vector_env import LatentRefinementVectorEnv

__version__ = "0.1.0"

__all__ = [
    "ENV_ID",
    "LEARNING_ID",
    "LEARNING_RANGE_ID",
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
    "learning",
    "link",
]

for _id, _entry_point, _vector_entry_point, _kwargs in (
    (ENV_ID, "refine_env.env:LatentRefinementEnv", "refine_env.vector_env:LatentRefinementVectorEnv", {}),
    (LEARNING_ID, learning.MAKE, learning.MAKE_VECTOR, learning.LEARNING),
    (LEARNING_RANGE_ID, learning.MAKE, learning.MAKE_VECTOR, learning.LEARNING_RANGE),
):
    if _id not in _gymnasium.registry:
        _gymnasium.register(_id, _entry_point, vector_entry_point=_vector_entry_point, kwargs=dict(_kwargs))
