"""Minari datasets of roll-outs: written, read back, their environment recovered, their episodes replayed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from refine_env import ConfigurationError
from refine_env.evaluation import episode_seeds, roll_out

ROOT = Path(__file__).parents[3]
minari = pytest.importorskip("minari", reason="the train extra is not installed")
pytest.importorskip("h5py", reason="the train extra is not installed")

import agents  # noqa: E402
from train.rl.export_minari import export, roll_out_episodes  # noqa: E402

ID = "refine_env/latent-refinement/lookahead-v0"


@pytest.fixture
def kwargs(gaussian_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return {"cache": str(gaussian_cache), "snr_db": 6.0, "split": "all"}


@pytest.mark.filterwarnings("ignore:Package refine-env is not installed:UserWarning")  # from a clone it need not be
@pytest.mark.parametrize(("agent", "decision_epochs"), [("lookahead", False), ("random", True)])
def test_reloaded_and_replayed(kwargs: dict[str, Any], agent: str, decision_epochs: bool) -> None:
    """The random policy's episodes are of very different lengths: some begin again long before others end."""
    kwargs["decision_epochs"] = decision_epochs
    if agent == "random":
        kwargs["snr_db"] = [0, 24]
    export(ID, agent, kwargs, episodes=12, seed=3)
    dataset = minari.load_dataset(ID)
    assert dataset.total_episodes == 12
    env = dataset.recover_environment()
    assert env.unwrapped.config.coder == "forward"
    assert env.observation_space == dataset.observation_space
    for k, episode in enumerate(dataset.iterate_episodes()):
        seed = episode_seeds(3, 12)[k]
        observation, _ = env.reset(seed=seed)
        length = len(episode.actions)
        for n, action in enumerate(episode.actions):
            assert all(np.array_equal(episode.observations[key][n], observation[key]) for key in observation)
            observation, reward, terminated, truncated, info = env.step(action)
            assert episode.rewards[n] == reward
            assert episode.terminations[n] == terminated == (n == length - 1)
            assert episode.truncations[n] == truncated
            assert episode.infos["num_deliveries"][n + 1] == info["num_deliveries"]
        assert all(np.array_equal(episode.observations[key][length], observation[key]) for key in observation)


def test_the_episodes_are_those_of_an_evaluation(kwargs: dict[str, Any]) -> None:
    episodes = roll_out_episodes("lookahead", kwargs, episodes=7, seed=1, batch_size=3)
    table = roll_out(lambda config: agents.make("lookahead", config), env_kwargs=kwargs, episodes=7, seed=1)
    assert [-episode["rewards"].sum() for episode in episodes] == [row["latent_mse"] for row in table]
    assert [episode["seed"] for episode in episodes] == [row["seed"] for row in table]


def test_errors(kwargs: dict[str, Any]) -> None:
    export(ID, "random", kwargs, episodes=1)
    with pytest.raises(ConfigurationError, match=r"`dataset_id` must be a new dataset, got '.*', which exists"):
        export(ID, "random", kwargs, episodes=1)
    with pytest.raises(ConfigurationError, match=r"`dataset_id` must be of the form .*, got 'no version!'"):
        export("no version!", "random", kwargs, episodes=1)


def test_the_command(gaussian_cache: Path, tmp_path: Path) -> None:
    words = [
        "-m",
        "train.rl.export_minari",
        "demo/final-only-v0",
        "--agent",
        "final-only",
        "--episodes",
        "2",
        "--out",
        str(tmp_path),
    ]
    result = subprocess.run(
        [sys.executable, *words, "--cache", str(gaussian_cache)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.stdout == "wrote demo/final-only-v0: 2 episodes, 120 steps\n", result.stderr
    assert (tmp_path / "demo" / "final-only-v0").is_dir()
