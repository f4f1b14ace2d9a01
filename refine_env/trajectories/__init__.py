"""Trajectory caches: read, write and generate them. Imports NumPy and safetensors, nothing heavier."""

from refine_env.trajectories.cache import SPLITS, TrajectoryCache, find_cache, find_damage, read_manifest
from refine_env.trajectories.generate import (
    generate_diffusers,
    generate_forward_process,
    generate_gaussian,
    sample_seed,
)
from refine_env.trajectories.manifest import Manifest, Recipe, Shard, Trajectory
from refine_env.trajectories.prompts import PromptSelection, read_prompts
from refine_env.trajectories.reuse import Reuse

__all__ = [
    "SPLITS",
    "Manifest",
    "PromptSelection",
    "Recipe",
    "Reuse",
    "Shard",
    "Trajectory",
    "TrajectoryCache",
    "find_cache",
    "find_damage",
    "generate_diffusers",
    "generate_forward_process",
    "generate_gaussian",
    "read_manifest",
    "read_prompts",
    "sample_seed",
]
