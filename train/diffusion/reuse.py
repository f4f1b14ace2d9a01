"""What midpoint reuse costs in fidelity, and saves in time, on pairs of prompts of the bundled model.

``python -m train.diffusion.reuse`` takes pairs of three kinds (a source whose midpoints are reused, and a target):

- ``tone``: the same glyph family in another skin tone;
- ``role``: another gender of the same family, or another family of people with the same tone and gender;
- ``unrelated``: a glyph of something else.

Blocks of pairs, each of families of its own, are generated at every reuse ratio and in every mode, and compared with
the full runs of the same seeds. The midpoints go through one store, and each run gives those of all ratios. A run that
is interrupted goes on where it stopped, and ends in the same tables but for the times.

There is one bundled model, so the first stage of ``two-stage`` is that model itself with a static prompt: what is left
of the target's prompt without the detail that the kind is about.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from refine_env.commands import command, parse_list, run
from refine_env.errors import ConfigurationError
from refine_env.evaluation import Table, bootstrap_interval, read_table, write_atomically, write_table
from refine_env.metrics import GlyphTask, gallery_path, psnr, ssim
from refine_env.model.schedule import NoiseSchedule
from refine_env.trajectories import Reuse, TrajectoryCache, generate_diffusers, sample_seed
from refine_env.trajectories.adaptive import ErrorPredictor, candidate_divergence
from refine_env.trajectories.manifest import REUSE_MODES
from refine_env.trajectories.midpoints import MidpointStore
from refine_env.trajectories.pipeline import LatentDecoder, LatentSampler
from refine_env.trajectories.reuse import obtain_midpoints
from refine_env.trajectories.similarity import compare, estimate_distances, normalized_mse
from train.diffusion.config import MODEL
from train.diffusion.reuse_figures import draw_quality, draw_similarity, draw_strips
from train.options import show_log

log = logging.getLogger("train.diffusion.reuse")

GALLERY = gallery_path(MODEL)
KINDS = ("tone", "role", "unrelated")
RATIOS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.94, 0.98)
MODES = ("vanilla", "switch", "two-stage", "mean", "mean-plain")
MEAN_RUNS = 4
PAIRS_PER_KIND = 2
"""Of every source."""

SCORES = ("nmse", "psnr_db", "ssim", "family_kept", "glyph_kept")
PAIR_COLUMNS: dict[str, type] = {
    "block": int, "mode": str, "ratio": float, "step": int, "kind": str, "source": str, "target": str, "static": str,
    **dict.fromkeys(SCORES, float),
}  # fmt: skip
"""One row a pair, mode and ratio: NMSE of x_0 against the full run's, PSNR and SSIM of the decoded images against
its, and whether the glyph nearest to the image is of the family, or the very one, that is nearest to its."""

SUMMARY_COLUMNS: dict[str, type] = {
    "kind": str, "mode": str, "ratio": float, "step": int, "pairs": int,
    **{name + end: float for name in SCORES for end in ("", "_low", "_high")},
}  # fmt: skip
"""Means over the pairs, with 95 % bootstrap intervals."""

TIME_COLUMNS: dict[str, type] = {
    "block": int, "mode": str, "ratio": float, "step": int, "pictures": int, "seconds": float,
    "processor_seconds": float, "speed_up": float,
}  # fmt: skip
"""One row a generation that was not interrupted, loading the model included, with the midpoints at hand: the time
of a picture, and by how much less processor time it is than the full run's of the same block."""

SIMILARITY_COLUMNS: dict[str, type] = {
    "kind": str, "step": int, "pairs": int,
    **{name + end: float for name in ("nmse", "cosine", "divergence", "bound") for end in ("", "_low", "_high")},
}  # fmt: skip
"""Of the pairs of the first block, indexed by t, along the source's path; t = 0, where the divergence is infinite, is
left out."""

DISTANCE_COLUMNS: dict[str, type] = {
    "block": int, "mode": str, "kind": str, "source": str, "target": str, "step": int,
    "distance": float, "power": float,
}  # fmt: skip
"""‖y(x_m, c) − y(x_m, c_s)‖² and ‖y(x_m, c)‖² at the stored midpoints, for c the target and c_s the source."""

