"""The adapter for Stable-Baselines3 against its own DummyVecEnv, episode by episode."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import refine_env
from refine_env import ConfigurationError
from refine_env.wrappers import EncodeObservation, VectorEncodeObservation

pytest.importorskip("stable_baselines3", reason="the train extra is not installed")
sb3_contrib = pytest.importorskip("sb3_contrib", reason="the train extra is not installed")

import torch  # noqa: E402
from stable_baselines3 import DQN, PPO  # noqa: E402
from stable_baselines3.common.evaluation import evaluate_policy  # noqa: E402
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize  # noqa: E402

from refine_env.sb3 import RefinementVecEnv, evaluate_sb3, make_vec_env  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture
def kwargs(gaussian_cache: Path) -> dict[str, Any]:
    return {"cache": str(gaussian_cache), "snr_db": [0, 24], "coder": "closed_loop", "reward": "improvement"}


def dummy(num_envs: int, kwargs: dict[str, Any], encoding: str | None) -> DummyVecEnv:
    def make() -> gym.Env[Any, Any]:
        env = gym.make(refine_env.ENV_ID, **kwargs)
        return env if encoding is None else EncodeObservation(env, encoding)

    return DummyVecEnv([make] * num_envs)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return set(a) == set(b) and all(same(a[key], b[key]) for key in a)
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype.kind == b.dtype.kind and np.array_equal(a, b)


@pytest.mark.parametrize("decision_epochs", [False, True])
@pytest.mark.parametrize("encoding", [None, "summary"])
@pytest.mark.parametrize("num_envs", [1, 5])
def test_it_is_dummy_vec_env(
    kwargs: dict[str, Any], num_envs: int, encoding: str | None, decision_epochs: bool
) -> None:
    """Same seeds: same observations, rewards, dones, masks and infos, over several episodes of every environment."""
    kwargs["decision_epochs"] = decision_epochs
    native = make_vec_env(num_envs, kwargs, encoding=encoding, infos="all")
    terse = make_vec_env(num_envs, kwargs, encoding=encoding)
    theirs = dummy(num_envs, kwargs, encoding)
    assert native.observation_space == theirs.observation_space
    assert native.action_space == theirs.action_space
    for envs in (native, terse, theirs):
        envs.seed(11)
    start, brief, expected = native.reset(), terse.reset(), theirs.reset()
    assert same(start, expected)
    assert same(brief, expected)
    if encoding is None:
        assert all(start[key].dtype == expected[key].dtype for key in start)
    for own, other in zip(native.reset_infos, theirs.reset_infos, strict=True):
        assert same(own, other)
    rng = np.random.default_rng(0)
    returns, lengths, ends = np.zeros(num_envs), np.zeros(num_envs, dtype=int), 0
    for _ in range(200):
        masks = np.stack(theirs.env_method("action_masks"))
        assert np.array_equal(native.action_masks(), masks)
        assert np.array_equal(np.stack(native.env_method("action_masks")), masks)
        actions = np.where(rng.random(num_envs) < 0.7, 0, rng.integers(0, 6, num_envs))
        observations, rewards, dones, infos = native.step(actions)
        brief = terse.step(actions)
        expected = theirs.step(actions)
        assert same(observations, expected[0])
        assert same(brief[0], expected[0])
        assert rewards.dtype == expected[1].dtype == np.float32
        assert np.array_equal(rewards, expected[1])
        assert np.array_equal(dones, expected[2])
        returns, lengths = returns + rewards, lengths + 1
        for i, (own, other) in enumerate(zip(infos, expected[3], strict=True)):
            episode = own.pop("episode", None)
            assert same(own, other)
            if dones[i]:
                assert episode["r"] == pytest.approx(returns[i])
                assert episode["l"] == lengths[i]
                assert same({k: v for k, v in brief[3][i].items() if k != "episode"}, own)
                assert brief[3][i]["episode"] == episode
                returns[i], lengths[i], ends = 0.0, 0, ends + 1
            else:
                assert episode is None
                assert brief[3][i] == {}
    assert ends >= 3 * num_envs


def test_replayed_options(kwargs: dict[str, Any]) -> None:
    native, theirs = make_vec_env(3, kwargs, encoding=None), dummy(3, kwargs, None)
    rates = np.linspace(100.0, 200.0, 60)
    for envs in (native, theirs):
        envs.seed(0)
        envs.set_options([{"trajectory": i, "rates": rates * (i + 1)} for i in range(3)])
    assert same(native.reset(), theirs.reset())
    assert same(native.step(np.zeros(3, dtype=int))[0], theirs.step(np.zeros(3, dtype=int))[0])
    assert same(native.reset(), theirs.reset())  # only once
    native.set_options([{"trajectory": 1}, {}, {}])
    with pytest.raises(ConfigurationError, match=r"`options` must have the same keys in every environment, got"):
        native.reset()


def test_a_reset_one_step_late_is_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"`envs` must have autoreset_mode 'SameStep', got .*NEXT_STEP"):
        RefinementVecEnv(gym.make_vec(refine_env.ENV_ID, num_envs=2, **kwargs))
    with pytest.raises(ConfigurationError, match=r"`infos` must be one of episode, all, got 'x'"):
        make_vec_env(2, kwargs, infos="x")


def test_attributes_and_methods(kwargs: dict[str, Any]) -> None:
    envs = make_vec_env(3, kwargs)
    assert envs.get_attr("config") == [envs.envs.unwrapped.config] * 3
    assert envs.has_attr("action_masks")
    assert not envs.has_attr("no_such")
    envs.reset()
    assert len(envs.env_method("action_masks", indices=[0, 2])) == 2
    with pytest.raises(NotImplementedError, match="no attributes of their own to set"):
        envs.set_attr("config", None)
    with pytest.raises(AttributeError, match=r"`close` must give one value per environment, got \(\)"):
        envs.env_method("close")


def test_it_pickles_mid_episode(kwargs: dict[str, Any]) -> None:
    envs = make_vec_env(3, kwargs)
    envs.seed(1)
    envs.reset()
    envs.step(np.array([0, 1, 2]))
    again = pickle.loads(pickle.dumps(envs))
    for _ in range(80):
        a, b = envs.step(np.array([0, 1, 2])), again.step(np.array([0, 1, 2]))
        assert np.array_equal(a[0], b[0])
        assert np.array_equal(a[1], b[1])


@pytest.mark.parametrize("encoding", [None, "summary"])
@pytest.mark.parametrize("kind", [PPO, sb3_contrib.MaskablePPO, DQN])
def test_the_algorithms_learn_on_it(kwargs: dict[str, Any], kind: Any, encoding: str | None) -> None:
    if kind is sb3_contrib.MaskablePPO:
        kwargs["illegal_action"] = "raise"  # an illegal action would end the test
    envs = make_vec_env(4, kwargs, encoding=encoding)
    options = {"buffer_size": 500, "learning_starts": 50} if kind is DQN else {"n_steps": 32, "n_epochs": 1}
    policy = "MultiInputPolicy" if encoding is None else "MlpPolicy"
    model = kind(policy, envs, batch_size=32, seed=0, device="cpu", **options).learn(300)
    assert len(model.ep_info_buffer) >= 4
    if kind is PPO:
        mean, _ = evaluate_policy(model, envs, n_eval_episodes=4)
        assert mean == pytest.approx(mean)


def test_the_same_weights_as_on_dummy_vec_env(kwargs: dict[str, Any]) -> None:
    """What is learned does not know which of the two it was learned on."""
    weights = []
    for envs in (make_vec_env(4, kwargs), dummy(4, kwargs, "summary")):
        model = sb3_contrib.MaskablePPO("MlpPolicy", envs, n_steps=64, batch_size=64, seed=3, device="cpu").learn(512)
        weights.append(model.policy.state_dict())
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize("encoding", [None, "summary"])
def test_without_the_adapter_the_message_names_it(kwargs: dict[str, Any], encoding: str | None) -> None:
    envs: Any = gym.make_vec(refine_env.ENV_ID, num_envs=2, **kwargs)
    policy = "MultiInputPolicy"
    if encoding is not None:
        envs, policy = VectorEncodeObservation(envs, encoding), "MlpPolicy"
    with pytest.raises(ValueError, match=r"a vector environment: put refine_env.sb3.RefinementVecEnv around it"):
        PPO(policy, envs)


# --- Evaluation of a trained model ------------------------------------------------------------------


def trained(kind: Any, envs: Any, policy: str = "MlpPolicy") -> Any:
    options: dict[str, Any] = {} if kind is DQN else {"n_steps": 32, "n_epochs": 1, "batch_size": 32}
    return kind(policy, envs, seed=0, device="cpu", **options).learn(64)


def single_envs(kwargs: dict[str, Any], kind: Any) -> tuple[Any, str]:
    """SB3's own vector environment over single environments of this package, by kind of observation."""
    make = {
        "learning": lambda: gym.make(refine_env.LEARNING_ID, cache=kwargs["cache"]),
        "encoded": lambda: EncodeObservation(gym.make(refine_env.ENV_ID, **kwargs), "one-hot"),
        "dictionary": lambda: gym.make(refine_env.ENV_ID, **kwargs),
    }[kind]
    return DummyVecEnv([make]), "MultiInputPolicy" if kind == "dictionary" else "MlpPolicy"


