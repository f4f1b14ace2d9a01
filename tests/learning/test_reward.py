"""The relative reward, and the misses that are averaged out of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import refine_env
from refine_env import ActionError, ConfigurationError, SystemConfig
from refine_env.learning.deadline_miss import MissProbability
from refine_env.learning.reward import FLOOR, RelativeReward, VectorRelativeReward
from refine_env.wrappers import EncodeObservation


def make(cache: Path, num_envs: int, **kwargs: Any) -> Any:
    return gym.make_vec(refine_env.ENV_ID, num_envs=num_envs, cache=str(cache), autoreset_mode="SameStep", **kwargs)


# --- How likely a message is late ------------------------------------------------------------------


@pytest.mark.parametrize("snr_db", [0.0, 1.3, 4.5, 6.0, 10.4, 11.9])
def test_probabilities_of_misses_are_those_of_the_exact_law(snr_db: float) -> None:
    config = SystemConfig(snr_db=(0.0, 12.0))
    law = replace(config, snr_db=snr_db).rate_law
    miss = MissProbability(config)
    for slots in (1, 2, 7, 30):
        bits = slots * law.mean + np.sqrt(slots) * law.std * np.linspace(-4.0, 5.0, 40)
        bits = bits[bits > 0.0]
        exact = law.sum_below(slots, bits)
        found = miss(np.full(bits.size, snr_db), np.full(bits.size, slots), bits)
        assert found == pytest.approx(exact, rel=0.04, abs=2e-6)


def test_probabilities_at_one_snr() -> None:
    config = SystemConfig(snr_db=6.0)
    law = config.rate_law
    bits = np.array([2.8, 4.9]) * law.mean
    found = MissProbability(config)(np.full(2, 6.0), np.array([3, 5]), bits)
    exact = [float(law.sum_below(slots, amount)) for slots, amount in zip((3, 5), bits, strict=True)]
    assert min(exact) > 0.01
    assert found == pytest.approx(exact, rel=1e-2)


def test_probabilities_where_nothing_is_left_to_chance() -> None:
    miss = MissProbability(SystemConfig(snr_db=(0.0, 12.0)))
    slots = np.array([0, 0, 0, 3, 3, 1, 1])
    bits = np.array([-1.0, 0.0, 1e-9, -5.0, 0.0, 1e9, 1e-9])
    assert miss(np.full(7, 6.0), slots, bits).tolist() == [0.0, 0.0, 1.0, 0.0, 0.0, 1.0, 0.0]


def test_probabilities_want_independent_slots() -> None:
    config = SystemConfig(snr_db=6.0)
    link = replace(config.link, correlation="gauss-markov", correlation_coefficient=0.9)
    with pytest.raises(ConfigurationError, match=r"`link` must have independent slots .* Pay for misses as they come"):
        MissProbability(replace(config, link=link))


# --- The reward ------------------------------------------------------------------------------------


def play(envs: Any, actions: Any, steps: int) -> tuple[list[float], list[float], list[bool], list[float]]:
    """Returns, latent MSEs, whether the last message missed, and SNRs, of the episodes that ended."""
    observations, infos = envs.reset(seed=11)
    returns = np.zeros(envs.num_envs)
    told: tuple[list[float], list[float], list[bool], list[float]] = ([], [], [], [])
    for _ in range(steps):
        snrs_db = envs.unwrapped.episode_snrs_db
        observations, rewards, terminated, _, infos = envs.step(actions(observations, infos))
        returns += rewards
        for i in np.flatnonzero(terminated):
            told[0].append(float(returns[i]))
            told[1].append(float(infos["final_info"]["latent_mse"][i]))
            told[2].append(bool(infos["final_obs"][i]["remaining_bits"][0] > 0.0))
            told[3].append(float(snrs_db[i]))
            returns[i] = 0.0
    return told


def wait(observations: Any, infos: Any) -> np.ndarray:
    return np.zeros(len(observations["slot"]), dtype=np.int64)


def greedy(observations: Any, infos: Any) -> np.ndarray:
    """4 bits per dimension whenever that is legal: the last message is often late."""
    return np.where(infos["action_mask"][:, 2] == 1, 2, 0)


def test_the_reward_is_relative_to_the_running_mean_at_the_snr(gaussian_cache: Path) -> None:
    envs = VectorRelativeReward(make(gaussian_cache, 1, snr_db=6.0), cap=3.0, power=0.5, expected_misses=False)
    sums = weights = 0.0
    returns, errors, _, _ = play(envs, wait, 600)
    assert len(returns) == 10
    for paid, mse in zip(returns, errors, strict=True):
        ratio = min((mse + FLOOR) / (sums / weights + FLOOR), 3.0) if weights else mse + FLOOR
        assert paid == pytest.approx(-(ratio**0.5) / 0.5)
        sums, weights = sums * (1.0 - 1.0 / envs.cost.memory) + mse, weights * (1.0 - 1.0 / envs.cost.memory) + 1.0


def test_the_reward_is_capped_and_forgets(gaussian_cache: Path) -> None:
    envs = VectorRelativeReward(make(gaussian_cache, 1, snr_db=6.0), cap=3.0, memory=10, expected_misses=False)
    envs.cost.sums[:], envs.cost.weights[:] = 1e-9, 1.0
    returns, errors, _, _ = play(envs, wait, 60)
    assert -3.0 <= returns[0] < -1.0
    play(envs, wait, 60 * 200)
    assert envs.cost.means[0] == pytest.approx(np.mean(errors), rel=0.5)


def test_the_floor_forgives_what_is_too_small_to_count(gaussian_cache: Path) -> None:
    envs = VectorRelativeReward(make(gaussian_cache, 1, snr_db=[0, 24]), expected_misses=False)
    envs.cost.sums[:], envs.cost.weights[:] = 0.0, 1.0
    assert envs.cost._cost(np.array([0.0, FLOOR]), np.array([6.2, 6.2])) == pytest.approx([1.0, 2.0])


def test_other_snrs_have_other_means(gaussian_cache: Path) -> None:
    envs = VectorRelativeReward(make(gaussian_cache, 16, snr_db=[0, 12]), expected_misses=False)
    returns, _, _, snrs_db = play(envs, greedy, 600)
    means = envs.cost.means
    assert np.nanmean(means[:4]) > 10.0 * np.nanmean(means[-8:])
    assert np.mean(np.array(returns)[np.array(snrs_db) > 9.0]) == pytest.approx(-1.0, abs=0.7)


@pytest.mark.parametrize(("decision_epochs", "power", "cap"), [(True, 1.0, 1e9), (False, 1.0, 1e9), (True, 0.5, 10.0)])
def test_expected_misses_change_no_expectation(
    gaussian_cache: Path, decision_epochs: bool, power: float, cap: float
) -> None:
    """With the means held fixed, the mean return is the same, misses pay nothing at the end, and the spread is less."""
    told = {}
    for expected in (False, True):
        inner = make(gaussian_cache, 64, snr_db=[4, 8], split="all", decision_epochs=decision_epochs)
        envs = VectorRelativeReward(inner, cap=cap, power=power, memory=10**15, expected_misses=expected)
        envs.cost.sums[:], envs.cost.weights[:] = 0.05e9, 1e9
        told[expected] = play(envs, greedy, 200 if decision_epochs else 1000)
    (plain, errors, missed, _), (expected_returns, same_errors, _, _) = told[False], told[True]
    assert errors == same_errors
    missed_share = np.mean(missed)
    assert 0.05 < missed_share < 0.95
    ratios = np.minimum((np.array(errors) + FLOOR) / (0.05 + FLOOR), cap)
    assert plain == pytest.approx(-(ratios**power) / power, rel=1e-5)
    difference = np.array(expected_returns) - np.array(plain)
    assert abs(difference.mean()) < 4.0 * difference.std() / np.sqrt(len(difference))
    assert np.abs(difference).max() > 0.0
    assert np.std(expected_returns) < np.std(plain)


def test_the_mean_holds_what_misses_cost(gaussian_cache: Path) -> None:
    """Averaged out or as they come: the running mean is the mean latent MSE."""
    envs = VectorRelativeReward(make(gaussian_cache, 64, snr_db=6.0, split="all", decision_epochs=True), memory=10**9)
    _, errors, missed, _ = play(envs, greedy, 200)
    assert 0.05 < np.mean(missed) < 0.95
    assert np.mean(np.where(missed, 0.0, errors)) < 0.5 * np.mean(errors)
    assert envs.cost.means[0] == pytest.approx(np.mean(errors), abs=4.0 * np.std(errors) / np.sqrt(len(errors)))


@pytest.mark.parametrize("expected_misses", [True, False])
def test_no_error_at_all_is_not_taken_for_a_miss(gaussian_cache: Path, expected_misses: bool) -> None:
    """The clean latent, delivered with 16 bits, costs the floor."""
    inner = make(gaussian_cache, 8, snr_db=40.0, split="all", bit_depths=[16])
    envs = VectorRelativeReward(inner, memory=10**15, expected_misses=expected_misses)
    envs.cost.sums[:], envs.cost.weights[:] = FLOOR * 1e9, 1e9
    returns, errors, missed, _ = play(envs, lambda o, i: (o["server_step"] == 0) * i["action_mask"][:, 1], 60)
    assert errors == [0.0] * 8
    assert not any(missed)
    assert returns == pytest.approx([-0.5] * 8)


def test_a_prompt_that_does_not_arrive_is_paid_for(gaussian_cache: Path) -> None:
    envs = VectorRelativeReward(make(gaussian_cache, 1, snr_db=0.0, link={"uplink_bits": 1e9}), memory=10**15)
    envs.cost.sums[:], envs.cost.weights[:] = 1e9, 1e9
    returns, errors, _, _ = play(envs, wait, 60)
    assert returns == pytest.approx([-errors[0]], rel=1e-3)


def test_episodes_that_a_partial_reset_leaves_alone_pay_on(gaussian_cache: Path) -> None:
    mask = np.array([True, False])
    for partly in (False, True):
        envs = VectorRelativeReward(make(gaussian_cache, 2, snr_db=-10.0, decision_epochs=True), memory=10**15)
        envs.cost.sums[:], envs.cost.weights[:] = 1e9, 1e9
        envs.reset(seed=3)
        if partly:
            envs.reset(options={"reset_mask": mask})
        _, rewards, _, _, _ = envs.step(np.array([0, 5]))
        assert rewards[1] < -0.5  # 16 bits do not get through at -10 dB, and that is paid for now


def paid(envs: gym.vector.VectorEnv[Any, Any, Any], steps: int) -> list[float]:
    """What the first environment of some is paid for 4 bits whenever that is legal."""
    observations, infos = envs.reset(seed=5)
    rewards = []
    for _ in range(steps):
        observations, reward, _, _, infos = envs.step(greedy(observations, infos))
        rewards.append(float(reward[0]))
    return rewards


@pytest.mark.parametrize("decision_epochs", [False, True])
def test_the_single_environment_is_paid_as_the_vector_environment(gaussian_cache: Path, decision_epochs: bool) -> None:
    """In both autoreset modes, over several episodes, bit for bit; NextStep spends a step on every reset."""
    kwargs = {
        "snr_db": [2, 8],
        "cache": str(gaussian_cache),
        "coder": "closed_loop",
        "decision_epochs": decision_epochs,
    }
    env = RelativeReward(gym.make(refine_env.ENV_ID, **kwargs), cap=3.0, power=0.5)
    _, info = env.reset(seed=5)
    single, late = [], []
    for _ in range(300):
        action = 2 if info["action_mask"][2] else 0
        _, reward, terminated, _, info = env.step(action)
        assert isinstance(reward, float)
        single.append(reward)
        late.append(reward)
        if terminated:
            _, info = env.reset()
            late.append(0.0)
    assert len(set(single)) > 5
    options = {"cap": 3.0, "power": 0.5}
    same = VectorRelativeReward(gym.make_vec(refine_env.ENV_ID, 1, autoreset_mode="SameStep", **kwargs), **options)
    assert paid(same, 300) == single
    following = VectorRelativeReward(gym.make_vec(refine_env.ENV_ID, 1, **kwargs), **options)
    assert paid(following, 300) == late[:300]


def test_an_action_outside_the_space_is_the_environments_own_error(gaussian_cache: Path) -> None:
    env = RelativeReward(gym.make(refine_env.ENV_ID, cache=str(gaussian_cache), disable_env_checker=True))
    env.reset(seed=0)
    with pytest.raises(ActionError, match="`action` must be in 0 … 5, got 9"):
        env.step(9)
    envs = VectorRelativeReward(gym.make_vec(refine_env.ENV_ID, 2, cache=str(gaussian_cache)))
    envs.reset(seed=0)
    with pytest.raises(ActionError, match="`actions` must be in 0 … 5, got 9"):
        envs.step(np.array([0, 9]))


def test_each_wrapper_names_the_other(gaussian_cache: Path) -> None:
    single = gym.make(refine_env.ENV_ID, cache=str(gaussian_cache))
    vector = gym.make_vec(refine_env.ENV_ID, 2, cache=str(gaussian_cache))
    with pytest.raises(ConfigurationError, match=r"must be a single environment, .* Use VectorRelativeReward for"):
        RelativeReward(vector)
    with pytest.raises(ConfigurationError, match=r"must be a vector environment, .* Use RelativeReward for"):
        VectorRelativeReward(single)
    with pytest.raises(ConfigurationError, match=r"`env` must show the environment's own dictionary, got"):
        RelativeReward(EncodeObservation(single))


def test_the_wrapper_is_recorded_in_the_spec(gaussian_cache: Path) -> None:
    env = RelativeReward(gym.make(refine_env.ENV_ID, cache=str(gaussian_cache)), cap=7.0)
    again = gym.make(env.spec)
    assert again.get_wrapper_attr("cost").cap == 7.0