ADAPTIVE_COLUMNS: dict[str, type] = {
    "mode": str, "tolerance": float, "scale": float, "exponent": float, "tuning_pairs": int, "pairs": int,
    **dict.fromkeys(("coverage", "coverage_low", "coverage_high", "ratio", "evaluations", "asked"), float),
    **dict.fromkeys(("fixed_ratio", "fixed_coverage", "fixed_evaluations", "oracle_ratio"), float),
}  # fmt: skip
"""R* on the pairs of the odd blocks, with a predictor tuned on those of the even ones: the share of pairs whose NMSE is
at most the tolerance, the means of R*, of the evaluations m that are left and of those that were asked for R*; the
largest single R of at least that coverage on the same pairs; and the mean of the largest R that errs less than the
tolerance on each."""

TOLERANCES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
COVERAGE = 0.9

_TONE = re.compile(r" emoji modifier fitzpatrick type-[\d-]+")
_PERSON = re.compile(r"(?:adult|man|woman)\b")
_SIGN = re.compile(r" (?:female|male) sign$")
_OTHER_PEOPLE = re.compile(r"\b(?:adult|man|woman|men|women|person|boy|girl|child|baby|fe?male|flag|fitzpatrick)\b")


@dataclass(frozen=True)
class Variant:
    """A prompt, taken apart.

    Attributes:
        prompt: as it is.
        family: without tone and gender.
        tone: the words of its skin tone, "" if there are none.
        gender: ``adult``, ``man``, ``woman``, or the sign; "" if none.
    """

    prompt: str
    family: str
    tone: str
    gender: str

    @classmethod
    def of(cls, prompt: str) -> Variant:
        """Take a prompt apart; one of several people has more than one tone, and stays whole."""
        tones = _TONE.findall(prompt)
        if len(tones) > 1:
            return cls(prompt, prompt, "", "")
        bare = _TONE.sub("", prompt)
        sign, person = _SIGN.search(bare), _PERSON.match(bare)
        gender = (sign.group().strip() if sign else "") or (person.group() if person else "")
        family = _PERSON.sub("adult", _SIGN.sub("", bare), count=1) if person else _SIGN.sub("", bare)
        return cls(prompt, family, tones[0] if tones else "", gender)


@dataclass(frozen=True)
class Pair:
    """A source and a target, with the static prompt of the target's first stage."""

    kind: str
    source: str
    target: str
    static: str


@dataclass(frozen=True)
class Block:
    """Pairs of families of their own.

    Attributes:
        number: of the block.
        sources: prompts, one a family.
        pairs: of these sources.
    """

    number: int
    sources: list[str]
    pairs: list[Pair]

    @property
    def prompts(self) -> list[str]:
        """Of the trajectories: the sources, whose own seeds are those of the shared midpoints, and the targets."""
        return self.sources + [pair.target for pair in self.pairs]

    def static_prompts(self, mode: str) -> list[str]:
        """c_s of the trajectories; a source's is itself."""
        return self.sources + [pair.static if mode == "two-stage" else pair.source for pair in self.pairs]


def choose_blocks(prompts: Sequence[str], blocks: int, families: int, seed: int) -> list[Block]:
    """Choose pairs, at random.

    Args:
        prompts: that the model knows.
        blocks: how many blocks; a block is the same whatever their number.
        families: of a block.
        seed: of the choice.

    Raises:
        ConfigurationError: if the prompts have too few families in several tones and genders.
    """
    by_family: dict[str, list[Variant]] = {}
    for prompt in prompts:
        variant = Variant.of(prompt)
        by_family.setdefault(variant.family, []).append(variant)
    varied = {
        family: variants
        for family, variants in by_family.items()
        if len({v.tone for v in variants if v.tone}) > PAIRS_PER_KIND and len({v.gender for v in variants}) > 1
    }
    things = [variants[0].prompt for family, variants in by_family.items() if not _OTHER_PEOPLE.search(family)
              and len(variants) == 1 and not variants[0].tone]  # fmt: skip
    if len(varied) < blocks * families or families < 2 or len(things) < PAIRS_PER_KIND:
        raise ConfigurationError(
            f"`families` must be at least 2, and {blocks} blocks of them among the {len(varied)} families with several "
            f"skin tones and genders, got {families}. Choose fewer blocks or families."
        )
    rng = np.random.default_rng(seed)
    order = [str(name) for name in rng.permutation(sorted(varied))]
    chosen = []
    for number in range(blocks):
        own = order[number * families : (number + 1) * families]
        draw = np.random.default_rng([seed, number])
        toned = [[variant for variant in varied[family] if variant.tone] for family in own]
        sources = [variants[draw.integers(len(variants))] for variants in toned]
        pairs: list[Pair] = []
        for place, (source, variants) in enumerate(zip(sources, toned, strict=True)):
            pairs += _pairs_of(source, variants, toned[(place + 1) % families], things, draw)
        chosen.append(Block(number, [source.prompt for source in sources], pairs))
    return chosen


