"""Decoded images of an evaluation: scored against the clean sample's, and kept, as they are shown, for a figure."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refine_env import ConfigurationError, MissingExtraError, TrajectoryCache
from refine_env._validation import check_choice, check_integer
from refine_env.errors import import_extra
from refine_env.evaluation import IMAGE_COLUMNS, Table, write_atomically
from refine_env.metrics import LPIPS, METRICS, GlyphTask, MapTask, MissingWeightsError, psnr, ssim
from refine_env.radiomap import PowerScale, other_transmitters
from refine_env.render.decoder import pictures_of, scale_of
from refine_env.trajectories.pipeline import LatentDecoder, open_recorded

__all__ = [
    "TILE_EPISODES",
    "Decoder",
    "ImageScorer",
    "Metric",
    "decode",
    "open_decoder",
    "open_metrics",
    "read_tiles",
    "scale_arrays",
    "scale_in",
    "to_tile",
]

Decoder = Callable[[ArrayLike], NDArray[np.float32]]
"""Latents (N, C, H, W) to images (N, height, width, 3) in [0, 1]."""

Metric = Callable[[ArrayLike, ArrayLike], NDArray[np.float64]] | MapTask
"""References and images (N, height, width, 3) to values (N,), or (N, k) where they fill k columns; or a map's task."""

TILE_EPISODES = 4
"""Episodes of every policy and SNR, the first ones, whose images are kept."""

_COLUMNS = dict(zip(METRICS, (("psnr_db",), ("ssim",), ("lpips",), ("task_glyph", "task_group")), strict=True))
_MAX_BATCH = 16
_BATCH_VALUES = 1 << 16  # latent values decoded at once; a decoder needs some 100 KB for each
_REFERENCE_BYTES = 1 << 27
_TILE_FIELDS = {"agent": str, "snr_db": float, "coder": str, "payload": str, "episode": int, "tile": int}


def open_decoder(cache: TrajectoryCache, model: str | None = None, *, device: str = "cpu") -> LatentDecoder:
    """The decoder of the model that drew a cache's latents.

    Args:
        cache, model, device: as :func:`refine_env.trajectories.pipeline.open_recorded` has them.

    Raises:
        ConfigurationError, CacheError, MissingExtraError: as that function.
    """
    return open_recorded(LatentDecoder, cache, model, device=device)


def open_metrics(
    names: Sequence[str],
    lpips_weights: Path | None = None,
    *,
    device: str = "cpu",
    gallery: Path | None = None,
    scale: PowerScale | None = None,
) -> tuple[dict[str, Metric], list[str]]:
    """The metrics of those names, as far as they can be had.

    Args:
        names: names among :data:`refine_env.metrics.METRICS`.
        lpips_weights: see :class:`refine_env.metrics.LPIPS`.
        device: torch device of LPIPS.
        gallery: file of the glyphs that the task is about, see :class:`refine_env.metrics.GlyphTask`.
        scale: of the images, where they are radio maps; the task is then :class:`refine_env.metrics.MapTask`.

    Returns:
        The metrics by name, and for each that is missing its package or weights one sentence.

    Raises:
        ConfigurationError: if a name is not that of a metric, weights were given and cannot be used, or there is no
            gallery for the task.
    """
    metrics: dict[str, Metric] = {}
    missing = []
    for name in names:
        check_choice("metrics", name, METRICS)
        try:
            if name == "psnr":
                metrics[name] = psnr
            elif name == "ssim":
                import_extra("skimage", "images")
                metrics[name] = ssim
            elif name == "task":
                metrics[name] = _open_task(gallery) if scale is None else MapTask(scale)
            else:
                metrics[name] = LPIPS(lpips_weights, device=device)
        except MissingWeightsError as error:
            if lpips_weights is not None:
                raise
            missing.append(f"No LPIPS: {error}")
        except MissingExtraError as error:
            missing.append(f"No {name.upper()}: {error}")
    return metrics, missing


def _open_task(gallery: Path | None) -> GlyphTask:
    if gallery is None:
        raise ConfigurationError(
            "`metrics` must leave out 'task' where no model is known, whose glyphs it is about, got no gallery. "
            "Name the gallery's file, or choose other metrics."
        )
    return GlyphTask(gallery)


