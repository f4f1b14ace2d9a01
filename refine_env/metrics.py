"""Quality of decoded images against a reference: PSNR, SSIM, LPIPS, and the task that an image is for, over batches.

Every measure takes ``reference`` and ``images``, two arrays of one shape (N, height, width, 3) with N >= 1, floats in
[0, 1] or uint8, such as :class:`refine_env.trajectories.pipeline.LatentDecoder` returns. It gives one float64 value per
image, shape (N,), a task several, shape (N, k), and raises ConfigurationError for other arrays. The task is the
recognition of a glyph, or of a radio map to say who is covered, and by which transmitter.
"""

from __future__ import annotations

import hashlib
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refine_env._validation import check_choice
from refine_env.errors import ConfigurationError, import_extra
from refine_env.radiomap import COVERAGE_DBM, PowerScale

__all__ = [
    "DEFAULT_METRICS",
    "LPIPS",
    "LPIPS_NETS",
    "MAX_PSNR_DB",
    "METRICS",
    "SSIM_WINDOW",
    "GlyphTask",
    "MapTask",
    "MissingWeightsError",
    "best_transmitter_agreement",
    "coverage_iou",
    "gallery_path",
    "mean_square_error",
    "nearest",
    "psnr",
    "shrink",
    "ssim",
]

DEFAULT_METRICS = ("psnr", "ssim", "lpips")
METRICS = (*DEFAULT_METRICS, "task")

MAX_PSNR_DB = 100.0
"""PSNR [dB] of identical images, whose PSNR is infinite, and the highest that :func:`psnr` returns.

A mean over episodes stays finite so. It is a mean square error of 1e-10 on [0, 1], far below that of an 8-bit
display, 3e-6, and above what float32 arithmetic leaves.
"""

SSIM_WINDOW = 11
"""Side of SSIM's Gaussian window (σ = 1.5) in pixels: no image may be smaller."""

_LPIPS_SMALLEST = 17  # AlexNet's third stage has nothing left to look at below

LPIPS_NETS = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}
"""LPIPS's trunk networks, with torchvision's names for them."""


class MissingWeightsError(ConfigurationError):
    """LPIPS's trunk weights are not on this machine."""


def mean_square_error(reference: ArrayLike, images: ArrayLike) -> NDArray[np.float64]:
    """Mean square error over all pixels and channels of every image, on [0, 1]; this is 1/PSNR as a power ratio."""
    a, b = _check_images(reference, images)
    errors: NDArray[np.float64] = np.square(a.astype(np.float64) - b).mean(axis=(1, 2, 3))
    return errors


def psnr(reference: ArrayLike, images: ArrayLike) -> NDArray[np.float64]:
    """Peak signal-to-noise ratio −10 log10(MSE) of every image [dB], at most :data:`MAX_PSNR_DB`."""
    floor = 10.0 ** (-MAX_PSNR_DB / 10.0)
    values: NDArray[np.float64] = -10.0 * np.log10(np.maximum(mean_square_error(reference, images), floor))
    return values


def ssim(reference: ArrayLike, images: ArrayLike) -> NDArray[np.float64]:
    """Structural similarity of every image, 1 for identical ones, by scikit-image.

    The settings are those of Wang et al. (2004): a Gaussian window of 11 × 11 pixels with σ = 1.5, K_1 = 0.01,
    K_2 = 0.03, population covariances; the mean over the pixels whose window lies inside the image, and over the
    three color channels.

    Raises:
        ConfigurationError: if the images are less than 11 pixels high or wide, or not as the module describes them.
        MissingExtraError: if scikit-image is not installed.
    """
    a, b = _check_images(reference, images, SSIM_WINDOW)
    structural_similarity = import_extra("skimage.metrics", "images").structural_similarity
    return np.array(
        [
            structural_similarity(
                one, other, data_range=1.0, channel_axis=-1, gaussian_weights=True, use_sample_covariance=False
            )
            for one, other in zip(a, b, strict=True)
        ],
        dtype=np.float64,
    )


