"""What RL needs beside the environment: a reward on one scale for all SNRs, and set-ups on which agents learn.

The set-ups are registered under :data:`LEARNING_ID` and :data:`LEARNING_RANGE_ID`; ``docs/learning.md`` has what is
learned on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refine_env.learning.deadline_miss import MissProbability
from refine_env.learning.policy import LearnedPolicy, evaluate
from refine_env.learning.reward import RelativeCost, RelativeReward, VectorRelativeReward

__all__ = [
    "LEARNING",
    "LEARNING_ID",
    "LEARNING_RANGE",
    "LEARNING_RANGE_ID",
    "LearnedPolicy",
    "MissProbability",
    "RelativeCost",
    "RelativeReward",
    "VectorRelativeReward",
    "evaluate",
]

LEARNING_ID = "refine_env/LatentRefinement-Learning-v0"
"""The id of the set-up for one SNR, 6 dB unless told otherwise."""

LEARNING_RANGE_ID = "refine_env/LatentRefinement-LearningRange-v0"
"""The id of the set-up for all SNRs of 0 to 24 dB, of which one is drawn for every episode and never shown."""

LEARNING: Mapping[str, Any] = {"coder": "closed_loop", "decision_epochs": True}
"""Arguments of the environment in which the set-ups differ from the paper's setting."""

LEARNING_RANGE: Mapping[str, Any] = {**LEARNING, "snr_db": [0.0, 24.0]}
"""The same of the set-up for a range of SNRs."""

# As text, since a registration is to import nothing.
MAKE = "refine_env.learning.setups:make"
MAKE_VECTOR = "refine_env.learning.setups:make_vector"