def decode(decoder: Decoder, latents: NDArray[Any]) -> NDArray[np.float32]:
    """Decode in batches of one size, so that an image does not depend, in its last bits, on those beside it.

    Args:
        decoder: the decoder of the model that drew the latents.
        latents: (N, C, H, W).

    Returns:
        float32 (N, height, width, 3) in [0, 1].
    """
    size = max(1, min(_MAX_BATCH, _BATCH_VALUES // int(np.prod(latents.shape[1:]))))
    images = []
    for start in range(0, len(latents), size):
        batch = latents[start : start + size]
        padding = np.zeros((size - len(batch), *batch.shape[1:]), dtype=batch.dtype)
        images.append(decoder(np.concatenate([batch, padding]))[: len(batch)])
    return np.concatenate(images)


class ImageScorer:
    """Scores what the devices hold at the deadline, decoded, against the decoded x_0 of their trajectories.

    A :data:`refine_env.evaluation.Score`. Many episodes end with the same bytes on the same trajectory: these are
    decoded and scored once. Memory does not grow with the episodes, but for a few numbers each and the tiles.

    Args:
        cache: the trajectories.
        decoder: the decoder of their model.
        metrics: by name, see :func:`open_metrics`.
        image_episodes: how many episodes of every policy and SNR are scored, the first ones; None is all.
        tile_episodes: how many episodes of every policy and SNR have their images kept, the first ones.

    Attributes:
        progress: called, if set, whenever images have been scored.

    Raises:
        ConfigurationError: if a number is out of range.
    """

    def __init__(
        self,
        cache: TrajectoryCache,
        decoder: Decoder,
        metrics: Mapping[str, Metric],
        *,
        image_episodes: int | None = None,
        tile_episodes: int = TILE_EPISODES,
    ) -> None:
        if image_episodes is not None:
            check_integer("image_episodes", image_episodes, 1, advice="Leave it out to score all.")
        self._episodes = image_episodes
        self._tile_episodes = check_integer("tile_episodes", tile_episodes, 1, advice="Keep at least one.")
        self._cache = cache
        self._decoder = decoder
        self._metrics = dict(metrics)
        self._others: NDArray[np.int64] | None = None
        self._truth: NDArray[np.uint8] | None = None
        self._columns: list[str] = []
        for name, metric in self._metrics.items():
            if not isinstance(metric, MapTask):
                self._columns += _COLUMNS[name]
                continue
            self._columns.append("task_coverage")
            others = None if cache.conditions is None else other_transmitters(cache.conditions)
            if others is not None and (others >= 0).all():
                self._others = others
                self._columns.append("task_transmitter")
            if cache.truth is not None:
                self._truth = cache.truth
                self._columns.append("task_truth")
        self.progress: Callable[[], None] | None = None
        self._scores: dict[bytes, dict[str, float]] = {}
        self._references: OrderedDict[int, NDArray[np.float32]] = OrderedDict()
        self._kept: list[dict[str, Any]] = []
        self._tiles: dict[bytes, NDArray[np.uint8]] = {}
        self._clean_tiles: dict[int, NDArray[np.uint8]] = {}

    @property
    def num_images(self) -> int:
        """Distinct images scored so far."""
        return len(self._scores)

    def __call__(self, rows: Table, latents: NDArray[np.float32]) -> list[dict[str, float | None]]:
        """The image metrics of every row, None where it is not to be scored.

        Args:
            rows: one row for each episode.
            latents: what each device holds at the deadline, float32 (len(rows), M).
        """
        keys: list[bytes | None] = []
        todo: dict[bytes, int] = {}
        for i, row in enumerate(rows):
            if self._episodes is not None and row["episode"] >= self._episodes:
                keys.append(None)
                continue
            key = hashlib.blake2b(latents[i].tobytes(), digest_size=16, salt=b"%d" % row["trajectory"]).digest()
            keys.append(key)
            kept = row["episode"] < self._tile_episodes
            if kept:
                names = ("agent", "snr_db", "coder", "payload", "episode", "trajectory")
                self._kept.append({**{name: row[name] for name in names}, "key": key})
            if key not in self._scores or (kept and key not in self._tiles):
                todo[key] = i
        wanted = {entry["key"] for entry in self._kept}
        order = sorted(todo, key=lambda key: int(rows[todo[key]]["trajectory"]))
        for start in range(0, len(order), _MAX_BATCH):
            batch = order[start : start + _MAX_BATCH]
            chosen = [todo[key] for key in batch]
            trajectories = [int(rows[i]["trajectory"]) for i in chosen]
            images = decode(self._decoder, latents[chosen].reshape(-1, *self._cache.latent_shape))
            references = self._decode_references(trajectories)
            values: dict[str, NDArray[np.float64]] = {}
            for name, metric in self._metrics.items():
                if isinstance(metric, MapTask):
                    values |= self._score_maps(metric, references, images, trajectories)
                else:
                    columns = metric(references, images).reshape(len(images), -1).T
                    values |= zip(_COLUMNS[name], columns, strict=True)
            for k, key in enumerate(batch):
                self._scores[key] = {column: float(column_values[k]) for column, column_values in values.items()}
                if key in wanted:
                    shown = pictures_of(
                        np.stack([images[k], references[k]]), self._decoder, self._cache, [trajectories[k]] * 2
                    )
                    self._tiles[key], self._clean_tiles[trajectories[k]] = map(to_tile, shown)
            if self.progress is not None:
                self.progress()
        nothing: dict[str, float | None] = dict.fromkeys((*IMAGE_COLUMNS, *self._columns))
        return [nothing if key is None else {**nothing, **self._scores[key]} for key in keys]

    def _score_maps(
        self, task: MapTask, references: NDArray[np.float32], images: NDArray[np.float32], trajectories: list[int]
    ) -> dict[str, NDArray[np.float64]]:
        """The task's scores of maps, with another transmitter's where each scene has one, and the truth if known."""
        others = None if self._others is None else self._decode_references(self._others[trajectories].tolist())
        truth = None if self._truth is None else np.repeat(self._truth[trajectories, ..., None], 3, axis=3)
        return task(references, images, others, truth)

    def _decode_references(self, trajectories: Iterable[int]) -> NDArray[np.float32]:
        """The decoded x_0 of each trajectory; the ones used last are kept in memory."""
        wanted = list(trajectories)
        missing = [index for index in dict.fromkeys(wanted) if index not in self._references]
        if missing:
            clean = np.stack([self._cache.latents(index)[0] for index in missing]).astype(np.float32)
            self._references.update(zip(missing, decode(self._decoder, clean), strict=True))
        for index in wanted:
            self._references.move_to_end(index)
        found = np.stack([self._references[index] for index in wanted])
        while len(self._references) * found[0].nbytes > _REFERENCE_BYTES:
            self._references.popitem(last=False)
        return found

    def write_tiles(self, path: Path) -> None:
        """Write the images of the first episodes, 8 bits a channel, as an ``.npz`` file that :func:`read_tiles` reads.

        The same images give the same bytes.
        """
        position = {key: number for number, key in enumerate(self._tiles)}
        columns = {name: [entry[name] for entry in self._kept] for name in _TILE_FIELDS if name != "tile"}
        columns["tile"] = [position[entry["key"]] for entry in self._kept]
        trajectory = {entry["episode"]: entry["trajectory"] for entry in self._kept}
        buffer = io.BytesIO()
        np.savez_compressed(
            buffer,
            allow_pickle=False,
            tiles=np.stack(list(self._tiles.values())),
            clean_tiles=np.stack([self._clean_tiles[index] for index in trajectory.values()]),
            clean_episode=np.array(list(trajectory)),
            clean_prompt=np.array([self._cache.prompt(index) or "" for index in trajectory.values()]),
            **scale_arrays(scale_of(self._decoder)),
            **{name: np.array(values) for name, values in columns.items()},
        )
        write_atomically(path, buffer.getvalue())


def read_tiles(path: Path, episode: int = 0) -> tuple[Table, NDArray[np.uint8], str, PowerScale | None]:
    """Read the images of one episode that :meth:`ImageScorer.write_tiles` wrote.

    Args:
        path: the ``.npz`` file.
        episode: number of an episode whose images were kept.

    Returns:
        One row per policy and SNR, with ``agent``, ``snr_db``, ``coder``, ``payload``, ``episode`` and ``image``,
        uint8 (height, width, 3); the image of the clean x_0; the prompt, empty where there is none; and, of radio maps,
        what their colors stand for.

    Raises:
        ConfigurationError: if the file is missing or not one of these, or does not hold that episode.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            clean = {int(k): i for i, k in enumerate(file["clean_episode"])}
            columns = {name: file[name].tolist() for name in _TILE_FIELDS}
            tiles, clean_tiles, prompts = file["tiles"], file["clean_tiles"], file["clean_prompt"]
            scale = scale_in(file)
            rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
            chosen = [
                {**{name: value for name, value in row.items() if name != "tile"}, "image": tiles[row["tile"]]}
                for row in rows
                if row["episode"] == episode
            ]
            if episode in clean:
                return chosen, clean_tiles[clean[episode]], str(prompts[clean[episode]]), scale
    except (OSError, ValueError, KeyError, IndexError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigurationError(
            f"`{path.name}` must hold the images of an evaluation, got {path} ({type(error).__name__}: {error}). "
            "Make it with: python -m agents.evaluate --images"
        ) from None
    raise ConfigurationError(
        f"`episode` must be one whose images are kept, {', '.join(map(str, clean))}, got {episode}. Choose one of them."
    )


def scale_arrays(scale: PowerScale | None) -> dict[str, NDArray[np.float64]]:
    """What an ``.npz`` file of pictures says of their scale: nothing, unless they are radio maps."""
    return {} if scale is None else {"scale": np.array(scale)}


def scale_in(file: Any) -> PowerScale | None:
    """The scale that an opened ``.npz`` file of pictures has; None where they are no radio maps.

    Raises:
        TypeError: if it is no scale.
    """
    return PowerScale(*file["scale"].tolist()) if "scale" in file.files else None


def to_tile(image: NDArray[np.float32]) -> NDArray[np.uint8]:
    """An image in [0, 1] with 8 bits a channel."""
    return np.asarray(np.rint(image * 255.0), dtype=np.uint8)
