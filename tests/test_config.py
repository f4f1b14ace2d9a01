from __future__ import annotations

import json

import numpy as np
import pytest

from refine_env import ConfigurationError, LinkConfig, NoiseSchedule, SystemConfig
from refine_env.model.distortion import SecondMoments


def test_paper_defaults() -> None:
    config = SystemConfig(snr_db=6.0)
    assert (config.num_steps, config.deadline, config.latent_dim) == (50, 60, 16384)
    assert (config.symbols_per_slot, config.uplink_bits, config.link.num_subchannels) == (70.0, 8192.0, 60)
    assert config.bit_depths == (3, 4, 8, 10, 16)
    assert config.latency_quantile == 0.9


def test_link_scales_with_the_latent_unless_told_otherwise() -> None:
    config = SystemConfig(snr_db=6.0, latent_dim=256)
    assert (config.symbols_per_slot, config.uplink_bits) == (70 / 64, 128.0)
    fixed = SystemConfig(snr_db=6.0, latent_dim=256, link=LinkConfig(reference_latent_dim=None))
    assert (fixed.symbols_per_slot, fixed.uplink_bits) == (70.0, 8192.0)


def test_json_round_trip() -> None:
    config = SystemConfig(snr_db=(0.0, 24.0), latent_dim=64, schedule=NoiseSchedule([1, 0.5, 0.1]), bit_depths=(1, 16))
    assert SystemConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ConfigurationError, match="`values` must be an object with the keys"):
        SystemConfig.from_dict({"snr_db": 1.0})


def test_frozen_and_hashable() -> None:
    config = SystemConfig(snr_db=6)
    assert hash(config) == hash(SystemConfig(snr_db=6.0))
    with pytest.raises(AttributeError, match="cannot assign"):
        config.deadline = 3  # type: ignore[misc]


def test_actions() -> None:
    config = SystemConfig(snr_db=6.0, bit_depths=(2, 5, 16))
    assert config.num_actions == 4
    assert [config.action_of(bits) for bits in (2, 5, 16)] == [1, 2, 3]
    with pytest.raises(ConfigurationError, match=r"`bits` must be one of the bit depths \[2, 5, 16\], got 3"):
        config.action_of(3)


def test_one_snr_is_asked_for() -> None:
    config = SystemConfig(snr_db=(0, 24))
    with pytest.raises(ConfigurationError, match=r"`snr_db` must be one number for rate statistics, got the range"):
        _ = config.rate_statistics


def test_other_types_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="`schedule` must be a NoiseSchedule, got list"):
        SystemConfig(snr_db=6.0, schedule=[1.0, 0.5])  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="`link` must be an object"):
        SystemConfig(snr_db=6.0, link=[60])  # type: ignore[arg-type]


def test_closed_loop_configurations_make_the_round_trip() -> None:
    moments = SecondMoments.martingale(np.linspace(0.0, 1.0, 51))
    config = SystemConfig(snr_db=6.0, coder="closed_loop", payload="posterior_mean", second_moments=moments)
    again = SystemConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)
    assert again != SystemConfig(snr_db=6.0, coder="closed_loop")
    assert again != SystemConfig.from_dict({**config.to_dict(), "rotation": False})


def test_payloads_and_moments_must_fit() -> None:
    with pytest.raises(ConfigurationError, match="`second_moments` must be given for the payload 'posterior_mean'"):
        SystemConfig(snr_db=6.0, coder="closed_loop", payload="posterior_mean")
    with pytest.raises(ConfigurationError, match="`second_moments` must be SecondMoments of 50 steps, .* got 2 steps"):
        SystemConfig(snr_db=6.0, coder="closed_loop", second_moments=SecondMoments(np.eye(3)))
    with pytest.raises(ConfigurationError, match="`second_moments` must be SecondMoments of 50 steps, .* got list"):
        SystemConfig(snr_db=6.0, coder="closed_loop", second_moments=[[1.0]])  # type: ignore[arg-type]
