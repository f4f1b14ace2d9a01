"""Policies for the latent refinement environment, by name.

::

    import agents

    agent = agents.make("lookahead", config=env.unwrapped.config)
    agent.reset(num_envs=1)
    action = agent.select_action(observation, info)
"""

from agents.base import Agent
from agents.policies.clairvoyant import Clairvoyant
from agents.policies.dynamic_programming import DynamicProgramming
from agents.policies.fixed import PersistentQ, RandomAgent
from agents.policies.inference import InferringDynamicProgramming
from agents.policies.lookahead import ClosedLoopLookahead, Lookahead
from agents.policies.sequential import ClosedLoopFinalAdaptive, FinalAdaptive, FinalOnly, FinalQ
from agents.registry import env_kwargs, make, names

__all__ = [
    "Agent",
    "Clairvoyant",
    "ClosedLoopFinalAdaptive",
    "ClosedLoopLookahead",
    "DynamicProgramming",
    "FinalAdaptive",
    "FinalOnly",
    "FinalQ",
    "InferringDynamicProgramming",
    "Lookahead",
    "PersistentQ",
    "RandomAgent",
    "env_kwargs",
    "make",
    "names",
]
