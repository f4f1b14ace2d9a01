from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from refine_env import CacheError, ConfigurationError, NoiseSchedule, TrajectoryCache
from refine_env.trajectories import generate_forward_process, generate_gaussian, sample_seed
from refine_env.trajectories.forward_process import forward_process

SCHEDULE = NoiseSchedule([1.0, 0.7, 0.2])
SHAPE = (1, 2, 3)


@pytest.fixture(scope="module")
def ideal(tmp_path_factory: pytest.TempPathFactory) -> TrajectoryCache:
    """160 trajectories of 4096 dimensions: 655,360 values at each of 51 steps."""
    return generate_gaussian(tmp_path_factory.mktemp("ideal") / "cache", 160, (4, 32, 32), seed=2, num_train=160)


def everything(cache: TrajectoryCache) -> NDArray[np.float16]:
    return np.stack([cache.latents(index) for index in cache.indices("all")])


PINNED_SEED = 7_711_540_714_544_783
PINNED_BITS = [
    15011,
    15143,
    16323,
    13805,
    47722,
    15271,
    16129,
    14305,
    16737,
    12069,
    46564,
    14877,
    13329,
    13783,
    15750,
    46886,
    15485,
    14768,
]


class TestLaw:
    """With 655,360 Gaussian values a mean square has a relative standard deviation of 0.17 %: 1 % is 5.7 of them."""

    def test_distortion_of_diffusion(self, ideal: TrajectoryCache) -> None:
        """[K] Eq. (9): D_diff(t) = 2(1 − √ᾱ_t)."""
        moments = ideal.second_moments
        simulated = np.diag(moments) - 2 * moments[0] + moments[0, 0]
        model = 2 * (1 - np.sqrt(ideal.schedule.alpha_bar))
        assert simulated[0] == 0
        np.testing.assert_allclose(simulated[1:], model[1:], rtol=0.01)

    def test_second_moments(self, ideal: TrajectoryCache) -> None:
        """G[t, t'] = √(ᾱ_max/ᾱ_min) < 1 with ᾱ of the later over that of the earlier step."""
        alpha_bar = ideal.schedule.alpha_bar
        lesser, greater = np.minimum.outer(alpha_bar, alpha_bar), np.maximum.outer(alpha_bar, alpha_bar)
        np.testing.assert_allclose(ideal.second_moments, np.sqrt(lesser / greater), rtol=0, atol=0.01)
        np.testing.assert_allclose(ideal.mean_square, 1.0, rtol=0.01)

    def test_error_of_the_clean_estimates(self, ideal: TrajectoryCache) -> None:
        """The linear estimate from x_{t+1} has the error 1 − ᾱ_{t+1}."""
        assert ideal.manifest.recipe.clean_estimates == "linear-mmse"
        assert ideal.mmse[0] == 0
        np.testing.assert_allclose(ideal.mmse[1:-1], 1 - ideal.schedule.alpha_bar[2:], rtol=0.01)
        np.testing.assert_allclose(ideal.mmse[-1], 1, rtol=0.01)

    def test_steps_are_markov(self, ideal: TrajectoryCache) -> None:
        """The noise of each step is white and independent of everything before it."""
        x = everything(ideal)[:40].astype(np.float64).reshape(40, 51, -1)
        alpha = ideal.schedule.alpha
        noise = (x[:, 1:] - np.sqrt(alpha)[:, None] * x[:, :-1]) / np.sqrt(1 - alpha)[:, None]
        moments = np.einsum("ntm,num->tu", noise, noise) / (40 * 4096)
        np.testing.assert_allclose(moments, np.eye(50), rtol=0, atol=0.016)  # 6.5 standard deviations
        with_clean = np.einsum("ntm,nm->t", noise, x[:, 0]) / (40 * 4096)
        np.testing.assert_allclose(with_clean, 0, rtol=0, atol=0.016)

    def test_noise_is_independent_of_a_cache_of_the_same_seed(self, ideal: TrajectoryCache, tmp_path: Path) -> None:
        """A generator seeded alike must not give x_0 again as the first noise."""
        again = generate_forward_process(tmp_path / "again", ideal, seed=2)
        x = everything(again)[:, :2].astype(np.float64)
        noise = x[:, 1] - np.sqrt(again.schedule.alpha[0]) * x[:, 0]
        assert abs(np.corrcoef(noise.ravel(), x[:, 0].ravel())[0, 1]) < 0.01