class LPIPS:
    """Learned perceptual image patch similarity (Zhang et al. 2018): 0 for identical images, higher is worse.

    The linear heads are those that the package ``lpips`` brings, version 0.1. The trunk is a classifier trained on
    ImageNet, whose weights that package would download at first use; here nothing is downloaded.

    Args:
        weights: file of the trunk's weights, as torchvision publishes it. None looks for it in torch's own cache,
            where torchvision puts what it downloads.
        net: ``"alex"``, ``"vgg"`` or ``"squeeze"``.
        device: torch device.

    Attributes:
        net: as given.
        weights: the file.
        sha256: its hash; other weights make another metric.

    Raises:
        ConfigurationError: if there is no such net, or the weights are not its.
        MissingWeightsError: if there is no such file; the message says where to put it and how to get it.
        MissingExtraError: if torch, torchvision or lpips is not installed.
    """

    def __init__(
        self, weights: str | os.PathLike[str] | None = None, *, net: str = "alex", device: str = "cpu"
    ) -> None:
        self.net = check_choice("net", net, tuple(LPIPS_NETS))
        for module in ("torch", "torchvision"):
            import_extra(module, "perceptual")
        package = import_extra("lpips", "perceptual")
        self.weights = _find_weights(weights, net)
        with self.weights.open("rb") as file:
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        with warnings.catch_warnings():
            # lpips calls torchvision with an argument that it renamed.
            warnings.filterwarnings("ignore", message=".*(pretrained|weight enum)", category=UserWarning)
            model = package.LPIPS(net=net, pnet_rand=True, verbose=False)
        _load_trunk(model.net, self.weights, net)
        self._model = model.eval().to(device)
        self._device = device

    def __call__(self, reference: ArrayLike, images: ArrayLike) -> NDArray[np.float64]:
        """Distance of every image from its reference; images must be more than 16 pixels high and wide."""
        torch = import_extra("torch", "perceptual")
        pair = [
            torch.from_numpy(np.ascontiguousarray(array.transpose(0, 3, 1, 2), dtype=np.float32)).to(self._device)
            for array in _check_images(reference, images, _LPIPS_SMALLEST)
        ]
        with torch.no_grad():
            distances = self._model(*pair, normalize=True)
        values: NDArray[np.float64] = distances.flatten().double().cpu().numpy()
        return values


def gallery_path(model: Path) -> Path:
    """Where the gallery of a model's glyphs is, beside the model's folder."""
    return model.with_name(model.name + "-glyphs.npz")