def _pairs_of(
    source: Variant, variants: Sequence[Variant], others: Sequence[Variant], things: Sequence[str], draw: Any
) -> Iterator[Pair]:
    """The pairs of one source: two of each kind."""

    def pick(candidates: Sequence[Any], count: int) -> list[Any]:
        return [candidates[k] for k in draw.permutation(len(candidates))[:count]]

    tones = [v for v in variants if v.gender == source.gender and v.tone != source.tone]
    genders = [v for v in variants if v.tone == source.tone and v.gender != source.gender]
    roles = [v for v in others if v.tone == source.tone]
    for variant in pick(tones, PAIRS_PER_KIND):
        yield Pair("tone", source.prompt, variant.prompt, _TONE.sub("", variant.prompt))
    for variant in pick(genders, 1) + pick(roles, 1):
        yield Pair("role", source.prompt, variant.prompt, "adult" + source.tone)
    for prompt in pick(things, PAIRS_PER_KIND):
        yield Pair("unrelated", source.prompt, prompt, "")


@dataclass(frozen=True)
class Settings:
    """Of the generations.

    Args:
        model: hub id, folder, or ``emoji``.
        work: folder of caches, midpoints and scores.
        ratios: R, 0 among them.
        modes: of :data:`REUSE_MODES`.
        num_steps: T.
        guidance_scale: scale of the classifier-free guidance.
        batch_size: samples that the network sees at once.
        seed: base seed; block k has that of sample k.
        gallery: of the model's glyphs.
    """

    model: str
    work: Path
    ratios: tuple[float, ...]
    modes: tuple[str, ...]
    num_steps: int
    guidance_scale: float
    batch_size: int
    seed: int
    gallery: Path

    def reuse(self, block: Block, mode: str, ratio: float) -> Reuse:
        """The midpoints of a cell."""
        return Reuse(
            ratio=ratio,
            static_prompts=block.static_prompts(mode),
            mode=mode,
            stage_one_model=self.model if mode == "two-stage" else None,
            mean_runs=MEAN_RUNS,
            midpoints=self.work / "midpoints",
        )

    def steps(self) -> dict[float, int]:
        """m of every ratio above 0."""
        return {
            ratio: Reuse(ratio=ratio, static_prompts=[""]).step(self.num_steps) for ratio in self.ratios if ratio > 0.0
        }


