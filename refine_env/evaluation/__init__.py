"""Evaluation: play policies on common random numbers, tabulate their episodes, and summarize the tables."""

from refine_env._files import write_atomically
from refine_env.evaluation.decoding import DecodingScorer, DeviceDecoder
from refine_env.evaluation.episode import EpisodeStep, Policy, play_episode, reset_policy
from refine_env.evaluation.rollout import Entry, Score, episode_seeds, roll_out, roll_out_many
from refine_env.evaluation.statistics import bootstrap_interval, percentile_interval, resampled_means, summarize
from refine_env.evaluation.tables import (
    DECODED_COLUMN,
    EPISODE_COLUMNS,
    FURTHER_COLUMNS,
    IMAGE_COLUMNS,
    SUMMARY_COLUMNS,
    Table,
    episode_columns,
    read_table,
    summary_columns,
    write_table,
)

__all__ = [
    "DECODED_COLUMN",
    "EPISODE_COLUMNS",
    "FURTHER_COLUMNS",
    "IMAGE_COLUMNS",
    "SUMMARY_COLUMNS",
    "DecodingScorer",
    "DeviceDecoder",
    "Entry",
    "EpisodeStep",
    "Policy",
    "Score",
    "Table",
    "bootstrap_interval",
    "episode_columns",
    "episode_seeds",
    "percentile_interval",
    "play_episode",
    "read_table",
    "resampled_means",
    "reset_policy",
    "roll_out",
    "roll_out_many",
    "summarize",
    "summary_columns",
    "write_atomically",
    "write_table",
]
