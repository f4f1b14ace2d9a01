from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from refine_env import ConfigurationError
from refine_env.link import slot_rates, total_power, waterfill


def waterfill_by_sorting(gains: NDArray[np.float64], power: float) -> NDArray[np.float64]:
    """The plain NumPy twin: sort, cumulative sum, the largest set whose level lies above its floors."""
    floors = np.sort(1.0 / gains, axis=-1)
    counts = np.arange(1, gains.shape[-1] + 1)
    levels = (power + np.cumsum(floors, axis=-1)) / counts
    active = (levels > floors).sum(axis=-1)
    level = np.take_along_axis(levels, active[..., None] - 1, axis=-1)
    return np.maximum(0.0, level - 1.0 / gains)


def test_two_subchannels_by_hand() -> None:
    # Floors 1 and 4. Power 2 stays below the second floor: level 3. Power 5: level (5 + 1 + 4)/2 = 5.
    assert waterfill([1.0, 0.25], 2.0).tolist() == [2.0, 0.0]
    assert waterfill([1.0, 0.25], 5.0).tolist() == [4.0, 1.0]


@pytest.mark.parametrize("shape", [(60,), (7, 60), (2, 3, 60), (5, 1)])
def test_equals_the_sorting_twin(shape: tuple[int, ...], rng: np.random.Generator) -> None:
    gains = rng.standard_exponential(shape)
    for power in (1e-3, 1.0, 60.0, 1e5):
        powers = waterfill(gains, power)
        assert powers.shape == shape
        assert powers == pytest.approx(waterfill_by_sorting(gains, power), rel=1e-12, abs=1e-12 * power)
        assert powers.sum(axis=-1) == pytest.approx(power, rel=1e-12)


@given(
    gains=hnp.arrays(np.float64, st.integers(1, 12), elements=st.floats(1e-6, 50.0)),
    power=st.floats(1e-3, 1e4),
)
def test_optimality_conditions(gains: NDArray[np.float64], power: float) -> None:
    powers = waterfill(gains, power)
    assert (powers >= 0.0).all()
    assert powers.sum() == pytest.approx(power, rel=1e-9)
    levels = powers + 1.0 / gains
    level = levels[powers > 0.0].max()
    tolerance = 1e-9 * level
    assert (levels[powers > 0.0] >= level - tolerance).all()  # one common level where power flows
    assert (1.0 / gains[powers == 0.0] >= level - tolerance).all()  # and floors above it elsewhere


@pytest.mark.parametrize("power", [1e-18, 1e-12, 1e-6, 1e6, 1e18])
def test_the_power_is_spent_however_small(power: float, rng: np.random.Generator) -> None:
    """Floors are around 1: a power of 1e-18 is far below their rounding."""
    powers = waterfill(rng.standard_exponential((500, 60)), power)
    assert powers.sum(axis=-1) == pytest.approx(power, rel=1e-12)


def test_rates_are_finite_and_rise_with_the_snr(rng: np.random.Generator) -> None:
    gains = rng.standard_exponential((100, 60))
    rates = np.array([slot_rates(gains, total_power(snr_db, 60), 70.0) for snr_db in range(-200, 201, 5)])
    assert np.isfinite(rates).all()
    assert (rates > 0.0).all()
    assert (np.diff(rates, axis=0) > 0.0).all()
    # So little power goes to the best subchannel alone, and the logarithm is linear.
    assert rates[0] == pytest.approx(70.0 * 60e-20 * gains.max(axis=1) / np.log(2), rel=1e-9)


@pytest.mark.parametrize(
    ("gains", "symbols", "message"),
    [
        ([1.0, 2.0], 70.0, r"`gains` must have shape \(slots, K\), got \(2,\)"),
        ([[1.0, -2.0]], 70.0, "`gains` must be finite and >= 0"),
        ([[1.0, 2.0]], 0.0, "`symbols_per_slot` must be > 0"),
    ],
)
def test_bad_input_to_rates(gains: object, symbols: float, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        slot_rates(gains, 1.0, symbols)  # type: ignore[arg-type]


def test_dead_subchannels() -> None:
    assert waterfill([[0.0, 2.0], [0.0, 0.0]], 3.0).tolist() == [[0.0, 3.0], [0.0, 0.0]]
    assert slot_rates([[0.0, 0.0]], 3.0, 70.0).tolist() == [0.0]


@pytest.mark.parametrize(
    ("gains", "power", "message"),
    [
        ([1.0, -0.1], 1.0, "`gains` must be finite and >= 0"),
        ([1.0, np.inf], 1.0, "`gains` must be finite and >= 0"),
        (1.0, 1.0, r"`gains` must be numbers of shape \(..., K\)"),
        ("x", 1.0, r"`gains` must be numbers of shape \(..., K\)"),
        ([[1.0], [1.0, 2.0]], 1.0, r"`gains` must be numbers of shape \(..., K\)"),
        ([1.0], "x", "`total_power` must be a finite number, got 'x'"),
        ([1.0], True, "`total_power` must be a finite number, got True"),
        ([1.0], 0.0, "`total_power` must be > 0, got 0.0"),
        ([1.0], np.nan, "`total_power` must be a finite number, got nan"),
    ],
)
def test_bad_input(gains: object, power: float, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        waterfill(gains, power)  # type: ignore[arg-type]


def test_rates_equal_the_printed_formula(rng: np.random.Generator) -> None:
    gains = rng.standard_exponential((200, 60))
    for snr_db in (-20.0, 0.0, 30.0):
        power = total_power(snr_db, 60)
        expected = 70.0 * np.log2(1.0 + waterfill_by_sorting(gains, power) * gains).sum(axis=-1)
        assert slot_rates(gains, power, 70.0) == pytest.approx(expected, rel=1e-12)


def test_snr_references() -> None:
    assert total_power(10.0, 60) == pytest.approx(600.0)
    assert total_power(10.0, 60, "total") == pytest.approx(10.0)
    with pytest.raises(ConfigurationError, match="`snr_reference` must be one of 'subchannel', 'total', got 'x'"):
        total_power(10.0, 60, "x")