class Study:
    """Generates and scores the blocks.

    Args:
        settings: of the generations.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.sampler = LatentSampler(
            settings.model, num_steps=settings.num_steps, guidance_scale=settings.guidance_scale
        )
        self.decoder = LatentDecoder(settings.model)
        self.task = GlyphTask(settings.gallery)
        self.families = np.array([Variant.of(prompt).family for prompt in self.task.prompts])
        self.store = MidpointStore(settings.work / "midpoints")

    def cell(self, block: Block, mode: str, ratio: float) -> Path:
        """Folder of a cell's cache; its scores and its time stand beside."""
        name = "full" if ratio == 0.0 else f"{mode}-{ratio:g}"
        return self.settings.work / f"block-{block.number}" / name

    def generate(self, block: Block, mode: str, ratio: float) -> TrajectoryCache:
        """The cache of a cell, and beside it the time that it took, if it was made at one go."""
        settings, folder = self.settings, self.cell(block, mode, ratio)
        counts: list[float] = []

        def progress(phase: str, done: float, total: int) -> None:
            counts.append(done)

        started = time.perf_counter(), time.process_time()
        cache = generate_diffusers(
            folder,
            settings.model,
            block.prompts,
            num_steps=settings.num_steps,
            guidance_scale=settings.guidance_scale,
            seed=sample_seed(settings.seed, block.number),
            batch_size=settings.batch_size,
            reuse=settings.reuse(block, mode, ratio) if ratio > 0.0 else None,
            progress=progress,
        )
        seconds = time.perf_counter() - started[0], time.process_time() - started[1]
        if counts and counts[0] == 0.0:
            pictures = len(block.prompts)
            row = dict(zip(("seconds", "processor_seconds"), (s / pictures for s in seconds), strict=True))
            write_atomically(folder.with_suffix(folder.suffix + ".time.json"), json.dumps(row) + "\n")
        return cache

    def make_midpoints(self, block: Block, mode: str) -> None:
        """Fill the store with what the cells of a mode start from, each run once."""
        steps = sorted(self.settings.steps().values())
        seed = sample_seed(self.settings.seed, block.number)
        record = self.settings.reuse(block, mode, max(self.settings.ratios)).record(
            block.prompts, seed, self.settings.num_steps, None
        )
        runs = [(source["prompt"], one) for source in record["sources"] for one in source["seeds"]]
        obtain_midpoints(self.sampler, self.store, runs, steps, self.settings.batch_size)

    def images(self, cache: TrajectoryCache, indices: Sequence[int]) -> NDArray[np.float32]:
        """Decode x_0."""
        return np.concatenate([self.decoder(cache.latents(index)[:1]) for index in indices])

    def scores(self, block: Block, mode: str, ratio: float, full: TrajectoryCache, cache: TrajectoryCache) -> Table:
        """Rows with :data:`PAIR_COLUMNS`, from the file beside the cache if there is one."""
        folder = self.cell(block, mode, ratio)
        path = folder.with_suffix(folder.suffix + f".{mode}.csv")
        if path.is_file():
            return read_table(path, PAIR_COLUMNS, optional=("static",), command="python -m train.diffusion.reuse")
        indices = [index + len(block.sources) for index in range(len(block.pairs))]
        wanted, found = self.images(full, indices), self.images(cache, indices)
        nearest = self.task.recognize(wanted), self.task.recognize(found)
        columns = {
            "nmse": normalized_mse(*(np.stack([one.latents(index)[0] for index in indices]) for one in (full, cache))),
            "psnr_db": psnr(wanted, found),
            "ssim": ssim(wanted, found),
            "family_kept": self.families[nearest[0]] == self.families[nearest[1]],
            "glyph_kept": nearest[0] == nearest[1],
        }
        rows = [
            {"block": block.number, "mode": mode, "ratio": ratio, "step": cache.num_steps, **dataclasses.asdict(pair),
             **{name: float(values[k]) for name, values in columns.items()}}
            for k, pair in enumerate(block.pairs)
        ]  # fmt: skip
        write_table(path, rows, PAIR_COLUMNS)
        return rows

    def run(self, block: Block) -> Table:
        """Generate and score a block."""
        full = self.generate(block, "full", 0.0)
        rows = []
        for mode in self.settings.modes:
            self.make_midpoints(block, mode)
            for ratio in self.settings.ratios:
                cache = full if ratio == 0.0 else self.generate(block, mode, ratio)
                rows += self.scores(block, mode, ratio, full, cache)
            log.info("block %d, %s: done", block.number, mode)
        return rows

    def times(self, block: Block) -> Table:
        """Rows with :data:`TIME_COLUMNS`."""
        rows, reference = [], None
        for mode, ratio in [("full", 0.0), *itertools.product(self.settings.modes, self.settings.ratios)]:
            folder = self.cell(block, mode, ratio)
            path = folder.with_suffix(folder.suffix + ".time.json")
            if path.is_file() and (ratio > 0.0 or mode == "full"):
                taken = json.loads(path.read_text(encoding="utf-8"))
                reference = taken["processor_seconds"] if mode == "full" else reference
                step = self.settings.steps().get(ratio, self.settings.num_steps)
                speed_up = None if reference is None else reference / taken["processor_seconds"]
                rows.append({"block": block.number, "mode": mode, "ratio": ratio, "step": step,
                             "pictures": len(block.prompts), **taken, "speed_up": speed_up})  # fmt: skip
        return rows

    def _in_batches(self, count: int) -> Iterator[tuple[list[int], int]]:
        """Numbers of the pairs, a batch after the other, the last one padded; and how many of them count."""
        size = self.settings.batch_size
        for first in range(0, count, size):
            numbers = list(range(first, min(first + size, count)))
            yield numbers + numbers[-1:] * (size - len(numbers)), len(numbers)

    def similarity(self, block: Block) -> Table:
        """Rows with :data:`SIMILARITY_COLUMNS`, from the file beside the block's caches if there is one."""
        path = self.cell(block, "", 0.0).with_name("similarity.csv")
        if path.is_file():
            return read_table(path, SIMILARITY_COLUMNS, command="python -m train.diffusion.reuse")
        seeds, found = self._seeds(block), []
        for numbers, count in self._in_batches(len(block.pairs)):
            pairs = [block.pairs[k] for k in numbers]
            sources, targets = [pair.source for pair in pairs], [pair.target for pair in pairs]
            found.append((compare(self.sampler, sources, targets, [seeds[k] for k in numbers]), count))
        columns = {
            name: np.concatenate([getattr(one, name)[:count] for one, count in found])
            for name in ("nmse", "cosine", "divergence", "bound")
        }
        rows = []
        for kind in KINDS:
            own = np.array([pair.kind == kind for pair in block.pairs])
            for step in range(1, self.settings.num_steps + 1):
                row: dict[str, Any] = {"kind": kind, "step": step, "pairs": int(own.sum())}
                for name, values in columns.items():
                    row |= _interval(name, values[own, step])
                rows.append(row)
        write_table(path, rows, SIMILARITY_COLUMNS)
        return rows

    def distances(self, block: Block) -> Table:
        """Rows with :data:`DISTANCE_COLUMNS`, from the file beside the block's caches if there is one."""
        path = self.cell(block, "", 0.0).with_name("distances.csv")
        if path.is_file():
            return read_table(path, DISTANCE_COLUMNS, command="python -m train.diffusion.reuse")
        own, steps, size, rows = (
            self._seeds(block),
            sorted(self.settings.steps().values()),
            self.settings.batch_size,
            [],
        )
        shared = dict(zip(block.sources, self._source_seeds(block), strict=True))
        for mode in ("vanilla", "switch"):
            for numbers, count in self._in_batches(len(block.pairs)):
                pairs = [block.pairs[k] for k in numbers]
                sources, targets = [pair.source for pair in pairs], [pair.target for pair in pairs]
                seeds = [shared[source] for source in sources] if mode == "vanilla" else [own[k] for k in numbers]
                runs = list(zip(sources, seeds, strict=True))
                midpoints = obtain_midpoints(self.sampler, self.store, runs, steps, size)
                for step in reversed(steps):
                    latents = np.stack([midpoints[(*one, step)].tensors["latent"] for one in runs])
                    wanted, given = (self.sampler.estimate(texts, latents, step) for texts in (targets, sources))
                    distance, power = estimate_distances(wanted, given), estimate_distances(wanted, 0.0 * wanted)
                    rows += [
                        {"block": block.number, "mode": mode, "kind": pair.kind, "source": pair.source,
                         "target": pair.target, "step": step, "distance": distance[k], "power": power[k]}
                        for k, pair in enumerate(pairs[:count])
                    ]  # fmt: skip
        write_table(path, rows, DISTANCE_COLUMNS)
        return rows

    def strips(self, block: Block) -> tuple[NDArray[np.uint8], list[str], list[str]]:
        """The images of the first pair of each kind over the reuse ratio: tiles, labels of lines, titles of columns."""
        ratios = sorted(self.settings.steps(), reverse=True)
        full = TrajectoryCache.open(self.cell(block, "full", 0.0))
        tiles, labels = [], []
        for kind in KINDS:
            number, pair = next((k, pair) for k, pair in enumerate(block.pairs) if pair.kind == kind)
            index, source = number + len(block.sources), block.sources.index(pair.source)
            for mode in [mode for mode in self.settings.modes if not mode.startswith("mean")]:
                caches = [TrajectoryCache.open(self.cell(block, mode, ratio)) for ratio in ratios]
                images = [self.images(full, [source]), *(self.images(cache, [index]) for cache in caches),
                          self.images(full, [index])]  # fmt: skip
                tiles.append(np.concatenate(images))
                labels.append(f"{kind}, {mode}")
        columns = ["source", *(f"R = {ratio:g}" for ratio in ratios), "full run"]
        return np.rint(255.0 * np.stack(tiles)).astype(np.uint8), labels, columns

    def _seeds(self, block: Block) -> list[int]:
        """Of the pairs."""
        base = sample_seed(self.settings.seed, block.number)
        return [sample_seed(base, len(block.sources) + k) for k in range(len(block.pairs))]

    def _source_seeds(self, block: Block) -> list[int]:
        base = sample_seed(self.settings.seed, block.number)
        return [sample_seed(base, k) for k in range(len(block.sources))]


