"""The manifest of a trajectory cache, `manifest.json`, format version 2.

A cache is a folder of safetensors shards beside one manifest. The manifest is a *recipe* (everything that was
known before the first sample was drawn, and all that is needed to draw the same samples again) and the
results: statistics and one hash per shard. It holds no time, host name or absolute path, so the same recipe
gives the same bytes.

Its last line is `manifest_sha256`, the SHA-256 of all bytes before that line and the comma, so that a changed
byte anywhere in the file is found when it is read. Version 1, which is still read, is the same without that line.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from typing import Any, NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from refine_env.errors import CacheFormatError, ConfigurationError
from refine_env.model.schedule import NoiseSchedule, alphas_cumprod
from refine_env.trajectories.files import MAX_JSON_BYTES, REMEDY, check_json, parse_json, shorten

__all__ = [
    "CLEAN_ESTIMATE_KINDS",
    "CONDITIONS_FILE",
    "DECODED_PAYLOADS",
    "FORMAT",
    "FORMAT_VERSION",
    "MANIFEST_FILE",
    "REUSE_MODES",
    "DecoderRecord",
    "Manifest",
    "Recipe",
    "Shard",
    "Span",
    "Trajectory",
    "sample_seed",
]

FORMAT = "refine-env trajectory cache"
FORMAT_VERSION = 2
UNSEALED_VERSION = 1
"""The older format, whose manifest holds no hash of itself."""

MANIFEST_FILE = "manifest.json"
CONDITIONS_FILE = "conditions.safetensors"
"""Of a cache whose model saw conditions: those, and with a reuse the static ones."""

DTYPE = "float16"

SOURCES = ("gaussian", "forward-process", "diffusers")
CLEAN_ESTIMATE_KINDS = ("denoiser", "linear-mmse")
"""``denoiser``: the network's own `pred_original_sample`. ``linear-mmse``: √ᾱ_{t+1} x_{t+1}."""

REUSE_MODES = ("vanilla", "switch", "two-stage", "mean", "mean-plain")
"""Where the midpoint comes from that a trajectory starts at, see :class:`refine_env.trajectories.reuse.Reuse`."""

DECODED_PAYLOADS = ("latent", "posterior_mean")
"""The payloads of which a device's decoder is measured."""

_SHARD_NAME = re.compile(r"trajectories-\d{5}-of-\d{5}\.safetensors")
_SEAL = "manifest_sha256"
_MAX_DIMENSIONS = 62  # NumPy's 64, less those of trajectory and step
_MAX_TRAIN_STEPS = 100_000
_RECIPE_FIELDS = (
    *("format", "format_version", "generator", "source", "model", "scheduler", "guidance_scale", "batch_size"),
    *("model_dtype", "device", "clean_latents", "prompt_source", "seed", "num_steps", "latent_shape", "dtype"),
    *("units", "note", "clean_estimates", "alpha_bar", "timesteps", "splits", "shard_size", "trajectories"),
)
"""The recipe's part of a manifest, in the order of the file, which its hash depends on."""

_Value = TypeVar("_Value")
_MAX_MEAN_SQUARE = float(np.finfo(np.float16).max) ** 2


def sample_seed(seed: int, index: int) -> int:
    """Return the seed of one sample, from which all of its draws come.

    A hash of base seed and index (NumPy's SeedSequence), so that caches of neighboring base seeds share no
    sample; below 2⁵³, so that every JSON reader keeps it exact.

    Args:
        seed: the cache's base seed, >= 0.
        index: the sample's index in the cache.
    """
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]) >> 11


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """One sample: the seed that all of its draws come from, its prompt, and the hash of its condition.

    The latter two are None where there is none.
    """

    prompt: str | None
    seed: int
    condition: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """The sample as JSON values, without the condition where there is none."""
        condition = {} if self.condition is None else {"condition": self.condition}
        return {"prompt": self.prompt, "seed": self.seed} | condition


