"""The observation encodings: in their space, row by row, alike around both environments, blind to the SNR."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from scipy import optimize, special

import refine_env
from refine_env import ConfigurationError
from refine_env.coding import base_distortion
from refine_env.wrappers import (
    ENCODINGS,
    ArrayInfo,
    EncodeObservation,
    MaskedObservation,
    ObservationEncoder,
    VectorEncodeObservation,
    VectorMaskedObservation,
)
from tests.model import plain_rules

VARIANTS = [(encoding, history) for encoding in ENCODINGS for history in (None, 0, 5)]


@pytest.fixture
def kwargs(gaussian_cache: Path) -> dict[str, Any]:
    return {"cache": str(gaussian_cache), "snr_db": [0, 24], "coder": "closed_loop", "split": "all"}


def observations_of(kwargs: dict[str, Any], episodes: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """Observations of random episodes, those after the last slot included."""
    env = gym.make(refine_env.ENV_ID, **kwargs)
    env.action_space.seed(seed)
    found = []
    for episode in range(episodes):
        observation, info = env.reset(seed=seed + episode)
        found.append(observation)
        terminated = False
        while not terminated:
            waits = info["action_mask"].copy()
            waits[1:] = 0
            mask = info["action_mask"] if env.np_random.random() < 0.2 else waits
            observation, _, terminated, _, info = env.step(env.action_space.sample(mask=mask))
            found.append(observation)
    return found


def batched(observations: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    return {key: np.array([o[key] for o in observations]) for key in observations[0]}


def config_of(kwargs: dict[str, Any]) -> refine_env.SystemConfig:
    return gym.make(refine_env.ENV_ID, **kwargs).unwrapped.config


# The checker would rather see the environment below the wrapper, which its own tests show it.
check_wrapped = pytest.mark.filterwarnings("ignore:.*is different from the unwrapped version:UserWarning")


@check_wrapped
@pytest.mark.parametrize(("encoding", "history"), VARIANTS)
def test_the_single_environment_passes_gymnasium_s_checker(
    kwargs: dict[str, Any], encoding: str, history: int | None
) -> None:
    env = EncodeObservation(gym.make(refine_env.ENV_ID, **kwargs), encoding, history)
    check_env(env, skip_render_check=True)
    assert env.observation_space.shape == (len(env.encoder.names),)
    assert len(set(env.encoder.names)) == len(env.encoder.names)
    assert env.action_masks().dtype == np.bool_


@pytest.mark.parametrize(("encoding", "history"), VARIANTS)
def test_every_observation_lies_in_the_space(kwargs: dict[str, Any], encoding: str, history: int | None) -> None:
    encoder = ObservationEncoder(config_of(kwargs), encoding, history=history)
    encoded = encoder.encode(batched(observations_of(kwargs)))
    assert encoded.dtype == np.float32
    assert np.abs(encoded).max() <= 1.0
    assert np.isfinite(encoded).all()


@pytest.mark.parametrize("autoreset", ["NextStep", "SameStep"])
@pytest.mark.parametrize("num_envs", [1, 7])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_vector_environment_shows_the_same(
    kwargs: dict[str, Any], encoding: str, num_envs: int, autoreset: str
) -> None:
    """Bit for bit, the last observations of episodes included."""
    kwargs["decision_epochs"] = True
    envs = VectorEncodeObservation(
        gym.make_vec(refine_env.ENV_ID, num_envs=num_envs, autoreset_mode=autoreset, **kwargs), encoding
    )
    singles = [EncodeObservation(gym.make(refine_env.ENV_ID, **kwargs), encoding) for _ in range(num_envs)]
    observations, _ = envs.reset(seed=5)
    assert observations.shape == envs.observation_space.shape == (num_envs, *envs.single_observation_space.shape)
    for i, single in enumerate(singles):
        assert np.array_equal(observations[i], single.reset(seed=5 + i)[0])
    rng = np.random.default_rng(1)
    ends, fresh = 0, np.zeros(num_envs, dtype=bool)
    for _ in range(150):
        actions = np.where(rng.random(num_envs) < 0.8, 0, rng.integers(0, 6, num_envs))
        observations, _, terminated, _, infos = envs.step(actions)
        assert np.array_equal(envs.action_masks(), infos["action_mask"].astype(bool))
        for i, single in enumerate(singles):
            if fresh[i]:
                own = single.reset()[0]
            else:
                own, _, over, _, _ = single.step(int(actions[i]))
                assert over == terminated[i]
                if over and autoreset == "SameStep":
                    assert np.array_equal(infos["final_obs"][i], own)
                    own = single.reset()[0]
                    ends += 1
            assert np.array_equal(observations[i], own)
        fresh = terminated.copy() if autoreset == "NextStep" else np.zeros(num_envs, dtype=bool)
        ends += int(fresh.sum())
    assert ends > num_envs


@pytest.mark.parametrize(("encoding", "history"), VARIANTS)
def test_a_row_depends_on_its_own_observation_alone(kwargs: dict[str, Any], encoding: str, history: int | None) -> None:
    observations = observations_of(kwargs, episodes=3)
    encoder = ObservationEncoder(config_of(kwargs), encoding, history=history)
    together = encoder.encode(batched(observations))
    assert np.array_equal(together, [encoder.encode_one(observation) for observation in observations])


def test_the_encoding_does_not_know_the_snr(kwargs: dict[str, Any]) -> None:
    """The same observation under configurations that differ in SNR alone gives the same vector."""
    observations = batched(observations_of(kwargs))
    vectors = [ObservationEncoder(config_of({**kwargs, "snr_db": s})).encode(observations) for s in (0.0, 24.0, [0, 9])]
    assert np.array_equal(vectors[0], vectors[1])
    assert np.array_equal(vectors[0], vectors[2])


def value(encoder: ObservationEncoder, observation: dict[str, Any], name: str) -> float:
    return float(encoder.encode_one(observation)[encoder.names.index(name)])


def log_scale(error: float) -> float:
    return min(max(math.log10(max(error, 1e-8)) / 4 + 1, -1), 1)


def rayleigh_moments(snr_db: float, num_subchannels: int, symbols: float) -> tuple[float, float]:
    """Mean and deviation of a waterfilled slot with its power fixed, by sums over a fine grid of log-gains."""
    x = np.linspace(-40.0, 4.0, 200_001)
    gains = np.exp(x)
    weights = np.exp(x - gains) * (x[1] - x[0])  # e^{-g} dg

    def spent(log_cutoff: float) -> float:
        return float(weights @ np.maximum(np.exp(-log_cutoff) - 1.0 / gains, 0.0))

    log_cutoff = optimize.brentq(lambda c: math.log(spent(c)) - snr_db * math.log(10.0) / 10.0, -30.0, 2.5)
    nats = np.maximum(x - log_cutoff, 0.0)
    steadied = np.where(x > log_cutoff, nats - 1.0 + np.exp(np.minimum(log_cutoff - x, 0.0)), 0.0)
    variance = weights @ steadied**2 - (weights @ steadied) ** 2
    mean = symbols * num_subchannels * float(weights @ nats) / math.log(2.0)
    return mean, symbols * math.sqrt(num_subchannels * variance) / math.log(2.0)


@pytest.mark.parametrize(("slot", "server", "device"), [(30, 22, 35), (55, 0, 10)])
def test_summary_by_hand(kwargs: dict[str, Any], slot: int, server: int, device: int) -> None:
    """Each number of one observation, from its own formula."""
    config = config_of(kwargs)
    encoder = ObservationEncoder(config)
    error = 0.01
    rates = np.zeros(config.deadline, dtype=np.float32)
    seen = np.random.default_rng(0).normal(0.5, 0.03, slot).astype(np.float32)
    rates[-slot:] = seen
    observation = {
        "slot": slot,
        "server_step": server,
        "device_step": device,
        "device_bits": 4,
        "channel_history": rates,
        "remaining_bits": np.zeros(1, dtype=np.float32),
        "device_error": np.array([error], dtype=np.float32),
    }
    mean, left = float(seen.astype(float).mean()), config.deadline - slot + 1
    capacity = seen[-1] + (left - 1) * mean
    moments = [rayleigh_moments(s, 60, config.symbols_per_slot) for s in range(-20, 45, 4)]
    deviation = np.interp(mean * config.latent_dim, *np.transpose(moments)) / config.latent_dim
    spread = deviation * math.sqrt((left - 1) + (left - 1) ** 2 / slot)
    model = config.refinement_model
    residual = plain_rules.residual_variance(model, server, device, error)
    sizes = config.message_bits / config.latent_dim
    expected = {
        "slot": 2 * slot / 61 - 1,
        "server_step": 2 * server / 50 - 1,
        "device_step": 2 * device / 50 - 1,
        "device_bits": 2 * 4 / 16 - 1,
        "remaining_bits": -1.0,
        "device_error": log_scale(error),
        "slots_left": 2 * left / 60 - 1,
        "channel_mean": mean * 60 / 16 / 4 - 1,
        "channel_log_mean": math.log2(mean * 60 / 16) / 4,
        "channel_std": seen.std() / mean * 5,
        "current_rate": (seen[-1] / mean - 1) * 5,
        "capacity_left": capacity / 16 / 4 - 1,
        "log_capacity_left": math.log2(capacity / 16 + 1e-3) / 4,
        "clean_latent_in": (left - server) / 60,
        "latent_distortion_server": log_scale(model.clean[server]),
        "distortion_device": log_scale(plain_rules.distortion(model, device, error)),
        "residual_server": log_scale(residual),
        "residual_clean": log_scale(plain_rules.residual_variance(model, 0, device, error)),
    }
    for k, bits in enumerate(config.bit_depths):
        margin = (capacity - sizes[k]) / spread
        expected[f"slots_needed[{bits}]"] = sizes[k] / mean / 60 - 1
        expected[f"margin[{bits}]"] = min(max(margin / 5, -1), 1)
        expected[f"probability_in_time[{bits}]"] = 2 * special.ndtr(margin) - 1
        unknown = left - min(server, left - 1) if server else left - 1
        clean = max(left - server, 0) * mean if server else capacity
        spread_clean = deviation * math.sqrt(unknown + unknown**2 / slot)
        expected[f"margin_clean[{bits}]"] = min(max((clean - sizes[k]) / spread_clean / 5, -1), 1)
        after = plain_rules.distortion(model, server, residual * base_distortion(bits))
        expected[f"distortion_after[{bits}]"] = log_scale(after)
        for quantile in (0.9, 0.99):
            latency = next(
                n
                for n in range(1, 62)
                if n == 61
                or seen[-1] + (n - 1) * mean
                >= sizes[k] + special.ndtri(quantile) * deviation * math.sqrt(n - 1 + (n - 1) ** 2 / slot)
            )
            expected[f"latency@{quantile}[{bits}]"] = min(2 * latency / 60 - 1, 1)
            expected[f"latency_left_over@{quantile}[{bits}]"] = 2 * (left % latency) / latency - 1
            expected[f"latency_aligned@{quantile}[{bits}]"] = 1.0 if left % latency == 0 else -1.0
    got = dict(zip(encoder.names, encoder.encode_one(observation).tolist(), strict=True))
    assert set(got) == set(expected)
    for name, number in expected.items():
        assert got[name] == pytest.approx(number, abs=2e-5), name


def test_one_hot_and_history(kwargs: dict[str, Any]) -> None:
    observation = observations_of(kwargs, episodes=1)[40]
    config = config_of(kwargs)
    encoder = ObservationEncoder(config, "one-hot", history=3)
    hot = {name for name, number in zip(encoder.names, encoder.encode_one(observation), strict=True) if number == 1.0}
    for key in ("slot", "server_step", "device_step", "device_bits"):
        assert f"{key}={observation[key]}" in hot
        assert sum(name.startswith(f"{key}=") for name in hot) == 1
    shown = [value(encoder, observation, f"rate[{k}]") for k in (-3, -2, -1)]
    assert shown == pytest.approx(2 * observation["channel_history"][-3:] / config.max_bits_per_dimension - 1)


@check_wrapped
def test_a_shorter_channel_history(kwargs: dict[str, Any]) -> None:
    env = EncodeObservation(gym.make(refine_env.ENV_ID, history_length=7, **kwargs), "normalized")
    assert env.observation_space.shape == (6 + 7,)
    check_env(env, skip_render_check=True)


def test_an_encoder_is_made_again_from_its_description(kwargs: dict[str, Any]) -> None:
    observations = batched(observations_of(kwargs, episodes=2))
    for encoding, history in VARIANTS:
        encoder = ObservationEncoder(config_of(kwargs), encoding, history=history)
        again = ObservationEncoder(config_of(kwargs), **json.loads(json.dumps(encoder.to_dict())))
        assert np.array_equal(again.encode(observations), encoder.encode(observations))


def test_errors(kwargs: dict[str, Any]) -> None:
    config = config_of(kwargs)
    with pytest.raises(ConfigurationError, match=r"`encoding` must be one of 'summary', 'normalized', 'one-hot', got"):
        ObservationEncoder(config, "x")
    with pytest.raises(ConfigurationError, match=r"`history` must be an integer in 0 … 60, got 61"):
        ObservationEncoder(config, history=61)
    observation = observations_of({**kwargs, "history_length": 5}, episodes=1)[0]
    with pytest.raises(ConfigurationError, match=r"`channel_history` must have length 60 for this encoder, got 5"):
        ObservationEncoder(config).encode_one(observation)


def test_the_wrapped_environment_s_spec_makes_it_again(kwargs: dict[str, Any]) -> None:
    env = EncodeObservation(gym.make(refine_env.ENV_ID, **kwargs), "normalized", history=4)
    again: Any = gym.make(env.spec)
    assert np.array_equal(again.reset(seed=3)[0], env.reset(seed=3)[0])


def a_single(kwargs: dict[str, Any]) -> Any:
    return gym.make(refine_env.ENV_ID, **kwargs)


def a_vector(kwargs: dict[str, Any], **options: Any) -> Any:
    return gym.make_vec(refine_env.ENV_ID, num_envs=2, **options, **kwargs)


DICTIONARY = r"`env` must show the environment's own dictionary, got the observation Box"
OF_THIS_PACKAGE = "`env` must be an environment of this package, wrapped or not, got "


@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (lambda k: EncodeObservation(gym.wrappers.FlattenObservation(a_single(k))), DICTIONARY),
        (lambda k: EncodeObservation(EncodeObservation(a_single(k), "one-hot")), DICTIONARY),
        (lambda k: VectorEncodeObservation(VectorEncodeObservation(a_vector(k))), DICTIONARY),
        (lambda k: VectorEncodeObservation(gym.wrappers.vector.FlattenObservation(a_vector(k))), DICTIONARY),
        (lambda k: EncodeObservation(a_vector(k)), "`env` must be a single environment, got LatentRefinementVectorEnv"),
        (lambda k: VectorEncodeObservation(a_single(k)), "`env` must be a vector environment, got <OrderEnforcing"),
        (lambda k: VectorEncodeObservation(a_vector(k, vectorization_mode="sync")), OF_THIS_PACKAGE + "SyncVectorEnv"),
        (lambda k: EncodeObservation(gym.make("CartPole-v1")), OF_THIS_PACKAGE + ".*CartPole"),
    ],
)
def test_what_cannot_be_encoded(kwargs: dict[str, Any], wrap: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        wrap(kwargs)


def test_what_leaves_the_dictionary_may_be_inside(kwargs: dict[str, Any]) -> None:
    env = EncodeObservation(gym.wrappers.RecordEpisodeStatistics(a_single(kwargs)))
    assert env.reset(seed=0)[0] in env.observation_space
    envs = VectorEncodeObservation(gym.wrappers.vector.RecordEpisodeStatistics(a_vector(kwargs)))
    assert envs.reset(seed=0)[0] in envs.observation_space


# --- Masks in the observation, arrays in the info ---------------------------------------------------


@pytest.mark.parametrize("encoded", [False, True])
@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_the_mask_is_in_the_observation(kwargs: dict[str, Any], mode: str, encoded: bool) -> None:
    """Of the single and of the vector environment, the last observation of an episode included."""
    single: Any = a_single(kwargs)
    vector: Any = a_vector(kwargs, autoreset_mode=mode)
    if encoded:
        single, vector = EncodeObservation(single), VectorEncodeObservation(vector)
    single = MaskedObservation(single, "obs", "mask")
    vector = VectorMaskedObservation(vector, "obs", "mask")
    assert vector.autoreset_mode.value == mode
    assert vector.single_observation_space == single.observation_space
    observations, infos = vector.reset(seed=[4, 5])
    observation, info = single.reset(seed=4)
    terminated = False
    while not terminated:
        assert observation in single.observation_space
        assert observations in vector.observation_space
        assert np.array_equal(observation["mask"], info["action_mask"])
        assert np.array_equal(observation["mask"] == 1, single.action_masks())
        assert np.array_equal(observations["mask"], infos["action_mask"])
        assert np.array_equal(observations["mask"][0], observation["mask"])
        action = int(np.flatnonzero(info["action_mask"])[-1])
        observation, _, terminated, _, info = single.step(action)
        observations, _, ended, _, infos = vector.step(np.array([action, 0]))
    assert ended[0]
    last = infos["final_obs"][0] if mode == "SameStep" else {"mask": observations["mask"][0]}
    assert np.array_equal(last["mask"], observation["mask"])
    if mode == "Disabled":  # who is not reset keeps its mask, though infos are empty there
        mask = vector.action_masks()[1]
        observations, infos = vector.reset(options={"reset_mask": np.array([True, False])})
        assert np.array_equal(observations["mask"][1] == 1, mask)


def test_info_of_arrays_alone(kwargs: dict[str, Any]) -> None:
    plain, arrays = a_single(kwargs), ArrayInfo(a_single(kwargs))
    for (_, told), (_, expected) in [(arrays.reset(seed=1), plain.reset(seed=1))]:
        assert all(isinstance(value, np.ndarray) for value in told.values())
        assert {key: value.tolist() for key, value in told.items()} == {
            key: np.asarray(value).tolist() for key, value in expected.items()
        }
    _, _, _, _, told = arrays.step(0)
    assert told["illegal_action"].dtype == np.bool_
    assert told["latent_mse"].dtype == np.float64