def _interval(name: str, values: NDArray[np.float64]) -> dict[str, float]:
    """Mean of a column and the ends of its bootstrap interval."""
    low, high = bootstrap_interval(values)
    return {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}


def summarize(rows: Table) -> Table:
    """Rows with :data:`SUMMARY_COLUMNS` of rows with :data:`PAIR_COLUMNS`."""
    groups: dict[tuple[str, str, float, int], Table] = {}
    for row in rows:
        groups.setdefault((row["kind"], row["mode"], row["ratio"], row["step"]), []).append(row)
    return [
        {
            **dict(zip(("kind", "mode", "ratio", "step"), group, strict=True)),
            "pairs": len(own),
            **{
                key: value
                for name in SCORES
                for key, value in _interval(name, np.array([row[name] for row in own])).items()
            },
        }
        for group, own in groups.items()
    ]


def tabulate_adaptive(rows: Table, distances: Table, schedule: NoiseSchedule) -> Table:
    """Rows with :data:`ADAPTIVE_COLUMNS`.

    Args:
        rows: with :data:`PAIR_COLUMNS`.
        distances: with :data:`DISTANCE_COLUMNS`, of the same pairs.
        schedule: of the generations.

    Returns:
        None for a mode that one of the two halves lacks, or has too few pairs of.
    """
    found = []
    for mode in dict.fromkeys(row["mode"] for row in distances):
        errors = {(r["block"], r["source"], r["target"], r["step"]): r["nmse"] for r in rows if r["mode"] == mode}
        pairs: dict[tuple[int, str, str], dict[int, Any]] = {}
        for row in distances:
            if row["mode"] == mode:
                pairs.setdefault((row["block"], row["source"], row["target"]), {})[row["step"]] = row
        steps = sorted({row["step"] for row in distances}, reverse=True)
        halves = []
        for half in (0, 1):
            own = {
                pair: values for pair, values in pairs.items() if pair[0] % 2 == half and (*pair, steps[0]) in errors
            }
            if own:
                asked = [[[values[step][name] for step in steps] for values in own.values()]
                         for name in ("distance", "power")]  # fmt: skip
                wrong = np.array([[errors[(*pair, step)] for step in steps] for pair in own])
                halves.append((candidate_divergence(schedule, steps, *asked), wrong))
        if len(halves) < 2 or len(halves[0][0]) < COVERAGE / (1.0 - COVERAGE):
            continue
        for tolerance in TOLERANCES:
            predictor = ErrorPredictor.calibrate(*halves[0], coverage=COVERAGE, tolerance=tolerance)
            found.append(
                {"mode": mode, "tolerance": tolerance, **dataclasses.asdict(predictor),
                 "tuning_pairs": len(halves[0][0]),
                 **_adaptive_row(predictor(halves[1][0]), halves[1][1], np.array(steps), schedule.num_steps, tolerance)}
            )  # fmt: skip
    return found


