"""What recording and writing trajectories costs over the bare sampling loop, on Stable Diffusion v1-5's architecture.

Both run in one process, in turn, on the same prompts and seeds: the bare loop is the pipeline's own call, which
keeps nothing; the other draws, records, checks, writes, hashes and sums up a whole cache. The model is loaded
before the clock starts in both. Beside the time there is the processor time of all threads, which another
process on the cores does not change as much, and which hides nothing of what a thread does beside the sampling
(for a GPU it says little). The narrower the network, the greater the share of the rest: the full model's is
less than this one's.

    python -m tests.benchmarks.generation --width 64 --device cpu
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from refine_env.trajectories import generate
from tests.trajectories.models import save_sd15


def main() -> None:
    """Print the medians of both and the overhead."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=32, help="of the U-Net's first level; 320 is the original's")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--num-steps", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--trajectories", type=int, default=8)
    parser.add_argument("--shard-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(args, Path(folder))


def measure(args: argparse.Namespace, folder: Path) -> None:
    """Time both in turn."""
    source = generate._DiffusionSource(
        model=save_sd15(folder / "model", args.width),
        num_steps=args.num_steps,
        scheduler="ddpm",
        guidance_scale=7.5,
        dtype=args.dtype,
        revision=None,
    )
    sampler = source.load(args.device)
    prompts = ["a cat"] * args.trajectories

    def write(number: int) -> None:
        generate.generate_diffusers(
            folder / str(number),
            source.model,
            prompts,
            num_steps=args.num_steps,
            batch_size=args.batch_size,
            shard_size=args.shard_size,
            device=args.device,
            dtype=args.dtype,
        )

    generate._DiffusionSource.load = lambda *_: sampler  # not loaded anew in every repeat
    times: dict[str, list[tuple[float, float]]] = {"bare": [], "whole": []}
    for number in range(args.repeats + 1):
        for name, work in (("bare", partial(bare, sampler, args)), ("whole", partial(write, number))):
            begun = (time.perf_counter(), time.process_time())
            work()
            if number:  # the first round warms up
                times[name].append((time.perf_counter() - begun[0], time.process_time() - begun[1]))
    parameters = sum(weight.numel() for weight in sampler._pipeline.unet.parameters())
    print(f"U-Net of {parameters:,} parameters, {args.dtype} on {args.device}, M = 16384, T = {args.num_steps}")
    for position, clock in enumerate(("time", "processor time")):
        medians = {}
        for name, values in times.items():
            seconds = [value[position] for value in values]
            medians[name] = statistics.median(seconds)
            print(f"{name:6} {medians[name]:8.3f} s of {clock} ({', '.join(f'{value:.3f}' for value in seconds)})")
        print(f"overhead {100 * (medians['whole'] / medians['bare'] - 1):.2f} % of {clock}")


def bare(sampler: Any, args: argparse.Namespace) -> None:
    """The pipeline's own call for the same batches and seeds."""
    import torch

    from refine_env.trajectories.pipeline import _one_thread

    for first in range(0, args.trajectories, args.batch_size):
        seeds = [generate.sample_seed(0, index) for index in range(first, first + args.batch_size)]
        with _one_thread(sampler.device_kind):
            latents = sampler._pipeline(
                prompt=["a cat"] * args.batch_size,
                num_inference_steps=args.num_steps,
                guidance_scale=7.5,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds],
                output_type="latent",
            ).images
        latents.cpu()


if __name__ == "__main__":
    main()
