"""Training of policies, tiny: files, seeds, resumption, evaluation, and what the actor may know."""

from __future__ import annotations

import base64
import copy
import csv
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from safetensors.numpy import save_file

import agents
import refine_env
from agents.policies.learned import Learned, PolicyFiles, read_policy
from refine_env import ConfigurationError
from refine_env.evaluation import roll_out
from refine_env.wrappers import VectorEncodeObservation

ROOT = Path(__file__).parents[3]
for module in ("torch", "stable_baselines3", "sb3_contrib", "tensorboard"):
    pytest.importorskip(module, reason="the train extra is not installed")

from train.rl import checkpoint, training  # noqa: E402
from train.rl.config import Config  # noqa: E402
from train.rl.critic import PrivilegedObservation  # noqa: E402
from train.rl.evaluation import (  # noqa: E402
    EVALUATION_COLUMNS,
    Evaluation,
    geometric_mean_ratio,
    read_evaluations,
)
from train.rl.training import train  # noqa: E402


@pytest.fixture
def options(gaussian_cache: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "out": tmp_path / "run",
        "cache": str(gaussian_cache),
        "total_steps": 512,
        "num_envs": 8,
        "rollout_steps": 16,
        "batch_size": 64,
        "epochs": 2,
        "actor": "8,8",
        "critic": "8",
        "eval_every": 256,
        "eval_episodes": 4,
        "test_episodes": 6,
        "eval_snr_db": "3,12",
        "rivals": "lookahead",
        "progress": False,
        "tensorboard": False,
        "checkpoint_every": 0,
    }


def weights(folder: Path) -> list[np.ndarray]:
    return [array for layer in read_policy(folder).layers for array in layer]


