"""The wireless link: waterfilling, block fading, rate statistics and the latency model."""

from refine_env.link.chain import RateChain, rate_chain
from refine_env.link.channel import ChannelModel
from refine_env.link.fading import draw_gains, draw_rates, draw_rates_of_many, slot_rates
from refine_env.link.latency import latency_quantile, latency_quantiles
from refine_env.link.law import RateLaw, RateLevels, rate_law
from refine_env.link.statistics import RateStatistics, rate_moments, rate_statistics
from refine_env.link.waterfilling import total_power, waterfill

__all__ = [
    "ChannelModel",
    "RateChain",
    "RateLaw",
    "RateLevels",
    "RateStatistics",
    "draw_gains",
    "draw_rates",
    "draw_rates_of_many",
    "latency_quantile",
    "latency_quantiles",
    "rate_chain",
    "rate_law",
    "rate_moments",
    "rate_statistics",
    "slot_rates",
    "total_power",
    "waterfill",
]