@pytest.mark.parametrize("kind", [PPO, sb3_contrib.MaskablePPO, DQN])
@pytest.mark.parametrize("observed", ["learning", "encoded", "dictionary"])
def test_a_model_scores_what_its_own_loop_scores(kwargs: dict[str, Any], kind: Any, observed: str) -> None:
    """The paired evaluation plays the episodes that a loop over the single environment plays with the same seeds."""
    kwargs["snr_db"] = 6.0
    envs, policy = single_envs(kwargs, observed)
    model = trained(kind, envs, policy)
    table = evaluate_sb3(model, episodes=4, seed=9, split="test")
    env = single_envs({**kwargs, "split": "test"}, observed)[0].envs[0]
    if observed == "learning":
        env = gym.make(refine_env.LEARNING_ID, cache=kwargs["cache"], split="test")
    for row in table:
        observation, info = env.reset(seed=row["seed"])
        terminated = False
        while not terminated:
            masks = {"action_masks": info["action_mask"] == 1} if kind is sb3_contrib.MaskablePPO else {}
            action, _ = model.predict(observation, deterministic=True, **masks)
            observation, _, terminated, _, info = env.step(int(action))
        assert row["latent_mse"] == info["latent_mse"]
        assert row["num_deliveries"] == info["num_deliveries"]