def equal(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("algorithm", ["maskable-ppo", "ppo", "dqn"])
def test_what_a_run_writes(options: dict[str, Any], algorithm: str) -> None:
    config = Config(**{**options, "algorithm": algorithm, "tensorboard": True})
    folder = train(config)
    assert folder == config.out
    assert not list(folder.glob("checkpoint*"))
    assert list((folder / "tensorboard").rglob("events.*"))
    description = json.loads((folder / "policy.json").read_text())
    assert description["system"]["snr_db"] == [0, 24]
    assert description["algorithm"] == algorithm
    rows = read_evaluations(folder)
    assert {row["split"] for row in rows} == {"train", "test"}
    assert {(row["agent"], row["snr_db"]) for row in rows} == {
        (a, s) for a in ("learned", "lookahead") for s in (3, 12)
    }
    run = json.loads((folder / "run.json").read_text())
    assert run["steps"] >= 512
    assert run["command"].startswith("python -m train.ppo --out")
    assert f"--cache {options['cache']}" in run["command"]

    # The last rows are those of the shipped files, on the test split.
    last = {row["snr_db"]: row["latent_mse"] for row in rows if row["split"] == "test" and row["agent"] == "learned"}
    table = roll_out(
        lambda system: Learned(system, path=folder),
        env_kwargs={**config.system_kwargs(), "snr_db": 12.0},
        episodes=6,
    )
    assert np.mean([row["latent_mse"] for row in table]) == last[12.0]


@pytest.mark.parametrize("algorithm", ["maskable-ppo", "ppo", "dqn"])
def test_the_exported_policy_is_that_of_stable_baselines(options: dict[str, Any], algorithm: str) -> None:
    """NumPy's forward pass and torch's agree, and so do their actions, wherever there is a choice."""
    import torch
    from sb3_contrib import MaskablePPO
    from stable_baselines3 import DQN, PPO

    folder = train(Config(**{**options, "algorithm": algorithm, "actor": "16,16"}))
    kind = {"maskable-ppo": MaskablePPO, "ppo": PPO, "dqn": DQN}[algorithm]
    model = kind.load(folder / "model.zip", device="cpu")
    system = gym.make_vec(refine_env.ENV_ID, num_envs=1, cache=options["cache"], coder="closed_loop", snr_db=6.0).config
    learned = Learned(system, path=folder)
    encoded = np.random.default_rng(0).uniform(-1, 1, (200, len(learned.encoder.names))).astype(np.float32)
    width = model.observation_space.shape[0]
    # What only the critic sees makes no difference to the actor.
    for filling in (0.0, 1.0):
        wide = np.full((200, width), filling, dtype=np.float32)
        wide[:, : encoded.shape[1]] = encoded
        with torch.no_grad():
            tensor = torch.from_numpy(wide)
            if algorithm == "dqn":
                expected = model.policy.q_net(tensor)
            else:
                expected = model.policy.action_net(model.policy.mlp_extractor.forward_actor(tensor))
        np.testing.assert_allclose(learned.logits(encoded), expected.numpy(), rtol=1e-4, atol=1e-5)
        actions = model.predict(wide, deterministic=True)[0]
        assert np.array_equal(actions, learned.logits(encoded).argmax(axis=1))


def test_same_seed_same_weights(options: dict[str, Any]) -> None:
    runs = [
        train(Config(**{**options, "out": options["out"] / name, "seed": seed}))
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    first, again, other = map(weights, runs)
    assert equal(first, again)
    assert not equal(first, other)


class Killed(Exception):
    pass


@pytest.mark.parametrize("algorithm", ["maskable-ppo", "ppo", "dqn"])
def test_killed_and_resumed_it_is_the_same_policy(options: dict[str, Any], algorithm: str) -> None:
    """Wherever the run ends, mid-episode too, the next one goes on to the same weights and the same tables."""
    options |= {"algorithm": algorithm, "learning_rate": 7e-4, "average_from": 0.2}
    whole = train(Config(**{**options, "out": options["out"] / "whole"}))

    def kill(steps: int) -> None:
        if steps >= 256:
            raise Killed(steps)

    config = Config(**{**options, "out": options["out"] / "parts"})
    with pytest.raises(Killed, match=r"^\d+$"):
        train(config, on_rollout=kill)
    assert (config.out / "checkpoint.safetensors").is_file()
    with pytest.raises(ConfigurationError, match=r"`--learning-rate` must be '0.0007' to go on with .*, got '0.5'"):
        train(Config(**{**options, "out": config.out, "learning_rate": 0.5}))
    resumed_from: list[int] = []
    train(config, on_rollout=resumed_from.append)
    assert resumed_from[0] == 256  # not from the start
    assert equal(weights(whole), weights(config.out))
    tables = [[{**row, "seconds": 0.0} for row in read_evaluations(folder)] for folder in (whole, config.out)]
    assert tables[0] == tables[1]


def test_a_checkpoint_survives_a_kill_between_its_two_renamings(interrupted: Config) -> None:
    config = interrupted
    shutil.move(config.out / "checkpoint.safetensors", config.out / "checkpoint.previous.safetensors")
    (config.out / "checkpoint.safetensors0815.tmp").write_bytes(b"half of i")
    resumed_from: list[int] = []
    train(config, on_rollout=resumed_from.append)
    assert resumed_from[0] == 256
    assert not list(config.out.glob("checkpoint*"))


@pytest.fixture
def interrupted(options: dict[str, Any]) -> Config:
    """A run that was killed after two roll-outs, before the third: its checkpoints are of 256 and 128 steps."""

    def kill(steps: int) -> None:
        if steps >= 256:
            raise Killed(steps)

    config = Config(**options)
    with pytest.raises(Killed, match=r"^\d+$"):
        train(config, on_rollout=kill)
    return config


def first_step(config: Config) -> int:
    """Where a run begins, or goes on; it is killed there."""

    def kill(steps: int) -> None:
        raise Killed(steps)

    with pytest.raises(Killed, match=r"^\d+$") as info:
        train(config, on_rollout=kill)
    return int(str(info.value))


def test_a_damaged_checkpoint_and_the_one_before_it(interrupted: Config, caplog: pytest.LogCaptureFixture) -> None:
    newest, previous = (interrupted.out / f"checkpoint.{name}" for name in ("safetensors", "previous.safetensors"))
    good, before = newest.read_bytes(), previous.read_bytes()
    header = int.from_bytes(good[:8], "little")
    rng = np.random.default_rng(0)
    damages = {"empty": b"", "cut": good[:-1], "half": good[: len(good) // 2], "pickled": pickle.dumps("x")}
    for k, place in enumerate([*rng.integers(0, 8 + header, 12), *rng.integers(8 + header, len(good), 12)]):
        damages[f"flip {k}"] = good[:place] + bytes([good[place] ^ (1 << rng.integers(8))]) + good[place + 1 :]
    for name, damaged in damages.items():
        newest.write_bytes(damaged)
        previous.write_bytes(before)
        caplog.clear()
        assert first_step(interrupted) == 128, name
        assert f"{newest} cannot be read (" in caplog.text
        assert f"going on from the one before it, {previous}" in caplog.text
        assert previous.read_bytes() == before  # not overwritten with the damaged one
    previous.unlink()
    for damaged in damages.values():
        newest.write_bytes(damaged)
        with pytest.raises(ConfigurationError, match=r"^`--out` must hold a checkpoint") as info:
            train(interrupted)
        assert str(info.value).startswith(f"`--out` must hold a checkpoint that can be read, got {str(newest)!r} (")
        assert str(info.value).endswith("Delete it to begin anew, or give another --out.")
    newest.unlink()
    newest.mkdir()
    with pytest.raises(ConfigurationError, match=r"`--out` must hold a checkpoint .* \(ValueError: not a file\)"):
        train(interrupted)


def test_the_checkpoint_before_leads_to_the_same_policy(interrupted: Config, options: dict[str, Any]) -> None:
    whole = train(Config(**{**options, "out": options["out"] / "whole"}))
    (interrupted.out / "checkpoint.safetensors").write_bytes(b"")
    assert equal(weights(train(interrupted)), weights(whole))


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


def test_a_hostile_folder_runs_nothing(options: dict[str, Any], tmp_path: Path) -> None:
    """A pickle in the place of every file that a run folder may hold, of this version and of earlier ones."""
    ran = tmp_path / "ran"
    payload = pickle.dumps(Payload(ran))
    pickle.loads(payload)
    ran.rmdir()  # it would run
    encoded = json.dumps({"policy_class": {":type:": "x", ":serialized:": base64.b64encode(payload).decode()}})
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("data", encoded)
    planted = {
        "checkpoint/state.pkl": payload,
        "checkpoint/replay.pkl": payload,
        "checkpoint/model.zip": archive.getvalue(),
        "checkpoint.1.old/state.pkl": payload,
        "checkpoint.safetensors": payload,
        "checkpoint.previous.safetensors": payload,
        "model.zip": archive.getvalue(),
        "policy.json": payload,
        "policy.safetensors": payload,
        "run.json": payload,
        "evaluations.csv": payload,
    }
    options["total_steps"], options["eval_every"] = 128, 0
    for algorithm in ("maskable-ppo", "dqn"):
        for name, content in planted.items():
            config = Config(**{**options, "out": tmp_path / algorithm / name.replace("/", "-")})
            path = config.out / name
            path.parent.mkdir(parents=True)
            path.write_bytes(content)
            with suppress(ConfigurationError, Killed):
                first_step(config)
            with suppress(ConfigurationError):
                read_policy(config.out)
            with suppress(ConfigurationError):
                read_evaluations(config.out)
            assert not ran.exists(), name
    config = Config(**{**options, "out": tmp_path / "maskable-ppo" / "checkpoint-state.pkl"})
    with pytest.raises(ConfigurationError, match=r"`--out` must not hold a checkpoint of an earlier version, got '.*'"):
        train(config)


def test_numbers_that_no_training_wrote(interrupted: Config) -> None:
    """A checkpoint with the right hash and wrong content is refused too, by name."""
    path = interrupted.out / "checkpoint.safetensors"
    (interrupted.out / "checkpoint.previous.safetensors").unlink()
    state, arrays = checkpoint._read(path)

    def refused(change: Any) -> str:
        values, others = copy.deepcopy(state), dict(arrays)
        change(values, others)
        text = json.dumps(values)
        save_file(others, path, {"state": text, "sha256": checkpoint._digest(text, others)})
        with pytest.raises(ConfigurationError, match=r"^`--out` must hold a checkpoint that can be read, got ") as info:
            train(interrupted)
        return str(info.value)

    def numpy_position(values: Any, others: Any) -> None:
        values["numpy"]["state"]["pos"] = 10**6

    def action(values: Any, others: Any) -> None:
        others["envs.taken"] = np.full_like(others["envs.taken"], 77)

    def trajectory(values: Any, others: Any) -> None:
        others["envs.trajectories"] = others["envs.trajectories"] + 1000

    def short(values: Any, others: Any) -> None:
        others["last_obs"] = others["last_obs"][:, 1:].copy()

    def rows(values: Any, others: Any) -> None:
        values["training"]["rows"] = [{"steps": 1}]

    def missing(values: Any, others: Any) -> None:
        del others["torch"]

    def options(values: Any, others: Any) -> None:
        values["options"] = ["\x1b[2J"]

    def letters(values: Any, others: Any) -> None:
        values["generators"][0]["bit_generator"] = "\x1b[2J"

    assert "options must be an object, got " in refused(options)
    assert refused(letters).isprintable()
    assert "pos of the Mersenne Twister must be in 0 … 624, got 1000000" in refused(numpy_position)
    assert "`actions` must be in 0 … 5, got 77" in refused(action)
    assert "`trajectory` must be in 0 … 15" in refused(trajectory)
    assert "last_obs must be float32 (8, " in refused(short)
    assert "KeyError: 'seconds'" in refused(rows)
    assert "KeyError: 'torch'" in refused(missing)


@pytest.mark.parametrize(
    "changes",
    [
        {"reward": "log"},
        {"reward": "terminal"},
        {"reward": "improvement"},
        {"encoding": "one-hot", "history": 0},
        {"encoding": "normalized", "history": 10},
        {"hindsight": False, "activation": "relu", "decision_epochs": False},
        {"snr_db": "6", "eval_snr_db": ""},
        {"coder": "forward"},
    ],
)
def test_the_variants_train(options: dict[str, Any], changes: dict[str, Any]) -> None:
    config = Config(**{**options, "total_steps": 128, "eval_every": 0, **changes})
    folder = train(config)
    name = f"learned:{folder}"
    assert agents.env_kwargs(name) == {"coder": config.coder, "payload": "latent"}
    envs = gym.make_vec(
        refine_env.ENV_ID, num_envs=3, cache=options["cache"], snr_db=9.0, split="test", **agents.env_kwargs(name)
    )
    agent = agents.make(name, envs.unwrapped.config)
    agent.reset(3)
    observations, infos = envs.reset(seed=0)
    for _ in range(60):
        observations, _, _, _, infos = envs.step(agent.select_action(observations, infos))


@pytest.mark.parametrize(
    ("coder", "payload"), [("forward", "latent"), ("closed_loop", "latent"), ("closed_loop", "posterior_mean")]
)
def test_reference_policies_play_on_the_coder_of_the_training(
    options: dict[str, Any], coder: str, payload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But those that the paper's coder is their own, who are named with it."""
    names = agents.names()
    config = Config(**{**options, "coder": coder, "payload": payload, "rivals": ",".join(names)})
    monkeypatch.setattr(Evaluation, "_known", {})
    monkeypatch.setattr(Evaluation, "_score", lambda self, make, kwargs, episodes: played.append(kwargs) or 0.5)
    played: list[dict[str, Any]] = []
    evaluation = Evaluation(config)
    rows = evaluation.rows(PolicyFiles({}, []), "test", 4, 0, 0.0)
    told = evaluation.describe(rows).split(", ")
    assert len(told) == len(names) == len(played) // 2 - 1
    for name, kwargs, sentence in zip(names, played[1:], told, strict=False):
        own = coder if agents.env_kwargs(name)["coder"] == "closed_loop" else "forward"
        assert (kwargs["coder"], kwargs["payload"]) == (own, payload if own == "closed_loop" else "latent"), name
        assert sentence == f"1.000 × {name}{'' if own == coder else ' (forward)'} (worst 1.000)"


def test_options_that_cannot_be(options: dict[str, Any]) -> None:
    for changes, message in (
        ({"snr_db": "24,0"}, r"`snr_db` must be low,high with low < high, got '24,0'"),
        ({"snr_db": "0,3,6"}, r"`snr_db` must be one SNR or low,high, got '0,3,6'"),
        ({"snr_db": "x"}, r"`snr_db` must be numbers with commas between, got 'x'"),
        ({"actor": "64,0"}, r"`actor` must be positive integers with commas between, got '64,0'"),
        ({"learning_rate": 0.0}, r"`learning_rate` must be > 0, got 0.0"),
        ({"relative_cap": 0.5}, r"`relative_cap` must be >= 1, got 0.5"),
        ({"average_from": 3.0}, r"`average_from` must be in 0 … 1, got 3.0"),
        ({"entropy": -1.0}, r"`entropy` must be >= 0, got -1.0"),
        ({"algorithm": "DQN"}, r"`algorithm` must be one of 'maskable-ppo', 'ppo', 'dqn', got 'DQN'"),
        ({"eval_snr_db": "x"}, r"`eval_snr_db` must be numbers with commas between, got 'x'"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            Config(**{**options, **changes})
    with pytest.raises(ConfigurationError, match=r"`name` must be one of .*, got 'nobody'"):
        train(Config(**{**options, "rivals": "nobody"}))


def test_geometric_mean_ratio() -> None:
    rows = [
        {"agent": agent, "snr_db": snr_db, "latent_mse": mse}
        for agent, snr_db, mse in (
            ("learned", 0, 0.4),
            ("dp", 0, 0.1),
            ("learned", 9, 0.0),
            ("dp", 9, 3e-6),
            ("x", 3, 1),
        )
    ]
    mean, worst = geometric_mean_ratio(rows, "learned", "dp")
    assert worst == pytest.approx(4.0, rel=1e-4)
    assert mean == pytest.approx((4.0 * 0.25) ** 0.5, rel=1e-4)
    assert np.isnan(geometric_mean_ratio(rows, "learned", "clairvoyant")).all()


def command(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_help_says_every_option() -> None:
    import dataclasses

    result = command(
        "-c",
        "import os; os.environ['COLUMNS'] = '200'; import runpy, sys; sys.argv = ['ppo', '--help']; "
        "runpy.run_module('train.ppo', run_name='__main__', alter_sys=True)",
    )
    assert result.returncode == 0
    for field in dataclasses.fields(Config):
        assert "--" + field.name.replace("_", "-") in result.stdout


@pytest.mark.parametrize("missing", ["torch", "stable_baselines3", "sb3_contrib", "tensorboard"])
def test_without_the_extra_one_sentence_says_what_to_install(missing: str, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.split('.')[0] == {missing!r}:\n"
        f"            raise ModuleNotFoundError(name, name={missing!r})\n"
        f"sys.meta_path.insert(0, Refuse()); del sys.modules[{missing!r}]\n"
        f"import runpy; sys.argv = ['ppo', '--out', {str(tmp_path / 'run')!r}]\n"
        "runpy.run_module('train.ppo', run_name='__main__', alter_sys=True)"
    )
    result = command("-c", code)
    assert result.returncode == 4
    assert result.stderr.strip() == (
        f"error: `{missing}` must be installed for this, and it is not. Install the extra: "
        "pip install 'refine-env[train]' (from a clone: pip install -e '.[train]')."
    )
    assert not (tmp_path / "run").exists()


def test_a_wrong_option_is_exit_code_2(tmp_path: Path) -> None:
    result = command("-m", "train.ppo", "--out", str(tmp_path), "--snr-db", "24,0")
    assert result.returncode == 2
    assert "`snr_db` must be low,high with low < high" in result.stderr


def test_the_table_of_evaluations_is_csv(options: dict[str, Any]) -> None:
    folder = train(Config(**{**options, "total_steps": 128, "eval_every": 0}))
    with (folder / "evaluations.csv").open() as file:
        assert list(next(csv.reader(file))) == list(EVALUATION_COLUMNS)


def test_weights_are_averaged() -> None:
    import torch

    average = training.WeightAverage()
    net = torch.nn.Linear(2, 1)
    for value in (1.0, 2.0, 6.0):
        with torch.no_grad():
            net.weight.fill_(value)
            net.bias.fill_(-value)
        average.add(net)
    average.put_into(net)
    assert net.weight.tolist() == [[3.0, 3.0]]
    assert net.bias.tolist() == [-3.0]


def test_the_average_is_of_the_last_part(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """From 1 on it is the last weights alone, which the optimizer left; from 0 on another policy."""

    def run(name: str, start: float) -> list[np.ndarray]:
        return weights(train(Config(**{**options, "out": options["out"] / name, "average_from": start})))

    last, all_of_them = run("last", 1.0), run("all", 0.0)
    monkeypatch.setattr(training.WeightAverage, "put_into", lambda self, policy: None)
    assert equal(last, run("never", 0.0))
    assert not equal(last, all_of_them)


def test_what_the_critic_knows_of_the_channel_to_come(gaussian_cache: Path) -> None:
    """Slots carry 4 bits per dimension each: by hand, at the start, later, and in the episode after."""
    envs: Any = gym.make_vec(
        refine_env.ENV_ID, num_envs=2, cache=str(gaussian_cache), autoreset_mode="SameStep", snr_db=[0, 24]
    )
    inner = envs.unwrapped
    envs = PrivilegedObservation(VectorEncodeObservation(envs))
    bits = inner.config.bit_depths

    def by_hand(i: int, slot: int, server_step: int) -> list[float]:
        rates = inner.episode_rates[i] / inner.config.latent_dim
        columns = [np.log2(rates.sum() / 16 + 1e-3) / 4]
        for start in (slot, min(slot + server_step, 61)):  # what is sent now, and once the latent is clean
            carried = np.cumsum(rates[start - 1 :])
            for b in bits:
                done = np.flatnonzero(carried >= b)
                rest = carried[-1] if carried.size else 0.0
                columns.append((60 - (start + done[0]) + 1) / 20 if done.size else max((rest - b) / 16, -1.0))
            columns.append(np.log2((carried[-1] if carried.size else 0.0) / 16 + 1e-3) / 4)
        return columns

    observations, _ = envs.reset(seed=0, options={"rates": np.full(60, 4.0 * inner.config.latent_dim)})
    assert observations[0, envs.actor_features + 1] == pytest.approx((60 - 1 + 1) / 20)  # 3 bits: in slot 1
    assert observations[0, envs.actor_features + 3] == pytest.approx((60 - 2 + 1) / 20)  # 8 bits: in slot 2
    for _ in range(70):  # into the second episode, whose rates are others
        seen = envs.env.observations
        for i in range(2):
            expected = by_hand(i, int(seen["slot"][i]), int(seen["server_step"][i]))
            assert observations[i, envs.actor_features :] == pytest.approx(expected, abs=1e-5)
        observations, _, _, _, _ = envs.step(np.array([1, 0]))
    assert seen["slot"].tolist() == [10, 10]


@pytest.mark.parametrize("algorithm", ["maskable-ppo", "ppo"])
def test_a_warm_start_imitates(options: dict[str, Any], algorithm: str, caplog: pytest.LogCaptureFixture) -> None:
    """With nothing learned after it, the policy does what the agent does."""
    changes = {"algorithm": algorithm, "clone": "lookahead-closed-loop", "clone_decisions": 4000, "actor": "32,32"}
    still = {"learning_rate": 1e-12, "final_learning_rate": 0.0, "total_steps": 128}
    with caplog.at_level("INFO"):
        folder = train(Config(**{**options, **changes, **still}))
    share = float(next(line for line in caplog.messages if line.startswith("repeats")).split()[1])
    assert share > 80.0
    same = seen = 0
    for snr_db in (2.0, 8.0, 14.0):
        kwargs = {"cache": options["cache"], "coder": "closed_loop", "snr_db": snr_db, "split": "test"}
        envs: Any = gym.make_vec(refine_env.ENV_ID, num_envs=32, **kwargs)
        teacher, pupil = (
            agents.make(changes["clone"], envs.unwrapped.config),
            Learned(envs.unwrapped.config, path=folder),
        )
        observations, infos = envs.reset(seed=8)
        for _ in range(60):
            legal = infos["action_mask"][:, 1:].any(axis=1)
            wanted = teacher.decide(observations, legal)
            same += int((pupil.decide(observations, legal) == wanted)[legal].sum())
            seen += int(legal.sum())
            observations, _, _, _, infos = envs.step(wanted)
    assert same > 0.7 * seen


def test_a_warm_start_wants_an_agent_of_the_system(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=r"`clone` must be empty for dqn, .* got 'lookahead'"):
        Config(**{**options, "algorithm": "dqn", "clone": "lookahead"})
    with pytest.raises(ConfigurationError, match=r"`clone` must name an agent of this system, got 'lookahead', which"):
        train(Config(**{**options, "clone": "lookahead"}))
