"""Learned policies: what is read, what is refused, and what they do not know. Needs nothing of the train extra."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import agents
import refine_env
from agents.policies.learned import FORMAT, SHIPPED, Learned, read_policy
from refine_env import ConfigurationError, SystemConfig
from refine_env.evaluation import roll_out
from refine_env.wrappers import ObservationEncoder

ROOT = Path(__file__).parents[3]


@pytest.fixture
def kwargs(gaussian_cache: Path) -> dict[str, Any]:
    return {"cache": str(gaussian_cache), "coder": "closed_loop", "split": "all"}


def system(kwargs: dict[str, Any], **changes: Any) -> SystemConfig:
    config: SystemConfig = gym.make(refine_env.ENV_ID, **{**kwargs, **changes}).unwrapped.config
    return config


@pytest.fixture
def folder(kwargs: dict[str, Any], tmp_path: Path) -> Path:
    """A random network of two layers."""
    config = system(kwargs, snr_db=[0, 24])
    encoder = ObservationEncoder(config)
    rng = np.random.default_rng(0)
    sizes = [len(encoder.names), 16, config.num_actions]
    arrays: dict[str, Any] = {}
    for k in range(2):
        arrays[f"{k}.weight"] = rng.normal(0, 0.3, (sizes[k + 1], sizes[k])).astype(np.float32)
        arrays[f"{k}.bias"] = rng.normal(0, 0.3, sizes[k + 1]).astype(np.float32)
    description = {
        "format": FORMAT,
        "activation": "tanh",
        "encoder": encoder.to_dict(),
        "env_kwargs": {"coder": "closed_loop", "payload": "latent"},
        "system": config.to_dict(),
    }
    (tmp_path / "policy.json").write_text(json.dumps(description))
    put_weights(tmp_path, arrays)
    return tmp_path


def put_weights(folder: Path, arrays: dict[str, Any]) -> None:
    """Other weights, with their hash."""
    save_file(arrays, folder / "policy.safetensors")
    change(folder, weights_sha256=hashlib.sha256((folder / "policy.safetensors").read_bytes()).hexdigest())


def change(folder: Path, **values: Any) -> None:
    path = folder / "policy.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_it_takes_part_in_an_evaluation(folder: Path, kwargs: dict[str, Any]) -> None:
    """At single SNRs, in batches and alone, with the network's most likely legal action."""
    name = f"learned:{folder}"
    assert agents.env_kwargs(name) == {"coder": "closed_loop", "payload": "latent"}
    for snr_db in (0.0, 24.0, 30.0):
        table = roll_out(lambda config: agents.make(name, config), env_kwargs={**kwargs, "snr_db": snr_db}, episodes=5)
        assert {row["agent"] for row in table} == {name}
        assert all(np.isfinite(row["latent_mse"]) for row in table)

    env = gym.make(refine_env.ENV_ID, snr_db=6.0, **kwargs)
    agent: Any = agents.make(name, env.unwrapped.config)
    observation, info = env.reset(seed=0)
    terminated, sent = False, 0
    while not terminated:
        action = agent.select_action(observation, info)
        weight, bias = agent.layers[0]
        hidden = np.tanh(agent.encoder.encode_one(observation) @ weight.T + bias)
        wanted = int((hidden @ agent.layers[1][0].T + agent.layers[1][1]).argmax())
        assert action == (wanted if info["action_mask"][1] else 0)
        sent += action > 0
        observation, _, terminated, _, info = env.step(action)
    assert sent > 0


def test_it_is_not_told_the_snr(folder: Path, kwargs: dict[str, Any]) -> None:
    """Replayed on the same channel, it does the same whatever SNR the configuration names."""
    rates = np.random.default_rng(1).normal(0.5, 0.03, 60) * 256
    actions = []
    for snr_db in (0.0, 24.0):
        env = gym.make(refine_env.ENV_ID, snr_db=snr_db, **kwargs)
        agent = agents.make(f"learned:{folder}", env.unwrapped.config)
        observation, info = env.reset(seed=0, options={"rates": rates, "trajectory": 0})
        own, terminated = [], False
        while not terminated:
            own.append(agent.select_action(observation, info))
            observation, _, terminated, _, info = env.step(own[-1])
        actions.append(own)
    assert actions[0] == actions[1]
    assert any(actions[0])


def test_neither_torch_nor_stable_baselines_is_needed(folder: Path, kwargs: dict[str, Any]) -> None:
    code = (
        "import sys, gymnasium, refine_env, agents\n"
        f"env = gymnasium.make(refine_env.ENV_ID, snr_db=6.0, **{kwargs!r})\n"
        f"agent = agents.make({f'learned:{folder}'!r}, env.unwrapped.config)\n"
        "action = agent.select_action(*env.reset(seed=0))\n"
        "print(action, [m for m in ('torch', 'stable_baselines3') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "0 []"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coder": "forward"}, r"\(coder 'closed_loop'\), got 'forward'"),
        ({"deadline": 50}, r"\(deadline 60\), got 50"),
        ({"bit_depths": [3, 4]}, r"\(bit_depths \[3, 4, 8, 10, 16\]\), got \[3, 4\]"),
        ({"link": {"num_subchannels": 30}}, r"\(link its own\), got another"),
    ],
)
def test_another_system_is_refused(folder: Path, kwargs: dict[str, Any], changes: Any, message: str) -> None:
    with pytest.raises(
        ConfigurationError, match=r"`config` must be the system that learned:.* was trained for " + message
    ):
        agents.make(f"learned:{folder}", system(kwargs, snr_db=6.0, **changes))


