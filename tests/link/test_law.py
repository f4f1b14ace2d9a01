from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import special

from refine_env import ConfigurationError, SystemConfig, _store
from refine_env.link import (
    ChannelModel,
    RateChain,
    RateLaw,
    draw_rates,
    latency_quantiles,
    rate_chain,
    rate_law,
    rate_statistics,
    total_power,
)
from refine_env.link import law as law_module
from refine_env.link.gains import RayleighGains
from refine_env.link.slot_law import SlotLaw, controlled_rates, equal_power_law, quadrature_law, simulated_law

EQUAL = ChannelModel(power_allocation="equal")
M = 16384


def draw(snr_db: float, num_slots: int, seed: int = 20) -> NDArray[np.float64]:
    return draw_rates(np.random.default_rng(seed), num_slots, 60, total_power(snr_db, 60), 70.0)


def below(law: SlotLaw, rates: NDArray[np.float64]) -> NDArray[np.float64]:
    """P[R/ℓ <= r] of a tabulated law."""
    edges = law.origin + law.spacing * (np.arange(law.masses.size) + 0.5)
    return np.interp(rates, edges, np.cumsum(law.masses))


def deviations(law: RateLaw, num_slots: int, sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """P[S_N < r] at the sample's quantiles, less the sample's share, in standard errors of the sample."""
    shares = np.array([1e-3, 1e-2, 0.1, 0.5, 0.9, 0.999])
    expected = law.sum_below(num_slots, np.quantile(sums, shares))
    return (expected - shares) / np.sqrt(shares * (1.0 - shares) / sums.size)


@pytest.mark.parametrize("snr_db", [-20.0, -5.0, 0.0, 6.0, 12.0, 24.0])
def test_one_slot_and_sums_of_slots_equal_simulated_ones(snr_db: float) -> None:
    """1.2 million slots: every deviation within 4.5 standard errors, 10 % of a probability of 1e-3 for sums of 4."""
    law, rates = rate_law(snr_db), draw(snr_db, 1_200_000)
    assert law.mean == pytest.approx(rates.mean(), abs=4.5 * rates.std() / np.sqrt(rates.size))
    assert law.std == pytest.approx(rates.std(), rel=4.5 / np.sqrt(rates.size))  # kurtosis below 6
    for count in (1, 2, 4, 12):
        assert np.abs(deviations(law, count, rates.reshape(-1, count).sum(axis=1))).max() < 4.5


def test_deviations_are_noticed() -> None:
    """The check above is sharp: a tenth of a dB is far outside."""
    rates = draw(6.1, 1_200_000)
    assert np.abs(deviations(rate_law(6.0), 1, rates)).max() > 50.0


@pytest.mark.parametrize(
    ("snr_db", "slots", "error"),
    [
        (-5.0, 0, 1e-6),
        (0.0, 0, 1e-8),
        (6.0, 0, 1e-8),
        (12.0, 0, 1e-7),
        (24.0, 1_000_000, 5e-5),
        (-20.0, 4_000_000, 1e-3),
    ],
)
def test_where_quadrature_works(snr_db: float, slots: int, error: float) -> None:
    law = rate_law(snr_db)
    assert law.simulated_slots == slots
    assert 0.0 < law.error < error


def test_the_figures_of_the_model() -> None:
    """400,000 simulated slots at 0 dB: mean 4311.9 ± 0.5 (two standard errors are ± 1.0), standard deviation 315.1."""
    law = rate_law(0.0)
    assert law.mean == pytest.approx(4311.9, abs=1.0)
    for snr_db, std in ((0.0, 315.1), (6.0, 525.0), (12.0, 731.0), (24.0, 950.0)):
        assert rate_law(snr_db).std == pytest.approx(std, rel=0.003)
        assert rate_law(snr_db).std == pytest.approx(rate_statistics(snr_db).fixed_power_std, rel=0.003)


def test_quadrature_and_simulation_agree() -> None:
    """Where both work, at 12 dB: 200,000 simulated slots within four times their error, below plain ones'."""
    gains, power = RayleighGains(), total_power(12.0, 60)
    exact = quadrature_law(gains, 60, power)
    assert exact is not None
    assert exact.error < 1e-6
    assert exact.simulated_slots == 0
    rates = controlled_rates(
        gains, 60, power, lambda summarize: law_module._simulate(ChannelModel(), 60, power, 200_000, summarize)
    )
    assert rates is not None
    simulated = simulated_law(rates)
    grid = exact.origin + exact.spacing * np.arange(0, exact.masses.size, 7)
    difference = np.abs(below(exact, grid) - below(simulated, grid)).max()
    assert difference < 4.0 * simulated.error < 1e-3
    plain, _ = law_module._simulate(ChannelModel(), 60, power, 200_000, lambda gains: np.zeros(len(gains)))
    assert np.abs(below(exact, grid) - below(simulated_law(plain), grid)).max() > 3.0 * difference


def test_one_subchannel_in_closed_form() -> None:
    """K = 1: all power on it, P[R <= r] = 1 − exp(−(2^r − 1)/P). 4 million slots: 1.95/√n is rare."""
    law = rate_law(3.0, num_subchannels=1, symbols_per_slot=1.0)
    rates = np.linspace(0.05, 6.0, 300)
    exact = -np.expm1(-(2.0**rates - 1.0) / total_power(3.0, 1))
    assert law.simulated_slots == 4_000_000
    assert np.abs(law.cdf(rates) - exact).max() < 1.95 / 2000.0


def test_equal_power_in_closed_form() -> None:
    """E[log2(1 + SNR·g)] = e^{1/SNR} E_1(1/SNR)/ln 2, and K subchannels are K times one."""
    snr = 10.0**0.6
    one = np.exp(1.0 / snr) * special.exp1(1.0 / snr) / np.log(2.0)
    law = rate_law(6.0, channel=EQUAL)
    assert law.simulated_slots == 0
    assert law.mean == pytest.approx(70.0 * 60.0 * one, rel=1e-9)
    assert rate_statistics(6.0, channel=EQUAL).mean == pytest.approx(law.mean, rel=1e-9)
    assert rate_statistics(6.0, channel=EQUAL).std == pytest.approx(law.std, rel=1e-6)
    assert rate_statistics(6.0, channel=EQUAL).fixed_power_std == pytest.approx(law.std, rel=1e-6)


@pytest.mark.parametrize("num_slots", [2, 3, 5, 17, 60])
def test_a_sum_of_slots_is_one_slot_of_more_subchannels(num_slots: int) -> None:
    """With equal power, N slots of K = 20 are one slot of N·K subchannels: the convolution against a second quadrature.

    Where the probability is 1e-5 or more it is right to 0.1 %.
    """
    law = rate_law(6.0, num_subchannels=20, symbols_per_slot=1.0, channel=EQUAL)
    wide = equal_power_law(RayleighGains(), 20 * num_slots, total_power(6.0, 20 * num_slots))
    assert wide is not None
    points = wide.origin + wide.spacing * np.arange(wide.masses.size)
    exact = np.cumsum(wide.masses) - wide.masses / 2.0  # P[S < point] up to second order in the spacing
    result = law.sum_below(num_slots, points)
    likely = exact > 1e-5
    assert np.abs(result[likely] / exact[likely] - 1.0).max() < 1e-3
    assert np.abs(result - exact).max() < 2e-5


def test_many_slots_are_gaussian_but_for_the_skewness() -> None:
    """Just below and above the number of slots from which the sums are no longer tabulated."""
    law = rate_law(0.0, num_subchannels=20, symbols_per_slot=1.0, channel=EQUAL)
    count = law_module._MANY
    bits = count * law.mean + np.linspace(-3.0, 3.0, 13) * np.sqrt(count) * law.std
    shift = law.mean + np.linspace(-3.0, 3.0, 13) * law.std / (2.0 * np.sqrt(count))
    assert law.sum_below(count + 1, bits + shift) == pytest.approx(law.sum_below(count, bits), rel=2e-3)


def test_the_latency_is_the_first_slot_by_which_the_bits_are_through() -> None:
    """200,000 transmissions of 3 bits per dimension at 6 dB, within 4.5 standard errors."""
    law, bits = rate_law(6.0), 3.0 * M
    needed = 1 + (np.cumsum(draw(6.0, 2_000_000).reshape(-1, 10), axis=1) < bits).sum(axis=1)
    pmf = law.latency_pmf(bits, 9)
    assert pmf.shape == (10,)
    assert pmf[0] == 0.0
    for slots in range(1, 10):
        share = (needed == slots).mean()
        assert abs(share - pmf[slots]) < 4.5 * np.sqrt(max(pmf[slots], 1e-5) / needed.size)
    assert law.latency_sf(bits, 9) == pytest.approx(1.0 - np.cumsum(pmf), abs=1e-12)
    assert law.latency_pmf(bits, 5).sum() == pytest.approx(1.0 - law.latency_sf(bits, 5)[-1], abs=1e-12)


def test_latencies_of_arrays_are_those_of_their_values() -> None:
    law = rate_law(6.0)
    bits = M * np.arange(1.0, 17.0).reshape(2, 8)
    together = law.latency_pmf(bits, 40)
    assert together.shape == (2, 8, 41)
    for place in np.ndindex(2, 8):
        assert np.array_equal(together[place], law.latency_pmf(bits[place], 40))


def test_a_known_first_rate_shortens_the_payload() -> None:
    law = rate_law(6.0)
    bits, rates = 3.0 * M, np.array([[0.0], [9000.0], [3.0 * M - 1.0], [3.0 * M], [1e6]])
    known = law.latency_pmf(bits, 12, first_rate=rates[:, 0])
    assert known[1, 1:] == pytest.approx(np.append(0.0, law.latency_pmf(bits - 9000.0, 11)[1:]), abs=1e-12)
    assert known[0, 1:] == pytest.approx(np.append(0.0, law.latency_pmf(bits, 11)[1:]), abs=1e-12)
    assert known[2, 2] == pytest.approx(1.0, abs=1e-12)
    assert known[3, 1] == known[4, 1] == 1.0
    assert law.latency_pmf(np.array([bits, bits]), 12, first_rate=rates).shape == (5, 2, 13)
    # Averaged over the first rate, nothing is known.
    levels = law.quantize(400)
    average = levels.probabilities @ law.latency_pmf(bits, 12, first_rate=levels.rates)
    assert average == pytest.approx(law.latency_pmf(bits, 12), abs=2e-4)


def test_quantiles_of_the_latency() -> None:
    law = rate_law(0.0)
    for bits in (3.0 * M, 16.0 * M, 8192.0):
        for quantile in (0.1, 0.5, 0.9, 0.999):
            slots = law.latency_quantile(bits, quantile)
            tail = law.latency_sf(bits, slots)
            assert tail[slots] <= 1.0 - quantile < tail[slots - 1]
    assert latency_quantiles(M, (3, 16), law).tolist() == [law.latency_quantile(b * M) for b in (3, 16)]
    # [K]'s standard deviation is 1.8 times too wide here: it never promises less time.
    assert (latency_quantiles(M, range(1, 17), law) <= latency_quantiles(M, range(1, 17), rate_statistics(0.0))).all()
    assert law.latency_quantile(1e12) == pytest.approx(1e12 / law.mean, rel=1e-4)
    assert law.latency_quantile(1e30) == pytest.approx(1e30 / law.mean, rel=1e-9)


def test_levels() -> None:
    law = rate_law(6.0)
    levels = law.quantize(8)
    assert levels.probabilities == pytest.approx(np.full(8, 1 / 8), abs=1e-6)
    assert levels.transition.shape == (8, 8)
    assert (levels.transition == levels.probabilities).all()
    assert levels.probabilities @ levels.rates == pytest.approx(law.mean, rel=1e-9)
    assert levels.level_of(levels.rates).tolist() == list(range(8))
    rates = draw(6.0, 400_000)
    own = levels.level_of(rates)
    for i in range(8):
        assert rates[own == i].mean() == pytest.approx(levels.rates[i], abs=4.5 * law.std / np.sqrt(50_000))
    single = law.quantize(1)
    assert (single.rates, single.edges.size) == (pytest.approx([law.mean]), 0)


def test_quantile_is_the_inverse_of_the_cdf() -> None:
    law = rate_law(6.0)
    shares = np.array([1e-4, 0.01, 0.5, 0.99])
    assert law.cdf(law.quantile(shares)) == pytest.approx(shares, rel=1e-3)
    assert law.grid.shape == law.pmf.shape
    assert law.pmf.sum() == pytest.approx(1.0)
    assert repr(law).startswith("RateLaw(mean=8594.3")


class TestKeeping:
    """On disk and in memory; each test computes a law of its own, small enough to be quick."""

    @pytest.fixture(autouse=True)
    def fresh(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(_store.DIRECTORY_VARIABLE, str(tmp_path / "store"))
        law_module._unit_law.cache_clear()

    @staticmethod
    def law(symbols_per_slot: float = 1.0) -> RateLaw:
        return rate_law(6.0, 30, symbols_per_slot, channel=EQUAL)

    def test_one_law_for_every_number_of_symbols(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = self.law()
        assert len(list((tmp_path / "store").iterdir())) == 1
        monkeypatch.setattr(law_module, "_compute", None)  # nothing is computed again
        assert self.law(70.0).mean == pytest.approx(70.0 * first.mean)
        law_module._unit_law.cache_clear()
        again = self.law()
        assert again.pmf.tobytes() == first.pmf.tobytes()
        assert (again.mean, again.std, again.error) == (first.mean, first.std, first.error)
        with pytest.raises(TypeError, match="not callable"):  # another link is another law
            rate_law(6.1, 30, 1.0, channel=EQUAL)

    @pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "folder"])
    def test_a_damaged_file_is_computed_anew(self, tmp_path: Path, damage: str) -> None:
        expected = self.law().pmf
        (file,) = (tmp_path / "store").iterdir()
        data = file.read_bytes()
        file.unlink()
        if damage == "folder":
            file.mkdir()
        else:
            middle = len(data) // 2
            flipped = data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]
            file.write_bytes({"truncated": data[:-8], "flipped": flipped, "empty": b""}[damage])
        law_module._unit_law.cache_clear()
        assert self.law().pmf.tobytes() == expected.tobytes()
        if damage != "folder":
            assert file.read_bytes() == data
        assert len(list((tmp_path / "store").iterdir())) == 1  # no temporary file is left

    def test_without_a_place_to_write(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv(_store.DIRECTORY_VARIABLE, str(tmp_path / "file" / "store"))
        assert self.law().mean > 0.0
        monkeypatch.setenv(_store.DIRECTORY_VARIABLE, "")
        law_module._unit_law.cache_clear()
        assert self.law().mean > 0.0
        assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def test_a_write_that_fails_leaves_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*_: object) -> None:
            raise OSError("disk full")

        monkeypatch.setattr("os.replace", fail)
        assert self.law().mean > 0.0
        assert list((tmp_path / "store").iterdir()) == []

    def test_the_users_folder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv(_store.DIRECTORY_VARIABLE)
        monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
        assert _store.store_directory() == Path("/caches/refine-env")
        monkeypatch.setenv("XDG_CACHE_HOME", "")
        monkeypatch.setenv("HOME", "/home/someone")
        assert _store.store_directory() == Path("/home/someone/.cache/refine-env")

    def test_a_user_without_a_home(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Then nothing is kept, and no folder named ``~`` is made."""
        monkeypatch.delenv(_store.DIRECTORY_VARIABLE)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(os.path, "expanduser", lambda path: path)
        assert _store.store_directory() is None

    def test_the_same_bytes_on_any_number_of_threads(self) -> None:
        code = (
            "import hashlib; from refine_env.link import rate_law; law = rate_law(6.0);"
            "print(hashlib.sha256(law.pmf.tobytes() + str((law.mean, law.std, law.error)).encode()).hexdigest())"
        )
        root = Path(__file__).parents[2]
        digests = set()
        for threads in ("1", "4"):
            settings = {"OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads, _store.DIRECTORY_VARIABLE: ""}
            environment = {**os.environ, **settings, "PYTHONPATH": str(root)}
            result = subprocess.run(
                [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
            )
            digests.add(result.stdout)
        assert len(digests) == 1


def test_the_law_of_a_configuration() -> None:
    config = SystemConfig(snr_db=6.0, latent_dim=256)
    assert config.rate_law.mean / 256 == pytest.approx(rate_law(6.0).mean / M)
    assert config.latency_law is config.rate_statistics
    exact = SystemConfig(snr_db=6.0, latent_dim=256, latency_model="exact")
    assert exact.latency_law is exact.rate_law
    with pytest.raises(ConfigurationError, match=r"`snr_db` must be one number for the rate law, got the range"):
        _ = SystemConfig(snr_db=(0.0, 6.0)).rate_law
    with pytest.raises(ConfigurationError, match=r"`latency_model` must be one of 'paper', 'exact', got 'gaussian'"):
        SystemConfig(snr_db=6.0, latency_model="gaussian")


@pytest.mark.parametrize("make", [rate_law, rate_chain])
def test_the_former_name_of_the_survival_function_works_and_warns(make: Callable[[float], RateLaw | RateChain]) -> None:
    law = make(6.0)
    with pytest.warns(DeprecationWarning, match="`latency_tail` is now called `latency_sf`"):
        assert np.array_equal(law.latency_tail(40_000.0, 9), law.latency_sf(40_000.0, 9))


def test_bad_arguments() -> None:
    law = rate_law(6.0)
    with pytest.raises(ConfigurationError, match="`bits` must be > 0, got 0.0"):
        law.latency_pmf(0.0, 5)
    with pytest.raises(ConfigurationError, match="`bits` must be > 0"):
        law.latency_sf(np.array([1.0, np.nan]), 5)
    with pytest.raises(ConfigurationError, match="`max_slots` must be an integer >= 0, got -1"):
        law.latency_pmf(1.0, -1)
    with pytest.raises(ConfigurationError, match="`first_rate` must be >= 0, got -1.0"):
        law.latency_pmf(1.0, 5, first_rate=-1.0)
    with pytest.raises(ConfigurationError, match="`num_levels` must be an integer in 1"):
        law.quantize(0)
    with pytest.raises(ConfigurationError, match="`quantile` must lie strictly between 0 and 1, got 1.0"):
        law.latency_quantile(1.0, 1.0)
    with pytest.raises(ConfigurationError, match="`snr_db` must lie in"):
        rate_law(1e3)
    with pytest.raises(ConfigurationError, match="`symbols_per_slot` must be > 0"):
        rate_law(6.0, symbols_per_slot=0.0)