def _adaptive_row(
    predicted: NDArray[np.float64],
    errors: NDArray[np.float64],
    steps: NDArray[np.int64],
    num_steps: int,
    tolerance: float,
) -> dict[str, Any]:
    """What R* does on pairs, (N, K) of whose predicted and true errors are known, and the best single R."""
    everything = np.concatenate([[num_steps], steps])
    wrong = np.concatenate([np.zeros((len(errors), 1)), errors], axis=1)  # of R = 0, too

    def last(allowed: NDArray[np.bool_]) -> NDArray[np.int64]:
        """How many candidates are taken, one after the other."""
        counts: NDArray[np.int64] = np.cumprod(allowed, axis=1).sum(axis=1)
        return counts

    taken = last(predicted <= tolerance)
    covered = (np.take_along_axis(wrong, taken[:, None], axis=1)[:, 0] <= tolerance).astype(np.float64)
    shares = (wrong <= tolerance).mean(axis=0)
    fixed = max(k for k, share in enumerate(shares) if share >= covered.mean())
    oracle = np.where(wrong <= tolerance, np.arange(wrong.shape[1]), 0).max(axis=1)
    return {
        "pairs": len(errors),
        **_interval("coverage", covered),
        "ratio": float(1.0 - everything[taken].mean() / num_steps),
        "evaluations": float(everything[taken].mean()),
        "asked": float(np.minimum(taken + 1, len(steps)).mean()),
        "fixed_ratio": float(1.0 - everything[fixed] / num_steps),
        "fixed_coverage": float(shares[fixed]),
        "fixed_evaluations": float(everything[fixed]),
        "oracle_ratio": float(1.0 - everything[oracle].mean() / num_steps),
    }


