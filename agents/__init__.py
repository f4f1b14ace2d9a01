"""Policies for the latent refinement environment, by name.

::

    import agents

    agent = agents.make("lookahead", config=env.unwrapped.config)
    agent.reset(num_envs=1)
    action = agent.select_action(observation, info)
"""

from agents.base import Agent
from agents.fixed import FinalOnly, PersistentQ, RandomAgent
from agents.lookahead import Lookahead
from agents.registry import env_kwargs, make, names

__all__ = ["Agent", "FinalOnly", "Lookahead", "PersistentQ", "RandomAgent", "env_kwargs", "make", "names"]
