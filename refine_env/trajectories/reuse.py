"""Midpoint reuse: which midpoint x_m each trajectory of a cache starts from, and how it is come by.

The reuse ratio R is the part of the T steps that is not computed: m = round((1 − R)·T) evaluations of the network
remain. The noise of these m steps is what the trajectory's own seed draws for them in a full run, whatever the
midpoint.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from refine_env._validation import check_choice, check_finite, check_flag, check_integer, check_text, shown
from refine_env.errors import ConfigurationError
from refine_env.model.schedule import NoiseSchedule
from refine_env.trajectories.conditions import Conditions, hash_condition
from refine_env.trajectories.manifest import REUSE_MODES, Recipe, sample_seed
from refine_env.trajectories.midpoints import DEFAULT_MAX_BYTES, Midpoint, MidpointStore
from refine_env.trajectories.prompts import PromptSelection

if TYPE_CHECKING:
    from refine_env.trajectories.pipeline import LatentSampler

__all__ = ["MidpointSource", "Reuse", "check_stages", "describe_reuse", "obtain_midpoints"]

_ADVICE = "Give the part of the steps that is not computed, for example 0.5."


@dataclass(frozen=True, kw_only=True)
class Reuse:
    """How the trajectories of a cache start from midpoints.

    Modes, for a trajectory with the prompt c, the static prompt c_s and its own seed:

    - ``vanilla``: x_m of a run of c_s with a seed of that run's own, the one that the first trajectory with this
      c_s has. So all trajectories of one c_s start from one midpoint, and the first of them as with ``switch``.
    - ``switch``: c_s while t > m, then c, all with the trajectory's own seed. So no two share a midpoint.
    - ``two-stage``: as ``switch``, with another model while t > m.
    - ``mean``: the average of x_m over ``mean_runs`` runs of c_s, the first of which is that of ``vanilla``; with noise
      added so that its variance is 1 − ᾱ_m again, the trajectory's own x_T, scaled.
    - ``mean-plain``: that average without the noise.

    Of a model whose network sees an image beside the latent, that image is a part of c and of c_s.

    Args:
        ratio: R in [0, 1); 0 is a full run.
        static_prompts: c_s of each trajectory, or one for all.
        mode: one of `REUSE_MODES`.
        stage_one_model: of ``two-stage``, a hub id, a folder, or ``emoji``.
        mean_runs: J of the averages.
        midpoints: folder of the store, see `MidpointStore`.
        max_bytes: limit of the store.
        with_full: whether x_0 of the full run with the same prompt and seed is recorded beside, for the
            cost of that run.
        static_conditions: the images of c_s, one for each trajectory or one for all, where the model sees one.

    Raises:
        ConfigurationError: if a value is out of range, or values do not go together.
    """

    ratio: float
    static_prompts: Sequence[str]
    mode: str = "vanilla"
    stage_one_model: str | os.PathLike[str] | None = None
    mean_runs: int = 4
    midpoints: str | os.PathLike[str] | None = None
    max_bytes: int = DEFAULT_MAX_BYTES
    with_full: bool = False
    static_conditions: Conditions | None = None

    def __post_init__(self) -> None:
        ratio = check_finite("reuse_ratio", self.ratio, advice=_ADVICE)
        if not 0.0 <= ratio < 1.0:
            raise ConfigurationError(f"`reuse_ratio` must be in [0, 1), got {shown(self.ratio)}. {_ADVICE}")
        check_choice("reuse_mode", self.mode, REUSE_MODES)
        check_flag("with_full", self.with_full)
        check_integer("mean_runs", self.mean_runs, 1, 1000, advice="Give for example 4.")
        if (self.stage_one_model is not None) != (self.mode == "two-stage"):
            raise ConfigurationError(
                f"`stage_one_model` must go with the reuse mode 'two-stage', and with no other, got {self.mode!r} "
                f"{'without' if self.stage_one_model is None else 'with'} it. Give both, or neither."
            )
        if self.with_full and ratio == 0.0:
            raise ConfigurationError(
                "`with_full` must go with a reuse ratio above 0, got 0, whose x_0 is the full run's. Leave it out."
            )
        texts = self.static_prompts
        if isinstance(texts, str) or not texts or not all(isinstance(text, str) for text in texts):
            raise ConfigurationError(
                f"`static_prompts` must be a sequence of at least one text, got {texts!r:.60}. Give one a prompt."
            )
        for text in texts:
            check_text("static_prompts", text)

    def images(self, count: int) -> Conditions | None:
        """The static conditions of so many trajectories.

        Raises:
            ConfigurationError: if there is another number of them.
        """
        given = self.static_conditions
        return None if given is None else given.for_all(count, "static_conditions")

    @property
    def averages(self) -> bool:
        """Whether midpoints are averaged."""
        return self.mode.startswith("mean")

    def step(self, num_steps: int) -> int:
        """m = round((1 − R)·T), a half to the even number; T without reuse.

        Raises:
            ConfigurationError: if no step remains, or R skips none.
        """
        step = round((1.0 - self.ratio) * num_steps)
        if self.ratio > 0.0 and not 1 <= step <= num_steps - 1:
            raise ConfigurationError(
                f"`reuse_ratio` must leave m = round((1 - R)·T) in 1 … {num_steps - 1} of T = {num_steps} steps, got "
                f"R = {self.ratio!r}, m = {step}. Choose another ratio, or more steps."
            )
        return step

    def record(
        self, prompts: Sequence[str], seed: int, num_steps: int, stage_one: Mapping[str, str] | None
    ) -> dict[str, Any]:
        """What a cache's manifest says of its reuse, as JSON values.

        Args:
            prompts: of the trajectories.
            seed: the cache's base seed.
            num_steps: T.
            stage_one: ``id`` and ``revision`` of the model that made the midpoints, where it is another.

        Raises:
            ConfigurationError: if there is another number of static prompts.
        """
        static = list(self.static_prompts)
        if len(static) == 1:
            static *= len(prompts)
        if len(static) != len(prompts):
            raise ConfigurationError(
                f"`static_prompts` must be one for each of the {len(prompts)} prompts, or one for all, got "
                f"{len(static)}. Write one per line."
            )
        images = self.images(len(static))
        hashes = [None] * len(static) if images is None else [hash_condition(image) for image in images.values]
        runs = list(zip(static, hashes, strict=True))
        sources = []
        for index, (text, condition) in enumerate(runs):
            own = self.mode in ("switch", "two-stage")
            first = sample_seed(seed, index if own else runs.index((text, condition)))
            more = [sample_seed(first, run) for run in range(1, self.mean_runs)] if self.averages else []
            seen = {} if condition is None else {"condition": condition}
            sources.append({"prompt": text, **seen, "seeds": [first, *more]})
        source = static_prompts.source if isinstance(static_prompts := self.static_prompts, PromptSelection) else None
        return {
            "mode": self.mode,
            "ratio": float(self.ratio),
            "num_steps": num_steps,
            "step": self.step(num_steps),
            "stage_one_model": None if stage_one is None else dict(stage_one),
            "with_full": self.with_full,
            "prompt_source": None if source is None else dict(source),
            **({} if images is None else {"conditions": dict(images.source)}),
            "sources": sources,
        }

    def store(self) -> MidpointStore:
        """Open the store."""
        return MidpointStore(self.midpoints, max_bytes=self.max_bytes)


class MidpointSource:
    """Gives the trajectories of a recipe their midpoints: from the store, or made and stored.

    Args:
        target: the sampler of the recipe.
        static: the sampler that makes the midpoints; the same, or one of the same schedule.
        store: the store.
        recipe: which has a `Recipe.reuse`.
        conditions: the static conditions, one for each trajectory, where the model sees some.
    """

    def __init__(
        self,
        target: LatentSampler,
        static: LatentSampler,
        store: MidpointStore,
        recipe: Recipe,
        conditions: Conditions | None = None,
    ) -> None:
        assert recipe.reuse is not None
        assert recipe.batch_size is not None
        self._target, self._static, self._store = target, static, store
        self._mode = str(recipe.reuse["mode"])
        self._step = int(recipe.reuse["step"])
        self._sources = [(source["prompt"], source["seeds"]) for source in recipe.reuse["sources"]]
        self._seeds = [trajectory.seed for trajectory in recipe.trajectories]
        self._batch_size = recipe.batch_size
        self._images = None if conditions is None else conditions.values

    @property
    def of_another_model(self) -> bool:
        """Whether another model makes the midpoints."""
        return self._static is not self._target

    def start(self, indices: Sequence[int], report: Callable[[], None]) -> list[Midpoint]:
        """The midpoints from which trajectories start.

        Args:
            indices: of the trajectories, in the cache.
            report: called after every step of a run that makes midpoints.

        Raises:
            ConfigurationError: if an average is wanted of a scheduler that keeps more than x_t.
            CacheError: if the store cannot be read or written.
        """
        seen = {index: None if self._images is None else hash_condition(self._images[index]) for index in indices}
        runs = {
            index: [(prompt, seed, seen[index]) for seed in seeds]
            for index in indices
            for prompt, seeds in [self._sources[index]]
        }
        images = (
            None if self._images is None else {run: self._images[index] for index, own in runs.items() for run in own}
        )
        found = obtain_midpoints(
            self._static,
            self._store,
            [run for own in runs.values() for run in own],
            [self._step],
            self._batch_size,
            report,
            images=images,
        )
        return [self._combine(index, [found[(*run, self._step)] for run in runs[index]]) for index in indices]

    def _combine(self, index: int, midpoints: Sequence[Midpoint]) -> Midpoint:
        if self._mode not in ("mean", "mean-plain"):
            (midpoint,) = midpoints
            return midpoint
        if midpoints[0].tensors.keys() != {"latent"}:
            raise ConfigurationError(
                f"`reuse_mode` must be another than {self._mode!r} for {self._target.scheduler_config['class']}, which "
                "keeps more than x_t from one step to the next, that no average of runs has. Choose ddpm or ddim."
            )
        runs = np.stack([midpoint.tensors["latent"] for midpoint in midpoints])
        mean: NDArray[np.float64] = runs.astype(np.float64).mean(axis=0)
        if self._mode == "mean":
            missing = (1.0 - 1.0 / len(runs)) * (1.0 - self._target.schedule.alpha_bar[self._step])
            mean = mean + np.sqrt(missing) * self._target.initial_noise([self._seeds[index]])[0]
        return replace(midpoints[0], tensors={"latent": mean.astype(runs.dtype)})


def obtain_midpoints(
    sampler: LatentSampler,
    store: MidpointStore,
    runs: Sequence[tuple[Any, ...]],
    steps: Sequence[int],
    batch_size: int,
    report: Callable[[], None] | None = None,
    *,
    images: Mapping[tuple[Any, ...], NDArray[Any]] | None = None,
) -> dict[tuple[Any, ...], Midpoint]:
    """The midpoints of runs at several steps: from the store, or made, each run once, and stored.

    Args:
        sampler: that makes them.
        store: the store.
        runs: prompt and seed of each, and whatever else tells it from others.
        steps: m, at least one.
        batch_size: samples that the network sees at once; a batch that is not full is padded.
        report: called after every step of a run that makes midpoints.
        images: that each run's network sees beside the latent, (C, H, W), where it sees one.

    Returns:
        By the run's tuple with m behind it.

    Raises:
        ConfigurationError: if the scheduler's runs have no midpoints, or a step is out of range.
        CacheError: if the store cannot be read or written.
    """
    found: dict[tuple[Any, ...], Midpoint] = {}
    missing = []
    for run in dict.fromkeys(runs):
        for step in steps:
            image = None if images is None else images[run]
            midpoint = store.read(sampler.midpoint_key(run[0], run[1], step, batch_size, image))
            if midpoint is not None:
                found[(*run, step)] = midpoint
            elif run not in missing:
                missing.append(run)
    for first in range(0, len(missing), batch_size):
        batch = missing[first : first + batch_size]
        padded = batch + batch[-1:] * (batch_size - len(batch))  # the last bits depend on the batch size
        prompts, seeds = [run[0] for run in padded], [run[1] for run in padded]
        seen = None if images is None else np.stack([images[run] for run in padded])
        last, *passing = sorted(set(steps))
        made = sampler.sample_midpoints(prompts, seeds, last, report, passing=passing, conditions=seen)
        places = [(*run, step) for step in (last, *passing) for run in padded]
        for place, midpoint in zip(places, made, strict=True):
            if place not in found:
                store.write(midpoint)
                found[place] = midpoint
    return found


def describe_reuse(
    reuse: Reuse, sampler: LatentSampler, static: LatentSampler | None, prompts: Sequence[str], seed: int
) -> dict[str, Any]:
    """What a cache's recipe says that is not as `LatentSampler.describe` has it: the steps t <= m, and the reuse.

    Args:
        reuse: with a ratio above 0.
        sampler: of the cache.
        static: that of the steps t > m, where it is another.
        prompts: of the trajectories.
        seed: the cache's base seed.

    Raises:
        ConfigurationError: if the two samplers do not fit each other, or the reuse does not fit the prompts or T.
    """
    check_stages(sampler, static or sampler)
    images = reuse.images(len(prompts))
    (static or sampler).check_conditions(None if images is None else images.values.shape, "static_conditions")
    stage_one = None if static is None else {"id": static.model_id, "revision": static.revision}
    record = reuse.record(prompts, seed, sampler.schedule.num_steps, stage_one)
    step = record["step"]
    return {
        "reuse": record,
        "schedule": NoiseSchedule(sampler.schedule.alpha_bar[: step + 1]),
        "timesteps": sampler.timesteps[-step:],
    }


def check_stages(target: LatentSampler, static: LatentSampler) -> None:
    """Check that a run of one sampler can go on from a midpoint of another.

    Raises:
        ConfigurationError: if they have not the same latents and schedule, or the scheduler's runs have no midpoints.
    """
    target.check_midpoints()
    for name in ("latent_shape", "timesteps", "schedule"):
        wanted, given = getattr(target, name), getattr(static, name)
        if wanted != given:
            raise ConfigurationError(
                f"`stage_one_model` must have the same {name} as the model, {wanted!r:.100}, got {given!r:.100} of "
                f"{static.model_id!r:.100}. Choose another."
            )