def test_by_hand(rng: np.random.Generator) -> None:
    """x_t = √α_t x_{t−1} + √(1 − α_t) ε_t; y_t = √ᾱ_{t+1} x_{t+1}; y_0 = x_0."""
    clean = np.array([1.0, -2.0], dtype=np.float32)
    seed = int(rng.integers(1000))
    first, second = np.random.default_rng(seed).standard_normal((2, 2), dtype=np.float32)
    latents, estimates = forward_process(clean, SCHEDULE, np.random.default_rng(seed))
    x1 = np.sqrt(0.7) * clean + np.sqrt(0.3) * first
    x2 = np.sqrt(0.2 / 0.7) * x1 + np.sqrt(1 - 0.2 / 0.7) * second
    np.testing.assert_allclose(latents, [clean, x1, x2], rtol=1e-3)
    np.testing.assert_allclose(estimates, [clean, np.sqrt(0.2) * x2], rtol=1e-3)
    assert clean.tolist() == [1.0, -2.0]


class TestSeeds:
    def test_same_and_other(self, tmp_path: Path) -> None:
        caches = [
            generate_gaussian(tmp_path / str(number), 4, SHAPE, schedule=SCHEDULE, seed=seed)
            for number, seed in enumerate([3, 3, 4])
        ]
        same, again, other = map(everything, caches)
        np.testing.assert_array_equal(same, again)
        assert (same != other).any(axis=(1, 2, 3, 4)).all()
        assert len(np.unique(same.reshape(4, -1), axis=0)) == 4

    def test_a_sample_does_not_depend_on_the_others(self, tmp_path: Path) -> None:
        few = generate_gaussian(tmp_path / "few", 3, SHAPE, schedule=SCHEDULE, seed=3, shard_size=2)
        many = generate_gaussian(tmp_path / "many", 8, SHAPE, schedule=SCHEDULE, seed=3, shard_size=5)
        np.testing.assert_array_equal(everything(few), everything(many)[:3])

    def test_neighboring_base_seeds_share_nothing(self) -> None:
        seeds = {sample_seed(base, index) for base in range(30) for index in range(30)}
        assert len(seeds) == 900
        assert max(seeds) < 2**53

    def test_pinned(self, tmp_path: Path) -> None:
        """Caches made today and tomorrow are the same: seeds and values of one sample, to the bit."""
        cache = generate_gaussian(tmp_path / "cache", 1, SHAPE, schedule=SCHEDULE, seed=0)
        assert cache.seed(0) == sample_seed(0, 0) == PINNED_SEED
        assert cache.latents(0).view(np.uint16).ravel().tolist() == PINNED_BITS