def shrink(images: NDArray[Any], side: int) -> NDArray[np.float64]:
    """Means over equal blocks: images (N, height, width, 3) as float64 (N, side, side, 3).

    Raises:
        ConfigurationError: if ``side`` does not divide the height and the width.
    """
    count, height, width, channels = images.shape
    if height % side or width % side:
        raise ConfigurationError(
            f"`images` must have a height and a width that {side} divides, the side of the gallery's thumbnails, got "
            f"{height} and {width}. Use the gallery of the model that drew them."
        )
    blocks = images.reshape(count, side, height // side, side, width // side, channels)
    means: NDArray[np.float64] = blocks.mean(axis=(2, 4), dtype=np.float64)
    return means


def nearest(samples: NDArray[Any], candidates: NDArray[Any]) -> NDArray[np.intp]:
    """For each sample (N, ...) the number of the candidate (K, ...) at the smallest Euclidean distance."""
    wanted = samples.reshape(len(samples), -1).astype(np.float64)
    offered = candidates.reshape(len(candidates), -1).astype(np.float64)
    # |w|² is the same for all candidates, and so left out of |w - o|².
    closest: NDArray[np.intp] = ((offered**2).sum(axis=1) - 2 * wanted @ offered.T).argmin(axis=1)
    return closest


class GlyphTask:
    """What a machine makes of an image: which glyph of a gallery it is nearest to, and of which group that is.

    Both images are shrunk to the size of the gallery's thumbnails, and the nearest one in pixel MSE is found for each.
    The task is done right where the glyph found in the image is the one found in the reference, or at least one of the
    same Unicode group. So it is the delivery that is judged, not what the model made of its prompt. A glyph without a
    group, a bare letter for example, is of no other's.

    Args:
        gallery: file of a model's glyphs, which ``python -m train.diffusion.gallery`` writes.

    Attributes:
        prompts: the glyphs' names.
        groups: their groups, empty where they have none.
        thumbnails: uint8 (K, side, side, 3).
        sha256: hash of the file.

    Raises:
        ConfigurationError: if there is no such file, or it is no gallery.
    """

    def __init__(self, gallery: str | os.PathLike[str]) -> None:
        path = Path(gallery)
        advice = "Make it with: python -m train.diffusion.gallery"
        if not path.is_file():
            raise ConfigurationError(f"`gallery` must be the file of a model's glyphs, got no file at {path}. {advice}")
        try:
            with np.load(path, allow_pickle=False) as file:
                self.prompts: list[str] = file["prompts"].tolist()
                self.groups: list[str] = file["groups"].tolist()
                self.thumbnails: NDArray[np.uint8] = file["thumbnails"]
            count, side, width, channels = self.thumbnails.shape
            if (
                (width, channels) != (side, 3)
                or self.thumbnails.dtype != np.uint8
                or not len(self.prompts) == len(self.groups) == count > 0
                or not all(isinstance(text, str) for text in (*self.prompts, *self.groups))
            ):
                raise ValueError("arrays that do not belong together")
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise ConfigurationError(
                f"`gallery` must hold thumbnails, prompts and groups, got {path} ({type(error).__name__}: {error}). "
                f"{advice}"
            ) from None
        self.sha256 = hashlib.sha256(path.read_bytes()).hexdigest()

    def recognize(self, images: ArrayLike) -> NDArray[np.intp]:
        """Numbers of the glyphs nearest to images (N, height, width, 3), (N,)."""
        checked, _ = _check_images(images, images)
        return nearest(255.0 * shrink(checked, self.thumbnails.shape[1]), self.thumbnails)

    def __call__(self, reference: ArrayLike, images: ArrayLike) -> NDArray[np.float64]:
        """Whether the image shows the reference's glyph, and one of its group: 1 or 0, (N, 2)."""
        a, b = _check_images(reference, images)
        wanted, found = self.recognize(a), self.recognize(b)
        groups = np.array(self.groups)
        same = wanted == found
        of_group = same | ((groups[wanted] == groups[found]) & (groups[wanted] != ""))
        return np.stack([same, of_group], axis=1).astype(np.float64)


def coverage_iou(reference: ArrayLike, images: ArrayLike, threshold: float) -> NDArray[np.float64]:
    """Covered pixels of both maps over those of either one: 1 where the same places are covered, or none at all.

    Args:
        reference, images: gray levels three times, as the module describes images.
        threshold: least gray level of a covered pixel.
    """
    a, b = (array[..., 0] >= threshold for array in _check_images(reference, images))
    both, either = ((one).sum(axis=(1, 2)) for one in (a & b, a | b))
    shares: NDArray[np.float64] = np.where(either > 0, both / np.maximum(either, 1), 1.0)
    return shares


def best_transmitter_agreement(
    reference: ArrayLike, images: ArrayLike, others: ArrayLike, threshold: float
) -> NDArray[np.float64]:
    """Of the pixels that one of two transmitters covers, for how many the stronger of them is the right one.

    Args:
        reference, images: maps of the one transmitter, the right ones and what is known of them.
        others: the right maps of the other one.
        threshold: least gray level of a covered pixel.
    """
    a, b = _check_images(reference, images)
    other = _check_images(others, images)[0][..., 0]
    covered = (a[..., 0] >= threshold) | (other >= threshold)
    same = covered & ((a[..., 0] > other) == (b[..., 0] > other))
    counts = covered.sum(axis=(1, 2))
    shares: NDArray[np.float64] = np.where(counts > 0, same.sum(axis=(1, 2)) / np.maximum(counts, 1), 1.0)
    return shares


class MapTask:
    """What a vehicle makes of a radio map: where there is coverage, and which of two transmitters to listen to.

    Args:
        scale: of the gray levels.
        coverage_dbm: least received power of a covered place.

    Attributes:
        coverage_dbm: as given.
        threshold: its gray level.

    Raises:
        ConfigurationError: if the power is not within the scale.
    """

    def __init__(self, scale: PowerScale, coverage_dbm: float = COVERAGE_DBM) -> None:
        if not scale.black_dbm < coverage_dbm < scale.white_dbm:
            raise ConfigurationError(
                f"`coverage_dbm` must be between {scale.black_dbm:g} and {scale.white_dbm:g}, the ends of the scale, "
                f"got {coverage_dbm!r}. Give for example {COVERAGE_DBM:g}."
            )
        self.coverage_dbm = coverage_dbm
        self.threshold = float(scale.gray(coverage_dbm))

    def __call__(
        self, reference: ArrayLike, images: ArrayLike, others: ArrayLike | None = None, truth: ArrayLike | None = None
    ) -> dict[str, NDArray[np.float64]]:
        """The scores by their columns, (N,) each.

        Args:
            reference: maps as they are at the server.
            images: maps as they are shown.
            others: maps of another transmitter of each scene, where there is one.
            truth: the true maps, where they are known.
        """
        scores = {"task_coverage": coverage_iou(reference, images, self.threshold)}
        if others is not None:
            scores["task_transmitter"] = best_transmitter_agreement(reference, images, others, self.threshold)
        if truth is not None:
            scores["task_truth"] = coverage_iou(truth, images, self.threshold)
        return scores


def _check_images(reference: ArrayLike, images: ArrayLike, smallest: int = 1) -> tuple[NDArray[Any], NDArray[Any]]:
    """Both arrays as floats in [0, 1]."""
    pair = []
    for name, given in (("reference", reference), ("images", images)):
        array = np.asarray(given)
        if array.ndim != 4 or array.shape[3] != 3 or min(array.shape[1:3]) < smallest or array.shape[0] < 1:
            raise ConfigurationError(
                f"`{name}` must be RGB images of shape (N, height, width, 3), at least {smallest} pixels high and "
                f"wide, got shape {array.shape}. Pass what LatentDecoder returns."
            )
        if array.dtype == np.uint8:
            array = array.astype(np.float32) / np.float32(255.0)
        elif not np.issubdtype(array.dtype, np.floating) or not (array.min() >= 0.0 and array.max() <= 1.0):
            raise ConfigurationError(
                f"`{name}` must be uint8, or floats in [0, 1], got {array.dtype} in {array.min()} … {array.max()}. "
                "Scale the images first."
            )
        pair.append(array)
    if pair[0].shape != pair[1].shape:
        raise ConfigurationError(
            f"`images` must have the shape of `reference`, {pair[0].shape}, got {pair[1].shape}. Pair them one to one."
        )
    return pair[0], pair[1]


def _find_weights(weights: str | os.PathLike[str] | None, net: str) -> Path:
    """The file of a trunk's ImageNet weights."""
    torch = import_extra("torch", "perceptual")
    models = import_extra("torchvision.models", "perceptual")
    url = models.get_model_weights(LPIPS_NETS[net]).IMAGENET1K_V1.url
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / url.rpartition("/")[2] if weights is None else Path(weights)
    if not path.is_file():
        raise MissingWeightsError(
            f"`lpips_weights` must be the file of {LPIPS_NETS[net]}'s weights, got no file at {path}. Download "
            f"{url} into {folder}, or give the file's path (--lpips-weights)."
        )
    return path


def _load_trunk(trunk: Any, path: Path, net: str) -> None:
    """Copy a classifier's convolutions into LPIPS's trunk, which holds them cut into slices."""
    torch = import_extra("torch", "perceptual")
    try:
        published = torch.load(path, map_location="cpu", weights_only=True)
        # "slice2.3.weight" of the trunk is "features.3.weight" of the classifier.
        trunk.load_state_dict({name: published["features." + name.partition(".")[2]] for name in trunk.state_dict()})
    except Exception as error:  # torch raises whatever the bytes make it stumble over
        raise ConfigurationError(
            f"`lpips_weights` must hold the weights of torchvision's {LPIPS_NETS[net]}, got other content in {path} "
            f"({type(error).__name__}). Download the file anew."
        ) from error