@command
def main(
    out: Annotated[Path, typer.Option(help="Folder for the tables.")] = Path("results/reuse"),
    figures: Annotated[Path, typer.Option(help="Folder for the figures.")] = Path("results/reuse"),
    work: Annotated[Path, typer.Option(help="Folder for caches and midpoints.")] = Path("runs/reuse"),
    model: Annotated[str, typer.Option(help="Hub id or folder of a model, or emoji.")] = "emoji",
    prompts: Annotated[Path, typer.Option(help="File of the prompts that pairs are made of.")] = (
        MODEL / "prompts_train.txt"
    ),
    gallery: Annotated[Path, typer.Option(help="Gallery of the model's glyphs.")] = GALLERY,
    ratios: Annotated[str, typer.Option(help="Reuse ratios R with commas between.")] = ",".join(map(str, RATIOS)),
    modes: Annotated[str, typer.Option(help="Modes of reuse with commas between.")] = ",".join(MODES),
    blocks: Annotated[int, typer.Option(help="Blocks of families; each has families of its own.", min=1)] = 2,
    families: Annotated[int, typer.Option(help="Glyph families of a block, each with six pairs.", min=2)] = 6,
    num_steps: Annotated[int, typer.Option(help="T, sampling steps.", min=2)] = 50,
    guidance_scale: Annotated[float, typer.Option(help="Scale of the classifier-free guidance.")] = 2.0,
    batch_size: Annotated[int, typer.Option(help="Samples that the network sees at once.", min=1)] = 14,
    seed: Annotated[int, typer.Option(help="Of the pairs and the trajectories.", min=0)] = 0,
) -> None:
    """Generate pairs of prompts at every reuse ratio and mode, and tabulate what it costs and saves."""
    show_log()

    def listed(name: str, text: str, kind: Callable[[str], Any], allowed: Callable[[Any], bool], what: str) -> Any:
        return parse_list(
            name,
            text,
            kind,
            what=what,
            advice="Leave it out for the default.",
            valid=lambda items: len(set(items)) == len(items) and all(map(allowed, items)),
        )

    own = listed("ratios", ratios, float, lambda ratio: 0.0 <= ratio < 1.0, "numbers in [0, 1), none twice")
    chosen = listed("modes", modes, str, REUSE_MODES.__contains__, f"some of {', '.join(REUSE_MODES)}, none twice")
    try:
        texts = prompts.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise ConfigurationError(
            f"`--prompts` must be a file of prompts, one a line, got {str(prompts)!r}. Give the model's."
        ) from None
    settings = Settings(
        model=model,
        work=work,
        ratios=tuple(sorted({0.0, *own})),
        modes=chosen,
        num_steps=num_steps,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
        seed=seed,
        gallery=gallery,
    )
    settings.steps()
    taken = choose_blocks(texts, blocks, families, seed)
    study = Study(settings)
    rows: Table = []
    times: Table = []
    distances: Table = []
    for block in taken:
        rows += study.run(block)
        times += study.times(block)
        distances += study.distances(block)
    write_table(out / "reuse-pairs.csv", rows, PAIR_COLUMNS)
    write_table(out / "reuse.csv", summarize(rows), SUMMARY_COLUMNS)
    write_table(out / "reuse-times.csv", times, TIME_COLUMNS)
    write_table(out / "reuse-distances.csv", distances, DISTANCE_COLUMNS)
    similarity = study.similarity(taken[0])
    write_table(out / "reuse-similarity.csv", similarity, SIMILARITY_COLUMNS)
    adaptive = tabulate_adaptive(rows, distances, study.sampler.schedule)
    write_table(out / "reuse-adaptive.csv", adaptive, ADAPTIVE_COLUMNS)
    written = draw_quality(summarize(rows), figures) + draw_similarity(similarity, figures)
    written += draw_strips(*study.strips(taken[0]), figures)
    log.info("wrote the tables to %s, and %s", out, ", ".join(str(path) for path in written))


if __name__ == "__main__":
    run(main)
