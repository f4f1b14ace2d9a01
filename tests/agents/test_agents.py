"""What all policies have in common, and the simple ones."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

import agents
import refine_env
from agents import registry
from refine_env import ConfigurationError, LatentRefinementVectorEnv, SystemConfig

NAMES = agents.names()
CAUSAL = [name for name in NAMES if name != "clairvoyant"]


def make(name: str, config: SystemConfig) -> agents.Agent:
    """With the rates of generous slots for the one that knows them, and a narrow prior for the one that infers."""
    if name == "dp-inferred":
        return agents.make(name, config, neglect_errors=True, snrs_db=(5.0, 10.0))
    agent = agents.make(name, config, neglect_errors=True)
    if isinstance(agent, agents.Clairvoyant):
        agent.reset(1, rates=np.full((1, config.deadline), float(config.latent_dim)))
    return agent


def observe(**fields: Any) -> dict[str, Any]:
    history = np.linspace(0.4, 0.6, 60, dtype=np.float32)
    error = np.zeros(1, dtype=np.float32)
    steps = {"slot": 10, "server_step": 42, "device_step": 50}
    return {**steps, "channel_history": history, "device_error": error, **fields}


def mask(legal: bool = True, count: int = 6) -> dict[str, Any]:
    return {"action_mask": np.array([1] + [int(legal)] * (count - 1), dtype=np.int8)}


def test_names() -> None:
    assert [
        "lookahead",
        "lookahead-literal",
        "lookahead-tight",
        "lookahead-closed-loop",
        "dp",
        "dp-current-rate",
        "dp-final",
        "dp-anytime",
        "dp-inferred",
        "clairvoyant",
        "final-only",
        "final-adaptive",
        "final-adaptive-closed-loop",
        "random",
        *(f"{kind}-q{b}" for kind in ("persistent", "final") for b in (3, 4, 8, 10, 16)),
    ] == NAMES
    assert agents.names(SystemConfig(snr_db=0.0, bit_depths=(2, 16)))[-4:] == [
        "persistent-q2",
        "persistent-q16",
        "final-q2",
        "final-q16",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_name_and_env_kwargs(name: str) -> None:
    agent = agents.make(name, config=SystemConfig(snr_db=6.0), neglect_errors=True)
    assert agent.name == name
    closed_loop = name.endswith("closed-loop") or name.startswith(("dp", "clairvoyant"))
    assert agents.env_kwargs(name) == {"coder": "closed_loop" if closed_loop else "forward", "payload": "latent"}


@pytest.mark.parametrize("name", [name for name in CAUSAL if name != "random"])
def test_single_and_batch_decide_alike(name: str, gaussian_cache: Path) -> None:
    env = LatentRefinementVectorEnv(16, cache=str(gaussian_cache), snr_db=9.0, **agents.env_kwargs(name))
    agent, alone = (make(name, env.config) for _ in range(2))
    agent.reset(16)
    observation, info = env.reset(seed=0)
    acted = 0
    for _ in range(60):
        actions = agent.select_action(observation, info)
        assert actions.dtype == np.int64
        assert actions.shape == (16,)
        for i in range(16):
            single = {key: value[i] for key, value in observation.items()}
            action = alone.select_action(single, {"action_mask": info["action_mask"][i]})
            assert type(action) is int
            assert action == actions[i]
        assert (info["action_mask"][np.arange(16), actions] == 1).all()
        acted += int((actions > 0).sum())
        observation, _, _, _, info = env.step(actions)
    assert acted > 0


@pytest.mark.parametrize("name", NAMES)
def test_waits_where_transmit_is_illegal(name: str) -> None:
    agent = make(name, SystemConfig(snr_db=12.0))
    for _ in range(20):
        assert agent.select_action(observe(server_step=0), mask(legal=False)) == 0


def test_persistent_q() -> None:
    agent = agents.make("persistent-q8", SystemConfig(snr_db=6.0))
    assert agent.select_action(observe(), mask()) == 3


def test_final_only() -> None:
    agent = agents.make("final-only", SystemConfig(snr_db=6.0))
    assert agent.select_action(observe(server_step=1), mask()) == 0
    assert agent.select_action(observe(server_step=0), mask()) == 5


def test_random_is_uniform_and_seeded() -> None:
    config = SystemConfig(snr_db=6.0)

    def draw(seed: int) -> list[int]:
        agent = agents.make("random", config, seed=seed)
        return [agent.select_action(observe(), mask()) for _ in range(3000)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)
    # Each of six actions 500 times, standard deviation 20.4; five of them.
    assert np.abs(np.bincount(draw(1), minlength=6) - 500).max() < 102


def test_only_the_mask_of_info_is_read() -> None:
    class Guarded(dict[str, Any]):
        def __getitem__(self, key: str) -> Any:
            assert key == "action_mask", key
            return super().__getitem__(key)

    for name in NAMES:
        make(name, SystemConfig(snr_db=6.0)).select_action(observe(), Guarded(mask()))


@pytest.mark.parametrize("name", ["lookahed", "persistent-q", "persistent-q03", "persistent-q17", "dp ", None, 3])
def test_unknown_name(name: Any) -> None:
    with pytest.raises(ConfigurationError, match="`name` must be one of lookahead, "):
        agents.make(name, SystemConfig(snr_db=6.0))
    with pytest.raises(ConfigurationError, match="`name` must be one of lookahead, "):
        agents.env_kwargs(name)


@pytest.mark.parametrize("name", ["lookahead", "random", "persistent-q3"])
@pytest.mark.parametrize("config", [None, {"snr_db": 6.0}, "6"])
def test_config_of_another_type(name: str, config: Any) -> None:
    with pytest.raises(ConfigurationError, match="`config` must be a SystemConfig, got"):
        agents.make(name, config)


@pytest.mark.parametrize("name", NAMES)
def test_who_plans_with_errors_warns_once_of_a_model_without_them(name: str) -> None:
    def warnings_of(**options: Any) -> list[str]:
        config = SystemConfig(snr_db=12.0, coder=options.pop("coder", "forward"))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            agents.make(name, config, **options)
        return [str(warning.message) for warning in caught]

    registry._warn_of_neglected_errors.cache_clear()
    assert warnings_of(coder="closed_loop") == warnings_of(neglect_errors=True) == []
    told = warnings_of()
    if name.startswith(("dp", "clairvoyant")):
        assert len(told) == 1
        assert told[0].startswith(f"{name} plans as if there were no coding errors on the paper's coder")
    else:
        assert told == []
    assert warnings_of() == []


def test_unknown_option() -> None:
    with pytest.raises(ConfigurationError, match=r"`options` must be those of lookahead, got foo"):
        agents.make("lookahead", SystemConfig(snr_db=6.0), foo=1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda config: agents.make(config, "lookahead"),
            r"got SystemConfig.* The name comes first: agents.make\(name",
        ),
        (lambda config: agents.make(["lookahead"], config), r"got \['lookahead'\]. Choose one of them"),
        (lambda config: agents.make("lookahed", config), "got 'lookahed'. Did you mean `lookahead`\\?"),
        (lambda config: agents.make("random", config, sed=1), "got sed .* Did you mean `seed`\\? See help"),
        (lambda config: agents.make("lookahead", config, Literal=True), "got Literal .* Did you mean `literal`\\?"),
        (lambda config: agents.make("lookahead", gym.make("CartPole-v1")), "got OrderEnforcing|got TimeLimit"),
        (lambda config: agents.make("lookahead", config).check_config({}), "must be a SystemConfig, got dict"),
    ],
)
def test_a_slip_gets_a_sentence(call: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        call(SystemConfig(snr_db=6.0))


def test_missing_bit_depths() -> None:
    config = SystemConfig(snr_db=6.0, bit_depths=(3, 8))
    with pytest.raises(ConfigurationError, match=r"`bits` must be one of the bit depths \[3, 8\], got 16"):
        agents.make("final-only", config)
    with pytest.raises(ConfigurationError, match=r"`bits` must be one of the bit depths \[3, 8\], got 4"):
        agents.make("persistent-q4", config)


class TestAnotherSystem:
    """An agent asked to act under a configuration it was not made for."""

    @pytest.fixture
    def agent(self) -> agents.Agent:
        return agents.make("lookahead", SystemConfig(snr_db=6.0))

    def test_other_actions(self, agent: agents.Agent) -> None:
        with pytest.raises(ConfigurationError, match=r"`action_mask` must have 6 actions for lookahead, got shape"):
            agent.select_action(observe(), mask(count=4))

    def test_other_steps(self, agent: agents.Agent) -> None:
        with pytest.raises(ConfigurationError, match="`device_step` must be at most 50 in the system lookahead"):
            agent.select_action(observe(device_step=100), mask())

    def test_fewer_steps(self, agent: agents.Agent) -> None:
        with pytest.raises(ConfigurationError, match="`device_bits` must be 0 just where `device_step` is 50"):
            agent.select_action(observe(server_step=3, device_step=4, device_bits=0), mask())

    def test_other_bit_depths(self, agent: agents.Agent) -> None:
        with pytest.raises(ConfigurationError, match=r"else one of the bit depths \[3, 4, 8, 10, 16\]"):
            agent.select_action(observe(server_step=3, device_step=4, device_bits=5), mask())

    def test_other_deadline(self, agent: agents.Agent) -> None:
        with pytest.raises(ConfigurationError, match="`slot` must be at most 61 in the system lookahead"):
            agent.select_action(observe(slot=70), mask())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"snr_db": 3.0}, r"\(snr_db 6.0\), got 3.0"),
            ({"latent_dim": 256}, r"\(latent_dim 16384\), got 256"),
            ({"schedule": refine_env.NoiseSchedule([1, 0.5])}, r"\(schedule its own\), got another schedule"),
            ({"deadline": 61}, r"\(deadline 60\), got 61"),
        ],
    )
    def test_other_config(self, agent: agents.Agent, change: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigurationError, match=message):
            agent.check_config(SystemConfig(**{"snr_db": 6.0, **change}))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"deadline": 40}, r"`channel_history` must have the length of the deadline that .*, 60, got 40\."),
            ({"deadline": 80}, r"`channel_history` must have the length of the deadline that .*, 60, got 80\."),
            ({"history_length": 5}, r"where the environment has a `history_length`, call agent.check_config\(env"),
            ({"link": {"uplink_bits": 99.0}}, r"`remaining_bits` must be the prompt's in slot 1, 0.5 bits per dim"),
            ({"bit_depths": [3, 8]}, "`action_mask` must have 6 actions"),
        ],
    )
    @pytest.mark.parametrize("name", [name for name in NAMES if name not in ("clairvoyant", "dp-inferred")])
    def test_seen_in_the_first_slot_of_a_loop_of_one_s_own(
        self, name: str, gaussian_cache: Path, change: dict[str, Any], message: str
    ) -> None:
        kwargs = {"cache": str(gaussian_cache), "snr_db": 9.0, **agents.env_kwargs(name)}
        mine, theirs = (gym.make(refine_env.ENV_ID, **{**kwargs, **other}) for other in ({}, change))
        agent = agents.make(name, mine.unwrapped.config)  # type: ignore[attr-defined]
        agent.select_action(*mine.reset(seed=0))
        with pytest.raises(ConfigurationError, match=message):
            agent.select_action(*theirs.reset(seed=0))

    def test_a_shorter_history_of_the_same_system(self, gaussian_cache: Path) -> None:
        """Which an agent cannot tell from a shorter deadline, until it is told."""
        env: Any = gym.make(refine_env.ENV_ID, cache=str(gaussian_cache), history_length=5)
        agent = agents.make("lookahead", env.unwrapped.config)
        agent.check_config(env.unwrapped.config)
        assert agent.select_action(*env.reset(seed=0)) == 0

    def test_roll_out_checks(self, gaussian_cache: Path) -> None:
        from refine_env.evaluation import roll_out

        made_elsewhere = agents.make("lookahead", SystemConfig(snr_db=6.0))
        with pytest.raises(ConfigurationError, match="`config` must be the one that lookahead was made for"):
            roll_out(lambda config: made_elsewhere, env_kwargs={"cache": str(gaussian_cache)}, episodes=1)


@pytest.mark.parametrize("name", CAUSAL)
def test_decisions_up_to_a_slot_do_not_depend_on_later_rates(name: str, gaussian_cache: Path) -> None:
    env = gym.make(refine_env.ENV_ID, cache=str(gaussian_cache), snr_db=6.0, **agents.env_kwargs(name))
    rng = np.random.default_rng(0)
    agent, acted = make(name, env.unwrapped.config), 0  # type: ignore[attr-defined]
    for change in (20, 35, 57):
        rates = rng.uniform(100, 180, 60)
        other = rates.copy()
        other[change:] = rng.uniform(20, 400, 60 - change)
        taken = []
        for channel in (rates, other):
            if name == "random":
                agent = make(name, env.unwrapped.config)  # type: ignore[attr-defined]
            agent.reset()
            observation, info = env.reset(seed=1, options={"rates": channel, "trajectory": 0})
            actions = []
            for _ in range(change):
                actions.append(agent.select_action(observation, info))
                observation, _, _, _, info = env.step(actions[-1])
            taken.append(actions)
        assert taken[0] == taken[1]
        acted += np.count_nonzero(taken[0])
    assert acted > 0


def test_the_bound_depends_on_later_rates(gaussian_cache: Path) -> None:
    """What the test above would see of a policy that looks ahead."""
    config = gym.make(refine_env.ENV_ID, cache=str(gaussian_cache), **agents.env_kwargs("clairvoyant")).unwrapped.config  # type: ignore[attr-defined]
    rates = np.full((2, 60), 140.0)
    rates[1, 40:] = 20.0
    agent = agents.Clairvoyant(config)
    agent.reset(2, rates=rates)
    assert (agent.schedules[0, :40] != agent.schedules[1, :40]).any()
