"""The statistics of a cache: exact sums over its float16 values, the same bits whoever adds them up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from refine_env.trajectories.manifest import Recipe, Shard, Span

__all__ = ["ShardSummary", "gram", "squares", "summarize", "total_statistics"]

_GRAM_BLOCK = 4096
_GRAM_SLICE = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardSummary:
    """What the manifest says of one written shard: size and hash, and its share of the statistics.

    Each is a function of the shard's content alone, so it does not matter who computes it, and when.

    Args:
        shard: the shard's entry in the manifest.
        squares: sum of ‖x_t‖² over the shard, shape (T+1,).
        moments: sum of ⟨x_t, x_t'⟩ over the shard's part of the train split, shape (T+1, T+1).
        clean_moments: sum of ⟨y_t, y_t'⟩ over that part, shape (T, T).
    """

    shard: Shard
    squares: NDArray[np.float64]
    moments: NDArray[np.float64]
    clean_moments: NDArray[np.float64]


def summarize(
    recipe: Recipe, span: Span, tensors: Mapping[str, NDArray[np.float16]], *, size: int, sha256: str
) -> ShardSummary:
    """Sum up the trajectories of a shard, in the order of their indices.

    Args:
        recipe: the recipe of the cache.
        span: the place of the shard in the cache.
        tensors: the shard's ``latents`` (n, T+1, …) and ``clean_estimates`` (n, T, …).
        size: the size of the shard's file [bytes].
        sha256: the hash of that file.
    """
    steps = recipe.num_steps
    squares_sum = np.zeros(steps + 1)
    moments = np.zeros((steps + 1, steps + 1))
    clean_moments = np.zeros((steps, steps))
    for index in range(span.start, span.stop):
        latents, estimates = (
            values[index - span.start].reshape(len(values[0]), -1)
            for values in (tensors["latents"], tensors["clean_estimates"])
        )
        if index < recipe.num_train:
            products = gram(latents)
            moments += products
            clean_moments += gram(estimates)
            squares_sum += np.diag(products)
        else:
            squares_sum += squares(latents)
    shard = Shard(file=span.file, start=span.start, stop=span.stop, bytes=size, sha256=sha256)
    return ShardSummary(shard=shard, squares=squares_sum, moments=moments, clean_moments=clean_moments)


def total_statistics(
    recipe: Recipe, summaries: Sequence[ShardSummary]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Compute ``mean_square``, ``second_moments`` and ``clean_second_moments`` from all shards in order."""
    train = recipe.num_train * recipe.latent_dim
    every = recipe.num_trajectories * recipe.latent_dim
    # Added in order, starting from the first shard, so that the bits do not depend on who drew which shard.
    return (
        np.asarray(sum(summary.squares for summary in summaries) / every),
        np.asarray(sum(summary.moments for summary in summaries) / train),
        np.asarray(sum(summary.clean_moments for summary in summaries) / train),
    )


def gram(rows: NDArray[np.float16]) -> NDArray[np.float64]:
    """Compute the inner products ⟨x_t, x_t'⟩ of float16 rows, the same bits on every machine.

    A matrix product's last bits depend on the library and the number of threads. So each value is split into
    a multiple of 2⁻⁴ and a rest below 2⁻⁴, which is a multiple of 2⁻²⁴ (float16's smallest number); over 4096
    dimensions all sums of their products fit into the 53 bits of a float64, hence are exact in any order.

    Args:
        rows: finite float16, shape (n, M).

    Returns:
        float64 (n, n).
    """
    total = np.zeros((len(rows), len(rows)))
    for coarse, fine in _split(rows):
        cross = _products(coarse, fine)
        total += _products(coarse, coarse) + (cross + cross.T) + _products(fine, fine)
    return total


def squares(rows: NDArray[np.float16]) -> NDArray[np.float64]:
    """Compute the diagonal of `gram`, bit for bit, at a fraction of its cost."""
    total = np.zeros(len(rows))
    for coarse, fine in _split(rows):
        cross = (coarse * fine).sum(axis=1)
        total += (coarse * coarse).sum(axis=1) + (cross + cross) + (fine * fine).sum(axis=1)
    return total


def _split(rows: NDArray[np.float16]) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Split rows into coarse and fine parts, `_GRAM_BLOCK` dimensions at a time, filled up with zeros to slices."""
    for start in range(0, rows.shape[1], _GRAM_BLOCK):
        block = rows[:, start : start + _GRAM_BLOCK].astype(np.float64)
        block = np.pad(block, ((0, 0), (0, -block.shape[1] % _GRAM_SLICE)))
        coarse = np.round(block * 16.0) / 16.0
        yield coarse, block - coarse


def _products(a: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute a bᵀ, a few dimensions at a time: a BLAS runs products this small on one thread.

    With threads, and another process on the cores, the same product took 25 times as long.
    """
    slices = (len(a), -1, _GRAM_SLICE)
    products = np.matmul(a.reshape(slices).transpose(1, 0, 2), b.reshape(slices).transpose(1, 2, 0))
    total: NDArray[np.float64] = products.sum(axis=0)
    return total