class TestGivenLatents:
    latents = np.random.default_rng(1).standard_normal((5, *SHAPE)).astype(np.float32)

    def test_taken_as_they_are(self, tmp_path: Path) -> None:
        cache = generate_forward_process(tmp_path / "cache", 3 * self.latents, schedule=SCHEDULE)
        assert len(cache) == 5
        for index in range(5):
            expected = (3 * self.latents[index]).astype(np.float16)
            np.testing.assert_array_equal(cache.latents(index)[0], expected)
        assert cache.prompt(0) is None
        assert cache.indices("train").tolist() == [0, 1]

    @pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
    def test_files_and_array_agree(self, tmp_path: Path, dtype: Any) -> None:
        latents = self.latents.astype(np.float16).astype(dtype)
        np.save(tmp_path / "x.npy", latents)
        save_file({"anything": latents}, tmp_path / "one.safetensors")
        save_file({"latents": latents, "other": latents[:1]}, tmp_path / "two.safetensors")
        sources: list[Any] = [
            latents,
            *(tmp_path / name for name in ("x.npy", "one.safetensors", "two.safetensors")),
        ]
        caches = [
            generate_forward_process(tmp_path / str(number), source, schedule=SCHEDULE, prompts=list("abcde"))
            for number, source in enumerate(sources)
        ]
        names = []
        for cache in caches:
            np.testing.assert_array_equal(everything(cache), everything(caches[0]))
            assert cache.prompt(2) == "c"
            clean = cache.manifest.recipe.clean_latents
            assert clean is not None
            names.append(clean["name"])
            assert clean["sha256"] == (caches[0].manifest.recipe.clean_latents or {})["sha256"]
        assert names == ["array", "x.npy", "one.safetensors", "two.safetensors"]

    def test_from_a_cache(self, tmp_path: Path) -> None:
        origin = generate_forward_process(
            tmp_path / "origin", self.latents, schedule=SCHEDULE, prompts=list("abcde"), num_train=3
        )
        for number, source in enumerate([origin, origin.path]):
            cache = generate_forward_process(tmp_path / str(number), source, seed=1)
            assert cache.schedule == SCHEDULE
            assert cache.indices("train").tolist() == [0, 1, 2]
            assert [cache.prompt(index) for index in range(5)] == list("abcde")
            np.testing.assert_array_equal(everything(cache)[:, 0], everything(origin)[:, 0])
            assert (everything(cache)[:, 1] != everything(origin)[:, 1]).any()
        assert generate_forward_process(tmp_path / "longer", origin, num_steps=7).num_steps == 7

    def test_other_latents_are_another_request(self, tmp_path: Path) -> None:
        generate_forward_process(tmp_path / "cache", self.latents, schedule=SCHEDULE)
        with pytest.raises(CacheError, match="must not be replaced unasked, got .* clean_latents = "):
            generate_forward_process(tmp_path / "cache", self.latents + 1e-3, schedule=SCHEDULE)

    @pytest.mark.parametrize(
        ("latents", "match"),
        [
            (
                np.zeros(3),
                r"`clean_latents` must be a floating-point array \(N, C, H, W\), N >= 1, got float64 of shape",
            ),
            (np.zeros((0, 1, 2)), r"N >= 1, got float64 of shape \(0, 1, 2\)"),
            (np.zeros((2, 3), dtype=np.int64), "must be a floating-point array .* got int64"),
            (np.array([[0.0, 1.0], [np.nan, 0.0]]), "must be finite, got nan in latent 1"),
            (np.array([[0.0], [np.inf]]), "must be finite, got inf in latent 1"),
        ],
    )
    def test_refused(self, tmp_path: Path, latents: Any, match: str) -> None:
        with pytest.raises(ConfigurationError, match=match):
            generate_forward_process(tmp_path / "cache", latents)
        assert list(tmp_path.iterdir()) == []

    def test_unreadable_files(self, tmp_path: Path) -> None:
        (tmp_path / "bad.npy").write_bytes(b"no array")
        (tmp_path / "bad.safetensors").write_bytes(b"no tensors")
        np.save(tmp_path / "objects.npy", np.array([{}], dtype=object))
        save_file({"a": self.latents, "b": self.latents}, tmp_path / "many.safetensors")
        for name in ("bad.npy", "bad.safetensors", "objects.npy", "none.npy"):
            with pytest.raises(ConfigurationError, match=rf"must be a readable .npy or .safetensors .* got .*{name}"):
                generate_forward_process(tmp_path / "cache", tmp_path / name)
        with pytest.raises(ConfigurationError, match=r"one called 'latents', got \['a', 'b'\]"):
            generate_forward_process(tmp_path / "cache", tmp_path / "many.safetensors")
        with pytest.raises(CacheError, match="must be the name or the folder of a trajectory cache"):
            generate_forward_process(tmp_path / "cache", "no-such-cache")

    @pytest.mark.parametrize("scale", [7e4, -7e4])
    def test_beyond_float16(self, tmp_path: Path, scale: float) -> None:
        latents = self.latents.copy()
        latents[3, 0, 1, 2] = scale
        with pytest.raises(
            CacheError,
            match=r"`latents` of trajectory 3 must be finite and within float16's ±65504, got -?inf at t = 0",
        ):
            generate_forward_process(tmp_path / "cache", latents, schedule=SCHEDULE, shard_size=2)

    def test_number_of_prompts(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="`prompts` must be one per clean latent, 5, got 2"):
            generate_forward_process(tmp_path / "cache", self.latents, prompts=["a", "b"])


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "match"),
        [
            ({"num_trajectories": 0}, "`num_trajectories` must be an integer in 1 … 10000000, got 0"),
            ({"num_trajectories": 10**20}, "`num_trajectories` must be an integer in 1 … 10000000, got 1000"),
            ({"latent_shape": ()}, "`latent_shape` must have 1 … 16 dimensions, got 0"),
            ({"latent_shape": (1,) * 65}, "`latent_shape` must have 1 … 16 dimensions, got 65"),
            ({"latent_shape": (10**11, 1, 1)}, "`latent_shape` must make at most 2147483647 numbers"),
            ({"latent_shape": (10**400,)}, "`latent_shape` must make at most 2147483647 numbers"),
            ({"note": "bad\udce9"}, "`note` must be text that UTF-8 can hold"),
            ({"latent_shape": (4, 0)}, "`latent_shape` must be an integer >= 1, got 0"),
            ({"num_steps": 0}, "`num_steps` must be an integer in 1 … 999, got 0"),
            ({"num_steps": 3, "schedule": SCHEDULE}, "`num_steps` must be the schedule's own 2, got 3"),
            ({"seed": -1}, "`seed` must be an integer >= 0, got -1"),
            ({"seed": 1.5}, "`seed` must be an integer >= 0, got 1.5"),
            ({"num_train": 0}, "`num_train` must be an integer in 1 … 4, got 0"),
            ({"num_train": 5}, "`num_train` must be an integer in 1 … 4, got 5"),
            ({"shard_size": 0}, "`shard_size` must be an integer >= 1, got 0"),
        ],
    )
    def test_refused(self, tmp_path: Path, arguments: dict[str, Any], match: str) -> None:
        with pytest.raises(ConfigurationError, match=match):
            generate_gaussian(**{"path": tmp_path / "cache", "num_trajectories": 4, "latent_shape": SHAPE, **arguments})
        assert list(tmp_path.iterdir()) == []

    def test_any_shape_one_sample_and_a_note(self, tmp_path: Path) -> None:
        cache = generate_gaussian(tmp_path / "cache", 1, (7,), num_steps=2, note="CC0 · “frei”")
        assert cache.latents(0).shape == (3, 7)
        assert cache.clean_estimates(0).shape == (2, 7)
        assert len(cache.indices("test")) == 0
        assert cache.manifest.recipe.note == "CC0 · “frei”"
        assert cache.schedule == NoiseSchedule.stable_diffusion(2)

    def test_progress_goes_forward(self, tmp_path: Path) -> None:
        calls: list[tuple[str, float, int]] = []
        generate_gaussian(
            tmp_path / "cache",
            5,
            SHAPE,
            schedule=SCHEDULE,
            shard_size=2,
            progress=lambda phase, done, total: calls.append((phase, done, total)),
        )
        assert [done for phase, done, _ in calls if phase == "sampling"] == [0, 1, 2, 3, 4, 5]
        assert [done for phase, done, _ in calls if phase == "checking"] == [2, 4, 5]  # by shards
        assert {total for _, _, total in calls} == {5}
