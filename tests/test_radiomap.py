"""The gray scale of radio maps."""

from __future__ import annotations

import numpy as np
import pytest

from refine_env import radiomap


def test_the_scale_is_that_of_radiomapseer() -> None:
    # Path gains of -147, -127 and -47 dB at 23 dBm: black, the noise floor at a fifth, white.
    np.testing.assert_allclose(radiomap.gray([-124.0, -104.0, -24.0]), [0.0, 0.2, 1.0], atol=1e-7)
    assert pytest.approx(-174.0 + 10.0 * np.log10(10e6)) == radiomap.NOISE_FLOOR_DBM


def test_powers_beyond_the_limits_are_clipped() -> None:
    level = radiomap.gray(np.array([[-300.0, -np.inf], [0.0, 99.0]]))
    assert level.dtype == np.float32
    np.testing.assert_array_equal(level, [[0.0, 0.0], [1.0, 1.0]])


def test_dbm_is_the_inverse_of_gray() -> None:
    power = np.linspace(radiomap.BLACK_DBM, radiomap.WHITE_DBM, 1001)
    np.testing.assert_allclose(radiomap.dbm(radiomap.gray(power)), power, atol=1e-5)
    assert radiomap.dbm(1.1) == pytest.approx(-14.0)  # what a model draws beyond the scale stays on the line
