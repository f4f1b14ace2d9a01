"""Messages whose bytes are kept: they pin the format. ``python -m tests.coding.golden`` writes them anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from refine_env import NoiseSchedule
from refine_env.coding import ForwardCoder, Message, RefinementCodec

FOLDER = Path(__file__).parent
SCHEDULE = NoiseSchedule([1.0, 0.98, 0.9, 0.78, 0.62, 0.45, 0.3, 0.18, 0.08, 0.02])
BIT_DEPTHS = (1, 3, 4, 8, 10, 15, 16)
DIMS = (64, 61)
# Deliveries as (t, b).
CHAINS = {
    "ascending": ((8, 1), (7, 3), (6, 4), (4, 8), (3, 10), (1, 15), (0, 16)),
    "descending": ((8, 16), (7, 15), (6, 10), (4, 8), (3, 4), (1, 3), (0, 1)),
}
# Both zeros, the smallest and the largest subnormal, the largest value, and what saturates every quantizer.
EXTREMES = (0.0, -0.0, 2.0**-24, -(2.0**-24), 1023 * 2.0**-24, 65504.0, -65504.0, 6.0, -6.0)


def draw_latents(dim: int) -> NDArray[np.float16]:
    """Latents of unit variance, float16 (T+1, M), a few of their values extreme ones."""
    rng = np.random.default_rng(dim)
    latents = rng.standard_normal((SCHEDULE.num_steps + 1, dim)).astype(np.float16)
    for values in latents:
        values[: len(EXTREMES)] = rng.permutation(EXTREMES)
    return latents


def latents_file(folder: Path, dim: int) -> Path:
    """The latents of a dimension, float16 (T+1, M)."""
    return folder / f"latents-{dim}.npy"


def messages_file(folder: Path, dim: int, chain: str) -> Path:
    """The messages of a chain, one after the other."""
    return folder / f"forward-{dim}-{chain}.bin"


def compress_chain(latents: NDArray[np.float16], chain: str) -> Iterator[bytes]:
    """The messages of a chain, every one delivered before the next."""
    codec = RefinementCodec(ForwardCoder(SCHEDULE, BIT_DEPTHS), latents[-1])
    for step, bits in CHAINS[chain]:
        data = bytes(codec.compress(latents[step], step, bits))
        codec.decompress(data)
        yield data


def split_messages(data: bytes) -> list[bytes]:
    """The messages that a file holds."""
    messages = []
    while data:
        length = Message.length(data)
        messages.append(data[:length])
        data = data[length:]
    return messages


def rebuild(folder: Path = FOLDER) -> list[Path]:
    """Write latents and messages; returns the files."""
    files = []
    for dim in DIMS:
        latents = draw_latents(dim)
        np.save(latents_file(folder, dim), latents)
        files.append(latents_file(folder, dim))
        for chain in CHAINS:
            files.append(messages_file(folder, dim, chain))
            files[-1].write_bytes(b"".join(compress_chain(latents, chain)))
    return files
