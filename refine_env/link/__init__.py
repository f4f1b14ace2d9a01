"""The wireless link: waterfilling, block fading, rate statistics and the latency model."""

from refine_env.link.fading import draw_gains, draw_rates, draw_rates_of_many, slot_rates
from refine_env.link.latency import latency_quantile, latency_quantiles
from refine_env.link.statistics import RateStatistics, rate_statistics
from refine_env.link.waterfilling import total_power, waterfill

__all__ = [
    "RateStatistics",
    "draw_gains",
    "draw_rates",
    "draw_rates_of_many",
    "latency_quantile",
    "latency_quantiles",
    "rate_statistics",
    "slot_rates",
    "total_power",
    "waterfill",
]