def test_a_field_younger_than_the_policy_has_to_have_its_default(folder: Path, kwargs: dict[str, Any]) -> None:
    trained = json.loads((folder / "policy.json").read_text())["system"]
    del trained["deadline"]  # as if it had not been a field then
    change(folder, system=trained)
    agents.make(f"learned:{folder}", system(kwargs, snr_db=6.0))
    with pytest.raises(ConfigurationError, match=r"\(deadline 60\), got 50"):
        agents.make(f"learned:{folder}", system(kwargs, snr_db=6.0, deadline=50))


def test_another_latency_quantile_is_not(folder: Path, kwargs: dict[str, Any]) -> None:
    agents.make(f"learned:{folder}", system(kwargs, snr_db=6.0, latency_quantile=0.5))


def test_what_is_not_a_policy(folder: Path, kwargs: dict[str, Any], tmp_path: Path) -> None:
    config = system(kwargs, snr_db=6.0)
    with pytest.raises(
        ConfigurationError, match=r"got '.*nothing' without policy.json. Train one with: python -m train"
    ):
        Learned(config, path=tmp_path / "nothing")
    with pytest.raises(ConfigurationError, match=r"got '.*nothing' without policy.json"):
        agents.env_kwargs(f"learned:{tmp_path / 'nothing'}")
    change(folder, format=0)
    with pytest.raises(ConfigurationError, match=r"of format 2, got .* \(ValueError: format 0, activation tanh\)"):
        Learned(config, path=folder)
    change(folder, format=FORMAT, encoder={"encoding": "normalized", "history": 0, "history_length": 60})
    with pytest.raises(ConfigurationError, match=r"`path` must hold weights from 6 numbers to 6 actions, got"):
        Learned(config, path=folder)
    (folder / "policy.safetensors").write_bytes(b"broken")
    with pytest.raises(ConfigurationError, match=r"which cannot be read \(SafetensorError"):
        Learned(config, path=folder)
    (folder / "policy.json").write_text("{")
    with pytest.raises(ConfigurationError, match=r"which cannot be read \(JSONDecodeError"):
        Learned(config, path=folder)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("0.weight", lambda a: np.where(a == a.max(), np.nan, a), r"0\.weight must be finite float32, got nan"),
        ("1.bias", lambda a: np.where(a == a.max(), -np.inf, a), r"1\.bias must be finite float32, got -inf"),
        ("1.weight", lambda a: a.astype(np.float64), r"1\.weight must be finite float32, got float64"),
        ("1.weight", lambda a: a[:, 1:], r"1\.weight must have shape \(outputs, 16\), got \(6, 15\)"),
        ("0.weight", lambda a: a[0], r"0\.weight must have shape \(outputs, inputs\), got \(\d+,\)"),
        ("0.bias", lambda a: a[1:], r"0\.bias must have shape \(16,\), got \(15,\)"),
        ("0.bias", None, r"KeyError: '0\.bias'"),
    ],
)
def test_weights_that_are_none(folder: Path, name: str, spoil: Any, message: str) -> None:
    arrays = load_file(folder / "policy.safetensors")
    array = arrays.pop(name)
    if spoil is not None:
        arrays[name] = np.ascontiguousarray(spoil(array)).astype(spoil(array).dtype)
    put_weights(folder, arrays)
    with pytest.raises(ConfigurationError, match=rf"got {str(folder)!r}, which cannot be read \(.*{message}"):
        read_policy(folder)


def test_weights_are_those_of_their_hash(folder: Path) -> None:
    """Any flipped bit is seen; a policy of format 1 had no hash."""
    read_policy(folder)
    path = folder / "policy.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(
        ConfigurationError, match=r"policy\.safetensors does not have the SHA-256 that policy\.json says"
    ):
        read_policy(folder)
    change(folder, format=1)
    read_policy(folder)


def test_the_shipped_policies_have_a_hash() -> None:
    for path in SHIPPED.parent.glob("*/policy.json"):
        assert json.loads(path.read_text())["format"] == FORMAT
        read_policy(path.parent)


def test_the_shipped_policy_is_near_the_optimum_without_the_snr() -> None:
    """On the bundled cache's test split, 500 common draws; it is the one that its own log describes."""
    from agents.evaluate import evaluate

    assert {path.name for path in SHIPPED.iterdir()} >= {"policy.json", "policy.safetensors", "run.json"}
    snrs_db = tuple(range(0, 25, 3))
    table = evaluate(("learned", "dp"), snrs_db, episodes=500, seed=5, env_kwargs={"cache": "default"})
    ratios = {}
    for snr_db in snrs_db:
        learned, optimum = (
            np.mean([row["latent_mse"] for row in table if (row["agent"], row["snr_db"]) == (name, snr_db)]) + 1e-6
            for name in ("learned", "dp")
        )
        ratios[snr_db] = learned / optimum
    assert np.exp(np.mean(np.log(list(ratios.values())))) <= 1.0
    assert all(ratio <= 1.15 for ratio in ratios.values()), ratios
