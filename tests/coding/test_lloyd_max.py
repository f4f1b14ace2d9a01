from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import integrate

from refine_env import ConfigurationError
from refine_env.coding import LloydMax, base_distortion
from refine_env.coding.kernels import quantize_value


def test_one_bit_in_closed_form() -> None:
    quantizer = LloydMax(1)
    assert quantizer.levels == pytest.approx(np.array([-1, 1]) * np.sqrt(2 / np.pi), abs=1e-15)
    assert quantizer.thresholds.tolist() == [0.0]
    assert quantizer.distortion == pytest.approx(1 - 2 / np.pi, abs=1e-15)


@pytest.mark.parametrize("bits", [1, 2, 3, 5])
def test_distortion_equals_the_integral(bits: int) -> None:
    quantizer = LloydMax(bits)

    def integrand(z: float) -> float:
        error = z - quantizer.quantize(np.array(z))
        return float(error**2 * np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi))

    ends = [-12.0, *quantizer.thresholds, 12.0]
    total = sum(integrate.quad(integrand, a, b)[0] for a, b in itertools.pairwise(ends))
    assert quantizer.distortion == pytest.approx(total, rel=1e-9)


@pytest.mark.parametrize("bits", [8, 12, 15])
def test_distortion_approaches_panter_dite(bits: int) -> None:
    ratio = base_distortion(bits) / (2.0 ** (-2 * bits) * np.pi * np.sqrt(3) / 2)
    assert 1 - 12 * 2.0**-bits < ratio < 1


def test_simulated_distortion(rng: np.random.Generator) -> None:
    """400,000 draws: the standard error is below 0.4 % of D_base."""
    z = rng.standard_normal(400_000)
    for bits in (3, 4, 8):
        error = np.mean((z - LloydMax(bits).quantize(z)) ** 2)
        assert error == pytest.approx(base_distortion(bits), rel=0.015)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_quantize_gives_level_values_in_the_input_dtype(dtype: type) -> None:
    quantizer = LloydMax(3)
    z = np.array([[-9.0, -0.1], [0.1, 9.0]], dtype=dtype)
    quantized = quantizer.quantize(z)
    assert quantized.dtype == dtype
    assert quantized.tolist() == quantizer.levels[[0, 3, 4, 7]].astype(dtype).reshape(2, 2).tolist()


def look_up(bits: int, values: NDArray[np.float32]) -> list[float]:
    table = LloydMax(bits).table
    return [quantize_value(value, table.cells) for value in values]


def searched(bits: int, values: NDArray[np.float32]) -> list[float]:
    """The plain NumPy twin."""
    table = LloydMax(bits).table
    return table.levels[np.searchsorted(table.thresholds, values, side="left")].tolist()


@given(st.integers(1, 15), st.floats(-40, 40, width=32))
def test_table_lookup_equals_searchsorted(bits: int, value: float) -> None:
    values = np.array([value], dtype=np.float32)
    assert look_up(bits, values) == searched(bits, values)


@pytest.mark.parametrize("bits", range(1, 16))
def test_table_lookup_where_it_could_go_wrong(bits: int) -> None:
    """At and beside every threshold and every edge of a bin."""
    table = LloydMax(bits).table
    origin, bins_per_unit = np.float64(table.cells.origin), np.float64(table.cells.bins_per_unit)
    edges = origin + np.arange(-2, len(table.cells.rows) + 3) / bins_per_unit
    exact = np.concatenate([table.thresholds, edges.astype(np.float32), np.float32([-1e30, 1e30])])
    for values in (exact, np.nextafter(exact, np.float32(99)), np.nextafter(exact, np.float32(-99))):
        assert look_up(bits, values) == searched(bits, values)


@pytest.mark.parametrize("bits", range(1, 16))
def test_three_neighboring_bins_meet_at_most_one_threshold(bits: int) -> None:
    table = LloydMax(bits).table
    bins = np.floor((table.thresholds.astype(np.float64) - table.cells.origin) * np.float64(table.cells.bins_per_unit))
    assert (np.diff(bins) >= 3).all()


def test_lossless_has_no_distortion_and_no_quantizer() -> None:
    assert base_distortion(16) == 0.0
    with pytest.raises(ConfigurationError, match=r"`bits` must be an integer in 1 … 15, got 16. .* lossless"):
        LloydMax(16)


@pytest.mark.parametrize("bits", [0, -1, 17, 3.0, True])
def test_bad_bits(bits: object) -> None:
    with pytest.raises(ConfigurationError, match="`bits` must be an integer in 1 … 16, got"):
        base_distortion(bits)  # type: ignore[arg-type]


def test_integers_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="`z` must be of a floating dtype, got int64"):
        LloydMax(3).quantize(np.array([1, 2]))
    with pytest.raises(ConfigurationError, match="`z` must hold numbers, got NaN"):
        LloydMax(3).quantize(np.array([1.0, np.nan]))
