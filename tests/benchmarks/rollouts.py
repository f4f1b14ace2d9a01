"""Roll-outs for MaskablePPO: Stable-Baselines3's DummyVecEnv beside the native environments, in one run.

    python -m tests.benchmarks.rollouts

The same envs and policy, with the options of ``python -m train.ppo``; the two take turns, so that whatever else runs
slows both. Medians over the repetitions.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer


def main(
    repetitions: Annotated[int, typer.Option(help="Roll-outs of each kind.")] = 5,
    threads: Annotated[str, typer.Option(help="Comma-separated numbers of torch threads.")] = "1,2",
) -> None:
    """Measure collection alone, and with the update (end to end)."""
    import gymnasium as gym
    import torch
    from sb3_contrib import MaskablePPO
    from stable_baselines3.common.logger import configure
    from stable_baselines3.common.vec_env import DummyVecEnv
    from torch import nn

    import refine_env
    from refine_env.sb3 import make_vec_env
    from refine_env.wrappers import EncodeObservation
    from train.options import parse_numbers
    from train.rl.config import Config

    config = Config()
    num_envs, steps = config.num_envs, config.rollout_steps
    net_arch = {"pi": parse_numbers("actor", config.actor, int), "vf": parse_numbers("critic", config.critic, int)}
    policy_kwargs = {"net_arch": net_arch, "activation_fn": {"tanh": nn.Tanh, "relu": nn.ReLU}[config.activation]}
    kwargs = {"snr_db": [0, 24], "decision_epochs": True, "coder": "closed_loop"}

    def single() -> Any:
        return EncodeObservation(gym.make(refine_env.ENV_ID, disable_env_checker=True, **kwargs))

    kinds: dict[str, Callable[[], Any]] = {
        "DummyVecEnv": lambda: DummyVecEnv([single] * num_envs),
        "native": lambda: make_vec_env(num_envs, kwargs),
    }
    models = {}
    for kind, make in kinds.items():
        model: Any = MaskablePPO(
            "MlpPolicy",
            make(),
            n_steps=steps,
            batch_size=config.batch_size,
            n_epochs=config.epochs,
            policy_kwargs=policy_kwargs,
            seed=0,
            device="cpu",
        )
        _, callback = model._setup_learn(10**9)
        model.set_logger(configure(None, []))
        with torch.no_grad():
            model.policy.action_net.bias[0] = 3.8  # wait, mostly: episodes as long as a trained policy's
        models[kind] = (model, callback)
    for count in map(int, threads.split(",")):
        torch.set_num_threads(count)
        times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
        for repetition in range(repetitions + 1):
            for kind, (model, callback) in models.items():
                start = time.perf_counter()
                model.collect_rollouts(model.env, callback, model.rollout_buffer, steps)
                collected = time.perf_counter()
                model.train()
                if repetition:  # the first one compiles
                    times[kind].append((collected - start, time.perf_counter() - start))
        rates = {
            kind: [steps * num_envs / statistics.median(column) for column in zip(*values, strict=True)]
            for kind, values in times.items()
        }
        for kind, (collection, whole) in rates.items():
            print(f"{count} torch threads, {kind}: {collection:,.0f} steps/s collected, {whole:,.0f} end to end")
        collection, whole = (rates["native"][k] / rates["DummyVecEnv"][k] for k in range(2))
        print(f"{count} torch threads: {collection:.2f} times the collection, {whole:.2f} times end to end")


if __name__ == "__main__":
    typer.run(main)
