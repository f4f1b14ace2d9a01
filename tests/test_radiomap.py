"""The gray scale of radio maps, their colors, and what a model's folder says of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from refine_env import ConfigurationError, radiomap


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


def test_a_folder_says_whether_its_images_are_maps(tmp_path: Path) -> None:
    assert radiomap.read_scale(tmp_path) is None
    radiomap.write_scale(tmp_path)
    assert radiomap.read_scale(tmp_path) == radiomap.SCALE == (-124.0, -24.0)
    other = radiomap.PowerScale(-100.0, 0.0)
    radiomap.write_scale(tmp_path, other)
    assert radiomap.read_scale(tmp_path) == other
    assert other.dbm(other.gray(-30.0)) == pytest.approx(-30.0)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"quantity": "path gain", "black_dbm": -124, "white_dbm": -24}',
        '{"quantity": "received power", "black_dbm": -24, "white_dbm": -24}',
        '{"quantity": "received power", "black_dbm": -124, "white_dbm": NaN}',
        '{"quantity": "received power", "black_dbm": -124, "white_dbm": "x"}',
    ],
)
def test_a_scale_that_is_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(content)
    with pytest.raises(
        ConfigurationError, match=r"`map\.json` must say `quantity`, 'received power', and .* got .*map"
    ):
        radiomap.read_scale(tmp_path)


def test_colors_are_matplotlib_s_viridis() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    levels = np.arange(256, dtype=np.float32)[None, :, None] / 255
    pictures = radiomap.color(np.repeat(levels[..., None], 3, axis=3))
    expected = matplotlib.colormaps["viridis"](np.arange(256))[:, :3]
    np.testing.assert_allclose(pictures[0, :, 0], expected, atol=0.5 / 255)
    np.testing.assert_array_equal(radiomap.color_bar()[:, 0], pictures[0, :, 0])


def test_buildings_are_gray() -> None:
    images = np.zeros((2, 3, 4, 3), np.float32)
    buildings = np.zeros((2, 3, 4), bool)
    buildings[1, 2, 3] = True
    pictures = radiomap.color(images, buildings)
    assert len(set(pictures[1, 2, 3].tolist())) == 1
    assert (pictures[~buildings] == radiomap.color_bar()[0, 0]).all()
    assert (radiomap.color_bar()[0, 0] < 0.5).all()  # a second call has the same table


def test_other_transmitters_are_of_the_same_scene() -> None:
    planes = np.zeros((6, 3, 2, 2), np.float16)
    planes[[1, 4], 0, 0, 0] = 1.0  # two scenes by their buildings,
    planes[3, 1, 1, 1] = 1.0  # and one by its cars
    planes[:, 2, 0, 1] = np.arange(6) / 10
    assert radiomap.other_transmitters(planes).tolist() == [2, 4, 5, -1, 1, 0]
