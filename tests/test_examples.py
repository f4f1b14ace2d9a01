"""The examples run, mask actions, and learn."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

import refine_env
from refine_env.learning import LearnedPolicy, evaluate

EXAMPLES = Path(__file__).parents[1] / "examples"
NEEDS = {
    "sb3_maskable_ppo": "sb3_contrib",
    "cleanrl_ppo": "torch",
    "torchrl_ppo": "torchrl",
    "tianshou_ppo": "tianshou",
    "rllib_ppo": "ray.rllib",
}
IN_THE_TEST_EXTRA = {"sb3_maskable_ppo", "cleanrl_ppo"}


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(NEEDS)


@pytest.mark.parametrize(
    "name", [name if name in IN_THE_TEST_EXTRA else pytest.param(name, marks=pytest.mark.libraries) for name in NEEDS]
)
@pytest.mark.filterwarnings("ignore")  # of the libraries
def test_it_learns_what_waiting_for_the_end_does_not_score(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """After a fraction of the example's steps, at 6 dB, below random legal actions; no action is ever illegal."""
    pytest.importorskip(NEEDS[name], reason=f"{NEEDS[name]} is not installed")
    monkeypatch.setenv("HOME", str(tmp_path))  # where Ray writes a token
    made = gym.make

    def strict(env_id: str, **kwargs: Any) -> Any:
        return made(env_id, illegal_action="raise", **kwargs)

    monkeypatch.setattr(gym, "make", strict)
    found = load(name).main(steps=16_384, snr_db=6.0, seed=0, episodes=100)
    env = made(refine_env.LEARNING_ID)
    env.action_space.seed(0)
    at_random = LearnedPolicy(lambda shown, masks: [env.action_space.sample(mask.astype("i1")) for mask in masks], env)
    scores = [row["latent_mse"] for row in evaluate(at_random, episodes=100)]
    assert found < 0.5 * sum(scores) / len(scores)
