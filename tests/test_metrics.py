"""Image metrics: closed forms, the finite PSNR of identical images, and LPIPS with a stand-in and, where it is
installed, with the package itself (trunk with random weights: the code path, not a perceptual distance)."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from refine_env import ConfigurationError, MissingExtraError, radiomap
from refine_env.metrics import (
    LPIPS,
    MAX_PSNR_DB,
    GlyphTask,
    MapTask,
    MissingWeightsError,
    best_transmitter_agreement,
    coverage_iou,
    mean_square_error,
    psnr,
    shrink,
    ssim,
)

pytest.importorskip("skimage")


def constant(value: float, count: int = 1, size: int = 16) -> np.ndarray[Any, Any]:
    return np.full((count, size, size, 3), value, dtype=np.float32)


def test_psnr_of_a_constant_error_is_20_db_per_decade() -> None:
    reference = constant(0.25, 3)
    images = reference + np.array([0.1, 0.01, 0.5], dtype=np.float32)[:, None, None, None]
    assert psnr(reference, images) == pytest.approx([20.0, 40.0, -10 * np.log10(0.25)], abs=1e-4)
    assert mean_square_error(reference, images) == pytest.approx([0.01, 1e-4, 0.25], rel=1e-5)


def test_psnr_is_over_all_pixels_and_channels() -> None:
    reference, images = constant(0.0), constant(0.0)
    images[0, 3, 5, 1] = 1.0
    assert mean_square_error(reference, images) == pytest.approx([1 / (16 * 16 * 3)])


def test_identical_images_have_the_highest_psnr_and_it_is_finite() -> None:
    reference = constant(0.5, 2)
    almost = reference.astype(np.float64)
    almost[1] += 1e-6
    assert psnr(reference, almost).tolist() == [MAX_PSNR_DB, MAX_PSNR_DB]
    assert psnr(reference, reference + np.float32(1e-4))[0] < MAX_PSNR_DB


def test_bytes_are_floats_times_255(rng: np.random.Generator) -> None:
    a, b = rng.integers(0, 256, (2, 4, 24, 20, 3), dtype=np.uint8)
    for metric in (mean_square_error, psnr, ssim):
        assert metric(a, b) == pytest.approx(metric(a / 255.0, b / 255.0), rel=1e-5)


def test_ssim_of_constant_images_is_its_luminance_term() -> None:
    """Without variance SSIM is (2ab + C_1)/(a² + b² + C_1), C_1 = 0.01²."""
    a, b, c = 0.2, 0.6, 0.01**2
    assert ssim(constant(a, size=11), constant(b, size=11)) == pytest.approx([(2 * a * b + c) / (a * a + b * b + c)])


def test_ssim_has_a_gaussian_window_of_11_pixels_and_population_covariances(rng: np.random.Generator) -> None:
    """An image of 11 × 11 pixels has one window; its weighted moments are written out here."""
    a, b = rng.random((2, 11, 11))
    place = np.arange(11) - 5
    kernel = np.exp(-(place**2) / (2 * 1.5**2))
    weights = np.outer(kernel, kernel) / kernel.sum() ** 2

    def mean(x: np.ndarray[Any, Any]) -> float:
        return float((weights * x).sum())

    covariance, c1, c2 = mean(a * b) - mean(a) * mean(b), 0.01**2, 0.03**2
    variances = mean(a * a) - mean(a) ** 2 + mean(b * b) - mean(b) ** 2
    expected = (2 * mean(a) * mean(b) + c1) * (2 * covariance + c2)
    expected /= (mean(a) ** 2 + mean(b) ** 2 + c1) * (variances + c2)
    gray = [np.repeat(x[None, :, :, None], 3, axis=3) for x in (a, b)]
    assert ssim(*gray) == pytest.approx([expected], rel=1e-6)


def test_ssim_is_1_for_identical_images_and_falls_with_noise(rng: np.random.Generator) -> None:
    reference = rng.random((1, 32, 32, 3)) * 0.5 + 0.25
    noise = rng.uniform(-0.25, 0.25, reference.shape)
    values = [ssim(reference, reference + scale * noise)[0] for scale in (0.0, 0.2, 0.5, 1.0)]
    assert values[0] == 1.0
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("reference", "images", "message"),
    [
        (constant(0.5)[0], constant(0.5), r"`reference` must be RGB images .* got shape \(16, 16, 3\)"),
        (constant(0.5).transpose(0, 3, 1, 2), constant(0.5), r"`reference` must be RGB images .* \(1, 3, 16, 16\)"),
        (constant(0.5)[:0], constant(0.5)[:0], "`reference` must be RGB images"),
        (constant(0.5), constant(1.5), r"`images` must be uint8, or floats in \[0, 1\], got float32 in 1.5"),
        (constant(0.5), constant(np.nan), "`images` must be uint8, or floats in"),
        (constant(0.5), constant(1.0).astype(np.int64), "`images` must be uint8, or floats in .* got int64"),
        (constant(0.5, 2), constant(0.5, 1), r"`images` must have the shape of `reference`, \(2, 16, 16, 3\)"),
    ],
)
def test_what_are_no_images(reference: Any, images: Any, message: str) -> None:
    for metric in (psnr, ssim):
        with pytest.raises(ConfigurationError, match=message):
            metric(reference, images)


def test_ssim_refuses_images_smaller_than_its_window() -> None:
    with pytest.raises(ConfigurationError, match="at least 11 pixels high and wide, got shape"):
        ssim(constant(0.5, size=10), constant(0.5, size=10))
    assert psnr(constant(0.5, size=10), constant(0.5, size=10)).shape == (1,)


def test_missing_scikit_image_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    with pytest.raises(MissingExtraError, match=r"`skimage` must be installed .*refine-env\[images\]"):
        ssim(constant(0.5), constant(0.5))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """torchvision and lpips as far as LPIPS calls them: a trunk of one convolution; returns torch's cache."""
    torch = pytest.importorskip("torch")

    class Trunk(torch.nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.slice1 = torch.nn.Sequential()
            self.slice1.add_module("0", torch.nn.Conv2d(3, 2, 1))

    class Distance(torch.nn.Module):  # type: ignore[name-defined, misc]
        def __init__(self, net: str, pnet_rand: bool, verbose: bool) -> None:
            super().__init__()
            assert pnet_rand, "the package would download weights"
            warnings.warn("The parameter 'pretrained' is deprecated since 0.13", UserWarning, stacklevel=2)
            self.net = Trunk()

        def forward(self, a: Any, b: Any, normalize: bool) -> Any:
            assert normalize, "images are in [0, 1]"
            features = [self.net.slice1(x) for x in (a, b)]
            return (features[0] - features[1]).square().mean(dim=(1, 2, 3), keepdim=True)

    lpips, torchvision, models = ModuleType("lpips"), ModuleType("torchvision"), ModuleType("torchvision.models")
    vars(lpips)["LPIPS"] = Distance
    weights = SimpleNamespace(IMAGENET1K_V1=SimpleNamespace(url="https://download.pytorch.org/models/alexnet-1.pth"))
    vars(models)["get_model_weights"] = lambda name: {"alexnet": weights}[name]
    for module in (lpips, torchvision, models):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


def save_weights(path: Path) -> None:
    import torch

    weight = torch.zeros(2, 3, 1, 1)
    weight[0, 0], weight[1, 2] = 2.0, 1.0  # of red doubled, and of blue
    torch.save({"features.0.weight": weight, "features.0.bias": torch.zeros(2), "classifier.bias": weight}, path)


class TestAStandInForLpips:
    def test_the_given_weights_are_the_trunk_s(self, stand_in: Path, tmp_path: Path) -> None:
        save_weights(tmp_path / "mine.pth")
        metric = LPIPS(tmp_path / "mine.pth")
        reference, images = constant(0.5, 2, size=18), constant(0.5, 2, size=18)
        images[0, :, :, 0] += 0.25
        images[1, :, :, 2] += 0.25
        assert metric(reference, images) == pytest.approx([0.5 * 0.25, 0.5 * 0.0625])
        assert metric(reference, reference).tolist() == [0.0, 0.0]
        assert (metric.net, metric.weights, len(metric.sha256)) == ("alex", tmp_path / "mine.pth", 64)

    def test_torch_s_cache_is_searched(self, stand_in: Path) -> None:
        save_weights(stand_in / "alexnet-1.pth")
        assert LPIPS().weights == stand_in / "alexnet-1.pth"

    def test_missing_weights_say_where_and_how(self, stand_in: Path) -> None:
        message = (
            r"`lpips_weights` must be the file of alexnet's weights, got no file at .*alexnet-1\.pth\. Download "
            r"https://download\.pytorch\.org/models/alexnet-1\.pth into .*checkpoints, or give .*\(--lpips-weights\)"
        )
        with pytest.raises(MissingWeightsError, match=message):
            LPIPS()
        with pytest.raises(MissingWeightsError, match="got no file at elsewhere"):
            LPIPS("elsewhere")

    def test_other_files_are_refused(self, stand_in: Path, tmp_path: Path) -> None:
        import torch

        (tmp_path / "text.pth").write_text("no weights")
        torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
        for name in ("text.pth", "other.pth"):
            with pytest.raises(ConfigurationError, match=f"must hold the weights of torchvision's alexnet, .*{name}"):
                LPIPS(tmp_path / name)

    def test_no_such_net_and_too_small_images(self, stand_in: Path, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="`net` must be one of 'alex', 'vgg', 'squeeze', got 'resnet'"):
            LPIPS(net="resnet")
        save_weights(tmp_path / "mine.pth")
        with pytest.raises(ConfigurationError, match="at least 17 pixels high and wide, got shape"):
            LPIPS(tmp_path / "mine.pth")(constant(0.5), constant(0.5))


@pytest.mark.parametrize("module", ["torchvision", "lpips"])
def test_missing_packages_name_the_extra(stand_in: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"`{module}` must be installed .*refine-env\[perceptual\]"):
        LPIPS()


@pytest.mark.lpips
class TestLpips:
    @pytest.fixture
    def weights(self, tmp_path: Path) -> Path:
        import torch
        import torchvision

        torch.manual_seed(1)
        torch.save(torchvision.models.alexnet(weights=None).state_dict(), tmp_path / "random.pth")
        return tmp_path / "random.pth"

    def test_it_is_the_package_s_on_that_trunk(self, weights: Path, rng: np.random.Generator) -> None:
        import lpips
        import torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            theirs = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
        published = torch.load(weights, weights_only=True)
        for name, parameter in theirs.net.named_parameters():
            parameter.data.copy_(published[f"features.{name.split('.', 1)[1]}"])
        a, b = rng.random((2, 3, 40, 36, 3)).astype(np.float32)
        pair = [torch.from_numpy(x.transpose(0, 3, 1, 2).copy()) * 2 - 1 for x in (a, b)]
        with torch.no_grad():
            expected = theirs(*pair).flatten().numpy()
        assert LPIPS(weights)(a, b) == pytest.approx(expected, rel=1e-5)
        assert (expected > 0).all()

    def test_identical_images_are_at_distance_0(self, weights: Path, rng: np.random.Generator) -> None:
        images = rng.random((2, 32, 32, 3))
        assert LPIPS(weights)(images, images).tolist() == [0.0, 0.0]

    def test_every_net_s_trunk_is_found_in_torchvision_s_weights(self, tmp_path: Path) -> None:
        import torch
        import torchvision

        images = constant(0.5, size=64)
        for net, name in (("vgg", "vgg16"), ("squeeze", "squeezenet1_1")):
            torch.save(torchvision.models.get_model(name, weights=None).state_dict(), tmp_path / f"{net}.pth")
            assert LPIPS(tmp_path / f"{net}.pth", net=net)(images, images).tolist() == [0.0]


def write_gallery(path: Path, groups: list[str]) -> Path:
    """Glyphs of one color each: black, dark gray, light gray, white, 2 × 2 pixels."""
    shades = np.array([0, 80, 170, 255], dtype=np.uint8)
    thumbnails = np.broadcast_to(shades[:, None, None, None], (4, 2, 2, 3))
    np.savez(
        path, thumbnails=thumbnails, prompts=np.array(["black", "dark", "light", "white"]), groups=np.array(groups)
    )
    return path


def test_task_by_hand(tmp_path: Path) -> None:
    task = GlyphTask(write_gallery(tmp_path / "gallery.npz", ["ink", "ink", "", ""]))
    assert task.recognize(np.stack([constant(v)[0] for v in (0.0, 0.3, 0.6, 0.95)])).tolist() == [0, 1, 2, 3]
    references = np.stack([constant(v)[0] for v in (0.05, 0.05, 0.05, 0.65, 0.65)])
    images = np.stack([constant(v)[0] for v in (0.1, 0.3, 0.65, 0.7, 0.95)])
    # The same glyph; another of its group; of no group; the same without group; another without group.
    assert task(references, images).tolist() == [[1, 1], [0, 1], [0, 0], [1, 1], [0, 0]]
    assert task(np.rint(references * 255).astype(np.uint8), images).tolist() == task(references, images).tolist()


def test_task_shrinks_by_means_of_blocks(rng: np.random.Generator) -> None:
    images = rng.random((2, 4, 8, 3))
    assert shrink(images, 2)[1, 1, 0, 2] == pytest.approx(images[1, 2:, :4, 2].mean())
    with pytest.raises(ConfigurationError, match="height and a width that 3 divides, .*, got 4 and 8. Use the gallery"):
        shrink(images, 3)


def test_what_is_no_gallery(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="`gallery` must be the file of a model's glyphs, got no file"):
        GlyphTask(tmp_path / "none.npz")
    text = tmp_path / "text.npz"
    text.write_text("no gallery")
    pickled = tmp_path / "pickled.npz"
    np.savez(pickled, thumbnails=np.array([{}], dtype=object), prompts=np.array(["a"]), groups=np.array([""]))
    for path in (text, pickled, write_gallery(tmp_path / "short.npz", ["ink"])):
        with pytest.raises(ConfigurationError, match="`gallery` must hold thumbnails, prompts and groups, got"):
            GlyphTask(path)


def gray_map(*rows: list[float]) -> np.ndarray[Any, Any]:
    """One map (1, height, width, 3)."""
    return np.repeat(np.array(rows, dtype=np.float32)[None, ..., None], 3, axis=3)


class TestMaps:
    def test_coverage_is_intersection_over_union(self) -> None:
        """Both at three pixels, at two of them together; a pixel at the threshold is covered."""
        reference, image = gray_map([0.5, 0.9, 0.3], [0.0, 0.1, 0.2]), gray_map([0.5, 0.2, 0.9], [0.0, 0.6, 0.2])
        assert coverage_iou(reference, image, 0.3) == pytest.approx([2 / 4])
        assert coverage_iou(reference, reference, 0.3) == pytest.approx([1.0])
        assert coverage_iou(reference, 0 * image, 0.3) == pytest.approx([0.0])
        assert coverage_iou(0 * reference, 0 * image, 0.3) == pytest.approx([1.0])  # nobody is covered, and both say so
        both = [np.concatenate(pair) for pair in ((reference, reference), (image, reference))]
        assert coverage_iou(*both, 0.3) == pytest.approx([0.5, 1.0])

    def test_the_better_of_two_transmitters(self) -> None:
        """Of four pixels one is covered by neither; at one of the three others the wrong one is thought the better."""
        reference, other = gray_map([0.5, 0.4, 0.1, 0.0]), gray_map([0.2, 0.6, 0.0, 0.9])
        image = gray_map([0.1, 0.5, 0.9, 0.0])
        assert best_transmitter_agreement(reference, reference, other, 0.3) == pytest.approx([1.0])
        assert best_transmitter_agreement(reference, image, other, 0.3) == pytest.approx([2 / 3])
        assert best_transmitter_agreement(0 * reference, image, 0 * other, 0.3) == pytest.approx([1.0])

    def test_the_task_has_the_scores_that_it_can_have(self) -> None:
        task = MapTask(radiomap.SCALE)
        assert (task.coverage_dbm, task.threshold) == (-94.0, pytest.approx(0.3))
        image = gray_map([0.3, 0.29])
        assert list(task(image, image)) == ["task_coverage"]
        scores = task(image, image, others=0 * image, truth=np.full((1, 1, 2, 3), 255, np.uint8))
        assert {name: values.tolist() for name, values in scores.items()} == {
            "task_coverage": [1.0],
            "task_transmitter": [1.0],
            "task_truth": [0.5],
        }

    @pytest.mark.parametrize("coverage_dbm", [-124.0, 0.0, float("nan")])
    def test_a_threshold_beyond_the_scale(self, coverage_dbm: float) -> None:
        with pytest.raises(ConfigurationError, match="`coverage_dbm` must be between -124 and -24, the ends of the sc"):
            MapTask(radiomap.SCALE, coverage_dbm)

    def test_maps_of_other_shapes(self) -> None:
        with pytest.raises(ConfigurationError, match="`images` must have the shape of `reference`"):
            coverage_iou(gray_map([0.1]), gray_map([0.1, 0.2]), 0.3)