def test_the_adapter_and_normalized_observations_are_found(kwargs: dict[str, Any]) -> None:
    kwargs["snr_db"] = 6.0
    model = trained(PPO, VecNormalize(make_vec_env(2, kwargs)))
    (row,) = evaluate_sb3(model, episodes=1)
    assert row["snr_db"] == 6.0
    assert row["coder"] == "closed_loop"
    native = trained(
        sb3_contrib.MaskablePPO, make_vec_env(2, {"cache": kwargs["cache"]}, env_id=refine_env.LEARNING_ID)
    )
    (row,) = evaluate_sb3(native, episodes=1, snr_db=12.0)
    assert row["snr_db"] == 12.0


def test_what_cannot_be_evaluated_is_said(kwargs: dict[str, Any]) -> None:
    model = trained(PPO, make_vec_env(2, kwargs))
    with pytest.raises(ConfigurationError, match=r"`snr_db` must be one number for an evaluation, got the range \[0"):
        evaluate_sb3(model, episodes=1)
    with pytest.raises(ConfigurationError, match="the one that sb3 was trained for, got another deadline"):
        evaluate_sb3(model, episodes=1, snr_db=6.0, deadline=50)
    other = PPO("MlpPolicy", gym.make("CartPole-v1"), device="cpu")
    with pytest.raises(ConfigurationError, match="`env` must be the environment of this package that the policy"):
        evaluate_sb3(other, episodes=1)
    with pytest.raises(ConfigurationError, match="`model` must see the environment's dictionary, or what Encode"):
        evaluate_sb3(other, make_vec_env(2, kwargs), episodes=1)