@dataclass(frozen=True, kw_only=True)
class Span:
    """One shard's place in the cache: the file and the trajectories ``start … stop − 1`` in it."""

    file: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class Shard(Span):
    """A written shard: its span, its size in bytes and the SHA-256 of the file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that determines a cache's samples.

    Args:
        source: ``gaussian``, ``forward-process`` or ``diffusers``.
        alpha_bar: ᾱ_0 … ᾱ_T, indexed by the step t.
        latent_shape: shape of one latent, (C, H, W).
        trajectories: prompt and seed of each sample.
        num_train: the first ``num_train`` trajectories are the train split, the others the test split.
        shard_size: trajectories in a shard (the last one may hold fewer).
        seed: the base seed that the samples' seeds were derived from.
        clean_estimates: what the clean-sample estimates are, one of `CLEAN_ESTIMATE_KINDS`.
        units: the units of the latents, in words.
        generator: version of each library that drew the samples.
        model: ``id`` and ``revision`` of the diffusion model.
        scheduler: ``class`` and ``config`` of the sampler.
        timesteps: τ_T > … > τ_1, the sampler's own timesteps.
        guidance_scale: scale of the classifier-free guidance (1 is none).
        batch_size: samples the network saw at once; part of the recipe, as the last bits depend on it.
        model_dtype: number format the network ran in.
        device: kind of device the network ran on.
        clean_latents: ``name`` and ``sha256`` of the clean latents that a forward process started from.
        prompt_source: what chose the prompts from a file, see `read_prompts`; absent where they were given.
        note: free text, for instance the license of the samples.
        reuse: for trajectories that start at a midpoint x_m, where that comes from, as
            :meth:`refine_env.trajectories.reuse.Reuse.record` has it. Then everything here is of the steps t <= m.
        conditions: what the images are that the network saw beside the latents, as
            :meth:`refine_env.trajectories.conditions.Conditions.record` has it, with the ``sha256`` of the file in the
            cache's folder that holds them.
    """

    source: str
    alpha_bar: tuple[float, ...]
    latent_shape: tuple[int, ...]
    trajectories: tuple[Trajectory, ...]
    num_train: int
    shard_size: int
    seed: int
    clean_estimates: str
    units: str
    generator: Mapping[str, str]
    model: Mapping[str, str] | None = None
    scheduler: Mapping[str, Any] | None = None
    timesteps: tuple[int, ...] | None = None
    guidance_scale: float | None = None
    batch_size: int | None = None
    model_dtype: str | None = None
    device: str | None = None
    clean_latents: Mapping[str, str] | None = None
    prompt_source: Mapping[str, Any] | None = None
    note: str | None = None
    reuse: Mapping[str, Any] | None = None
    conditions: Mapping[str, Any] | None = None

    @property
    def num_trajectories(self) -> int:
        """The number of trajectories."""
        return len(self.trajectories)

    @property
    def num_steps(self) -> int:
        """T, the number of reverse diffusion steps; m of trajectories that start at a midpoint."""
        return len(self.alpha_bar) - 1

    @property
    def has_full(self) -> bool:
        """Whether x_0 of the full run is recorded beside every trajectory that starts at a midpoint."""
        return self.reuse is not None and bool(self.reuse["with_full"])

    @property
    def latent_dim(self) -> int:
        """M, the dimensions of one latent."""
        return prod(self.latent_shape)

    @cached_property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule ᾱ_0 … ᾱ_T."""
        return NoiseSchedule(self.alpha_bar)

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """Every shard's file name and trajectories, in order."""
        starts = range(0, self.num_trajectories, self.shard_size)
        return tuple(
            Span(
                file=f"trajectories-{number:05d}-of-{len(starts):05d}.safetensors",
                start=start,
                stop=min(start + self.shard_size, self.num_trajectories),
            )
            for number, start in enumerate(starts)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as JSON values, in the manifest's order."""
        derived = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "num_steps": self.num_steps,
            "dtype": DTYPE,
            "splits": {"train": [0, self.num_train], "test": [self.num_train, self.num_trajectories]},
            "trajectories": [sample.to_dict() for sample in self.trajectories],
        }
        added = {name: getattr(self, name) for name in ("reuse", "conditions")}
        present = {name: dict(value) for name, value in added.items() if value is not None}
        fields = {name: derived[name] if name in derived else _plain(getattr(self, name)) for name in _RECIPE_FIELDS}
        return fields | present

    def to_bytes(self) -> bytes:
        """Write the recipe as JSON text with a hash of itself, the same bytes for the same recipe.

        Raises:
            ConfigurationError: if a field cannot stand in a manifest, for instance a text that is not Unicode.
        """
        return _dump(self.to_dict())

    def scheduler_alpha_bar(self) -> NDArray[np.float64] | None:
        """Compute ᾱ_0 … ᾱ_T from the scheduler's config and timesteps, shape (T+1,).

        Returns:
            None if the recipe names no scheduler, or one whose β are neither linear nor scaled-linear.
        """
        config = (self.scheduler or {}).get("config", {})
        power = {"linear": 1.0, "scaled_linear": 0.5}.get(str(config.get("beta_schedule")))
        count, first, last = (config.get(name) for name in ("num_train_timesteps", "beta_start", "beta_end"))
        timesteps = self.timesteps or ()
        if (
            power is None
            or config.get("trained_betas") is not None
            or config.get("rescale_betas_zero_snr")
            or type(count) is not int
            or not 1 <= count <= _MAX_TRAIN_STEPS
            or not all(type(value) is float and 0.0 < value < 1.0 for value in (first, last))
            or not timesteps
            or not 0 <= min(timesteps) <= max(timesteps) < count
        ):
            return None
        table = alphas_cumprod(first, last, count, power)
        return np.concatenate([[1.0], table[list(reversed(timesteps))]])

    def differences(self, other: Recipe) -> list[str]:
        """Return the fields in which ``other`` differs, as ``name = other's instead of own``."""
        mine, theirs = self.to_dict(), other.to_dict()
        return [
            f"{name} = {shorten(theirs.get(name))} instead of {shorten(mine.get(name))}"
            for name in mine | theirs
            if mine.get(name) != theirs.get(name)
        ]

    @classmethod
    def from_bytes(cls, raw: bytes, where: str) -> Recipe:
        """Read a recipe back.

        Args:
            raw: JSON text of a recipe, or of a whole manifest.
            where: the file's name, for the messages.

        Raises:
            CacheFormatError: naming the first field that is not as the format has it.
        """
        return cls._from_fields(_Fields.parse(raw, where))

    @classmethod
    def _from_fields(cls, fields: _Fields) -> Recipe:
        alpha_bar = fields.numbers("alpha_bar")
        try:
            NoiseSchedule(alpha_bar)
        except ConfigurationError as error:
            raise CacheFormatError(f"{fields.where}: {error} {REMEDY}") from None
        num_steps = fields.integer("num_steps", 1)
        if num_steps != len(alpha_bar) - 1:
            fields.fail("num_steps", f"len(alpha_bar) - 1 = {len(alpha_bar) - 1}", num_steps)
        if (dtype := fields.text("dtype")) != DTYPE:
            fields.fail("dtype", repr(DTYPE), dtype)
        trajectories = tuple(
            Trajectory(
                prompt=entry.optional("prompt", entry.text),
                seed=entry.integer("seed"),
                condition=entry.optional("condition", entry.text),
            )
            for entry in fields.entries("trajectories")
        )
        splits = fields.entry("splits")
        train, test = splits.integers("train"), splits.integers("test")
        if not (len(train) == len(test) == 2 and train[0] == 0 < train[1] == test[0] <= test[1] == len(trajectories)):
            fields.fail(
                "splits",
                f"two adjacent ranges covering 0 … {len(trajectories)}, train first and not empty",
                {"train": train, "test": test},
            )
        latent_shape = fields.integers("latent_shape")
        if not 1 <= len(latent_shape) <= _MAX_DIMENSIONS or min(latent_shape) < 1:
            fields.fail("latent_shape", f"1 to {_MAX_DIMENSIONS} positive integers", list(latent_shape))
        timesteps = fields.optional("timesteps", fields.integers)
        if timesteps is not None and len(timesteps) != num_steps:
            fields.fail("timesteps", f"{num_steps} integers, one a step", list(timesteps))
        return cls(
            source=fields.choice("source", SOURCES),
            alpha_bar=alpha_bar,
            latent_shape=latent_shape,
            trajectories=trajectories,
            num_train=train[1],
            shard_size=fields.integer("shard_size", 1),
            seed=fields.integer("seed"),
            clean_estimates=fields.choice("clean_estimates", CLEAN_ESTIMATE_KINDS),
            units=fields.text("units"),
            generator=fields.texts("generator"),
            model=fields.optional("model", fields.texts, "id", "revision"),
            scheduler=fields.optional("scheduler", fields.scheduler),
            timesteps=timesteps,
            guidance_scale=fields.optional("guidance_scale", fields.number),
            batch_size=fields.optional("batch_size", fields.integer, 1),
            model_dtype=fields.optional("model_dtype", fields.text),
            device=fields.optional("device", fields.text),
            clean_latents=fields.optional("clean_latents", fields.texts, "name", "sha256"),
            prompt_source=fields.optional("prompt_source", fields.mapping),
            note=fields.optional("note", fields.text),
            reuse=fields.optional("reuse", fields.reuse, num_steps, len(trajectories)),
            conditions=fields.optional("conditions", fields.conditions, len(trajectories)),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class DecoderRecord:
    """What a device's decoder makes of what the device holds, as `refine-env decoder` measured it on the train split.

    Args:
        model: ``id`` and ``revision`` of the network; None where the decoder is linear.
        generator: version of each library that ran.
        guidance_scale: scale of the classifier-free guidance; 1 is none.
        draws: noises per trajectory and point.
        seed: of the noises.
        noise_to_signal: ν of white noise on x_0, ascending.
        noise_decoded: the mean squared error after decoding it, of every ν.
        shares: of the coding error in the power of what is sent, see :class:`refine_env.model.decoding.DecoderCurve`.
        held: of every payload the mean squared error of what the device holds, (T+1, E).
        decoded: of every payload that after decoding, (T+1, E).
    """

    model: Mapping[str, str] | None
    generator: Mapping[str, str]
    guidance_scale: float
    draws: int
    seed: int
    noise_to_signal: tuple[float, ...]
    noise_decoded: tuple[float, ...]
    shares: tuple[float, ...]
    held: Mapping[str, NDArray[np.float64]]
    decoded: Mapping[str, NDArray[np.float64]]

    def to_dict(self) -> dict[str, Any]:
        """Two fields of the manifest: what was measured, and the curves, one for each payload and step."""
        names = ("model", "generator", "guidance_scale", "draws", "seed", "noise_to_signal", "noise_decoded", "shares")
        curves = [
            {"payload": payload, "step": step, "held": held.tolist(), "decoded": decoded.tolist()}
            for payload in DECODED_PAYLOADS
            for step, (held, decoded) in enumerate(zip(self.held[payload], self.decoded[payload], strict=True))
        ]
        return {"decoder": {name: _plain(getattr(self, name)) for name in names}, "decoder_curves": curves}

    @classmethod
    def _from_fields(cls, fields: _Fields, recipe: Recipe) -> DecoderRecord | None:
        """The record in a manifest's fields, None where there is none."""
        if fields.values.get("decoder") is None:
            return None
        entry = fields.entry("decoder")
        noise, noise_decoded = entry.numbers("noise_to_signal"), entry.numbers("noise_decoded")
        shares = entry.numbers("shares")
        if not noise or len(noise) != len(noise_decoded) or min(*noise, *noise_decoded) <= 0.0:
            entry.fail("noise_to_signal", "positive numbers, as many as in noise_decoded", list(noise))
        if len(shares) < 2 or shares[0] != 0.0 or shares[-1] >= 1.0 or sorted(set(shares)) != list(shares):
            entry.fail("shares", "numbers that ascend from 0 to less than 1", list(shares))
        curves = fields.entries("decoder_curves")
        steps = recipe.num_steps + 1
        listed = [(curve.text("payload"), curve.integer("step")) for curve in curves]
        if listed != [(payload, step) for payload in DECODED_PAYLOADS for step in range(steps)]:
            fields.fail("decoder_curves", f"curves of {', '.join(DECODED_PAYLOADS)}, {steps} steps each", listed)
        errors = {
            name: np.stack([curve.array(name, (len(shares),)) for curve in curves]) for name in ("held", "decoded")
        }
        for values in errors.values():
            values.setflags(write=False)
        if min(values.min() for values in errors.values()) < 0.0:
            fields.fail("decoder_curves", "mean squared errors, none below 0", "others")
        tables = {
            name: {payload: values[k * steps : (k + 1) * steps] for k, payload in enumerate(DECODED_PAYLOADS)}
            for name, values in errors.items()
        }
        return cls(
            model=entry.optional("model", entry.texts, "id", "revision"),
            generator=entry.texts("generator"),
            guidance_scale=entry.number("guidance_scale"),
            draws=entry.integer("draws", 1),
            seed=entry.integer("seed"),
            noise_to_signal=noise,
            noise_decoded=noise_decoded,
            shares=shares,
            **tables,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Manifest:
    """A finished cache: its recipe, its statistics and its shards.

    All statistics are float64, computed from the float16 values as stored.

    Args:
        recipe: what the samples were drawn from.
        mean_square: E‖x_t‖²/M over all trajectories, shape (T+1,), indexed by t.
        second_moments: G[t, t'] = E⟨x_t, x_t'⟩/M over the train split, shape (T+1, T+1).
        clean_second_moments: the same of the clean-sample estimates, E⟨y_t, y_t'⟩/M over the train split,
            shape (T, T); y_0 = x_0.
        shards: the shards in order, with sizes and hashes.
        decoder: what a device's decoder was measured to do, None where nobody has.
        is_sealed: whether the file that it was read from holds a hash of itself (format version 2).
    """

    recipe: Recipe
    mean_square: NDArray[np.float64]
    second_moments: NDArray[np.float64]
    clean_second_moments: NDArray[np.float64]
    shards: tuple[Shard, ...]
    decoder: DecoderRecord | None = None
    is_sealed: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Return the manifest as JSON values, in the order of the file."""
        decoder = {} if self.decoder is None else self.decoder.to_dict()
        return self.recipe.to_dict() | {
            "mean_square": self.mean_square.tolist(),
            "second_moments": self.second_moments.tolist(),
            "clean_second_moments": self.clean_second_moments.tolist(),
            **decoder,
            "shards": [asdict(shard) for shard in self.shards],
        }

    def to_bytes(self) -> bytes:
        """Write the JSON text of `manifest.json` with a hash of itself, the same bytes for the same content.

        Raises:
            ConfigurationError: if a field cannot stand in a manifest.
        """
        return _dump(self.to_dict())

    @classmethod
    def from_bytes(cls, raw: bytes, where: str) -> Manifest:
        """Read a manifest.

        Args:
            raw: content of `manifest.json`.
            where: the file's name, for the messages.

        Raises:
            CacheFormatError: naming the first field that is not as the format has it, or if the file's hash of
                itself does not fit its content.
        """
        fields = _Fields.parse(raw, where)
        recipe = Recipe._from_fields(fields)
        shards = tuple(
            Shard(
                file=entry.text("file"),
                start=entry.integer("start"),
                stop=entry.integer("stop"),
                bytes=entry.integer("bytes", 1),
                sha256=entry.text("sha256"),
            )
            for entry in fields.entries("shards")
        )
        listed = [(shard.file, shard.start, shard.stop) for shard in shards]
        if listed != [(span.file, span.start, span.stop) for span in recipe.spans]:
            fields.fail(
                "shards",
                f"{len(recipe.spans)} files of {recipe.shard_size} of the {recipe.num_trajectories} "
                "trajectories "
                f"each, the first {recipe.spans[0].file}",
                listed,
            )
        steps = recipe.num_steps
        return cls(
            recipe=recipe,
            mean_square=fields.array("mean_square", (steps + 1,)),
            second_moments=fields.array("second_moments", (steps + 1, steps + 1)),
            clean_second_moments=fields.array("clean_second_moments", (steps, steps)),
            shards=shards,
            decoder=DecoderRecord._from_fields(fields, recipe),
            is_sealed=_SEAL in fields.values,
        )


def is_cache_file(name: str) -> bool:
    """Return whether a file of this name belongs to a cache."""
    return name in (MANIFEST_FILE, CONDITIONS_FILE) or is_shard_file(name)


def is_shard_file(name: str) -> bool:
    """Return whether a file of this name is a shard of a cache."""
    return _SHARD_NAME.fullmatch(name) is not None


class _Fields:
    """The fields of one JSON object, each read with a check that fails by name."""

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.values = values
        self.where = where
        self.prefix = prefix

    @classmethod
    def parse(cls, raw: bytes, where: str) -> _Fields:
        fields = cls(parse_json(raw, where), where)
        fields.check_format(raw)
        return fields

    def fail(self, name: str, must: str, got: Any) -> NoReturn:
        raise CacheFormatError(f"`{self.prefix}{name}` in {self.where} must be {must}, got {shorten(got)}. {REMEDY}")

    def check_format(self, raw: bytes) -> None:
        if (name := self.values.get("format")) != FORMAT:
            self.fail("format", repr(FORMAT), name)
        version = self.values.get("format_version")
        if type(version) is not int or version not in (UNSEALED_VERSION, FORMAT_VERSION):
            raise CacheFormatError(
                f"`format_version` in {self.where} must be {UNSEALED_VERSION} or {FORMAT_VERSION}, got "
                f"{shorten(version)}. Generate the cache again, or use the version of refine-env that wrote it."
            )
        if (_SEAL in self.values or version != UNSEALED_VERSION) and raw != _seal(raw[: -len(_seal(b""))]):
            raise CacheFormatError(
                f"`{_SEAL}` in {self.where} must be the hash of what stands before it, and is not: the file was "
                f"changed or damaged. {REMEDY}"
            )

    def optional(self, name: str, read: Callable[..., _Value], *args: Any) -> _Value | None:
        """Return what ``read(name, *args)`` gives, or None where the field is absent or null."""
        return None if self.values.get(name) is None else read(name, *args)

    def text(self, name: str) -> str:
        value = self.values.get(name)
        if not isinstance(value, str):
            self.fail(name, "a text", value)
        return value

    def choice(self, name: str, choices: Sequence[str]) -> str:
        value = self.text(name)
        if value not in choices:
            self.fail(name, "one of " + ", ".join(map(repr, choices)), value)
        return value

    def integer(self, name: str, minimum: int = 0) -> int:
        value = self.values.get(name)
        if type(value) is not int or value < minimum:
            self.fail(name, f"an integer >= {minimum}", value)
        return value

    def number(self, name: str) -> float:
        value: Any = self.values.get(name)
        if type(value) not in (int, float):
            self.fail(name, "a number", value)
        return float(value)

    def integers(self, name: str) -> tuple[int, ...]:
        value = self.values.get(name)
        if not isinstance(value, list) or any(type(item) is not int for item in value):
            self.fail(name, "a list of integers", value)
        return tuple(value)

    def numbers(self, name: str) -> tuple[float, ...]:
        value = self.values.get(name)
        if not isinstance(value, list) or any(type(item) not in (int, float) for item in value):
            self.fail(name, "a list of numbers", value)
        return tuple(map(float, value))

    def array(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
        value = self.values.get(name)
        try:
            array = np.array(value, dtype=np.float64)
        except (TypeError, ValueError):
            array = np.empty(0)
        if array.shape != shape or not (np.abs(array) <= _MAX_MEAN_SQUARE).all():
            self.fail(name, f"finite numbers of shape {shape}, within float16's squares", value)
        array.setflags(write=False)
        return array

    def mapping(self, name: str) -> dict[str, Any]:
        value = self.values.get(name)
        if not isinstance(value, dict):
            self.fail(name, "an object", value)
        return value

    def texts(self, name: str, *keys: str) -> dict[str, str]:
        """Read an object of texts, which must have all of these keys."""
        entry = self.entry(name)
        return {key: entry.text(key) for key in dict.fromkeys((*keys, *entry.values))}

    def scheduler(self, name: str) -> dict[str, Any]:
        entry = self.entry(name)
        return {**entry.values, "class": entry.text("class"), "config": entry.mapping("config")}

    def reuse(self, name: str, step: int, count: int) -> dict[str, Any]:
        """Read where the midpoints x_m of so many trajectories come from."""
        entry = self.entry(name)
        entry.choice("mode", REUSE_MODES)
        if not 0.0 < entry.number("ratio") < 1.0:
            entry.fail("ratio", "a number between 0 and 1", entry.values["ratio"])
        if entry.integer("step", 1) != step:
            entry.fail("step", f"{step}, the number of steps of the cache", entry.values["step"])
        entry.integer("num_steps", step + 1)
        entry.optional("stage_one_model", entry.texts, "id", "revision")
        entry.optional("prompt_source", entry.mapping)
        if not isinstance(entry.values.get("with_full"), bool):
            entry.fail("with_full", "true or false", entry.values.get("with_full"))
        sources = entry.entries("sources")
        for source in sources:
            source.text("prompt")
            if not source.integers("seeds"):
                source.fail("seeds", "at least one seed", [])
        if len(sources) != count:
            entry.fail("sources", f"a list of {count} objects, one a trajectory", sources)
        return dict(entry.values)

    def conditions(self, name: str, count: int) -> dict[str, Any]:
        """Read what the conditions of so many trajectories are."""
        entry = self.entry(name)
        for key in ("file_sha256", "values_sha256"):
            entry.text(key)
        shape = entry.integers("shape")
        if len(shape) != 4 or shape[0] != count or min(shape) < 1:
            entry.fail("shape", f"[{count}, C, H, W], an image a trajectory", list(shape))
        return dict(entry.values)

    def entry(self, name: str) -> _Fields:
        return _Fields(self.mapping(name), self.where, f"{name}.")

    def entries(self, name: str) -> list[_Fields]:
        value = self.values.get(name)
        if not isinstance(value, list) or not value or not all(isinstance(item, dict) for item in value):
            self.fail(name, "a list of objects, at least one", value)
        return [_Fields(item, self.where, f"{name}[{index}].") for index, item in enumerate(value)]


def _plain(value: Any) -> Any:
    """Turn a recipe's value into a type of JSON."""
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, tuple) else value


def _dump(values: Mapping[str, Any]) -> bytes:
    """Write sealed JSON text, always the same, with a line for each field and for each row of a nested list."""

    def compact(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)

    lines = []
    for name, value in values.items():
        try:
            check_json(value)
        except ValueError as error:
            raise ConfigurationError(
                f"`{name}` must be Unicode text and finite numbers, got {error}. Leave out what is neither."
            ) from None
        if isinstance(value, list) and value and isinstance(value[0], list | dict):
            rows = ",\n".join("    " + compact(row) for row in value)
            lines.append(f"  {compact(name)}: [\n{rows}\n  ]")
        else:
            lines.append(f"  {compact(name)}: {compact(value)}")
    raw = _seal(("{\n" + ",\n".join(lines)).encode())
    if len(raw) > MAX_JSON_BYTES:
        raise ConfigurationError(
            f"The manifest must have at most {MAX_JSON_BYTES} bytes, got {len(raw)}. Make several caches, of fewer "
            "trajectories each."
        )
    return raw


def _seal(body: bytes) -> bytes:
    """Complete a JSON object that lacks its end with a field that holds the hash of all before it."""
    return body + f',\n  "{_SEAL}": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()
