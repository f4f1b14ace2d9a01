"""How fast it is, each figure as a ratio to a reference run beside it: ``python -m agents.benchmark``.

Machines are noisy: what is compared runs alternately, several times, and the table has medians. The references in
plain NumPy are the twins that the tests compare the fast paths with (``tests/twin.py`` of the clone).
"""

from __future__ import annotations

import importlib.util
import json
import operator
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

import gymnasium as gym
import numpy as np
import typer

import agents
from agents.evaluate import DEFAULT_AGENTS, DEFAULT_SNRS_DB, evaluate, usable_cores
from refine_env import ENV_ID, CacheError, ConfigurationError, SystemConfig, TrajectoryCache, __version__
from refine_env._store import DIRECTORY_VARIABLE, store_directory
from refine_env._validation import check_choice, check_integer
from refine_env.coding import LloydMax, base_distortion, kernels
from refine_env.commands import command, parse_list, print_table, run
from refine_env.dynamics.settings import EnvSettings
from refine_env.evaluation import episode_seeds, write_atomically
from refine_env.model.distortion import total_distortion
from refine_env.trajectories import generate_gaussian

__all__ = ["ROWS", "Measurement", "Options", "insert_table", "main", "markdown_table", "measure"]

_TWIN = Path(__file__).resolve().parents[1] / "tests" / "twin.py"
_SHAPE = (4, 64, 64)
_DIMENSIONS = prod(_SHAPE)
_TABLE_WIDTH = 120
_BUSY = 0.5  # load average from which on the machine is said to have been busy
_COLUMNS: dict[str, Literal["left", "right"]] = {
    "row": "left",
    "case": "left",
    "here": "right",
    "reference": "right",
    "unit": "left",
    "ratio": "right",
    "to": "left",
    "wanted": "left",
}
_BOUND = re.compile(r"([<≤≥]) ([\d.]+) ?(\S+)")
_SIGNS = {"<": operator.lt, "≤": operator.le, "≥": operator.ge}
_MULTIPLES = {"M": 1e6, "GB": 1e3}
_BEGIN, _END = "<!-- measured -->", "<!-- end of measured -->"
_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Measurement:
    """One line of the table.

    Attributes:
        row: one of :data:`ROWS`.
        case: which.
        unit: of the two values.
        value: median.
        reference: median of the reference's.
        ratio: how many times as good as the reference, median over the repetitions.
        against: what the reference is.
        target: what is wanted, if anything.
        met: whether it is.
        note: what must be known of the figure.
    """

    row: str
    case: str
    unit: str
    value: float
    reference: float
    ratio: float
    against: str
    target: str = ""
    met: bool | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured, and how often.

    Attributes:
        repetitions: of everything that is compared.
        seconds: that a step loop runs for at least.
        num_envs: sizes of the vector environment.
        episodes: of every policy and SNR in ``fig3``, and trajectories of its cache.
        workers: threads of ``fig3``.
        cache: folder of that cache; generated if it is not there. None: beside what else is kept for the user, see
            :func:`refine_env._store.store_directory`.
        twin_episodes: of every policy and SNR that the plain twin plays, in every repetition.
    """

    repetitions: int = 5
    seconds: float = 0.25
    num_envs: tuple[int, ...] = (1, 4, 16, 64, 256, 1024)
    episodes: int = 500
    workers: int = 1
    cache: Path | None = None
    twin_episodes: int = 1

    def __post_init__(self) -> None:
        """Refuse numbers that are not positive.

        Raises:
            ConfigurationError: naming the option of the command.
        """
        for name in ("repetitions", "episodes", "workers", "twin_episodes"):
            option = "--" + name.replace("_", "-")
            check_integer(option, getattr(self, name), 1, advice="Give a positive number, for example 5.")


def measure(rows: tuple[str, ...], options: Options) -> Iterator[Measurement]:
    """Measure, row by row.

    Raises:
        ConfigurationError: if a row is not one of :data:`ROWS`, or the plain twins are not there.
        CacheError: if the cache of ``fig3`` cannot be made, or is another.
    """
    for row in rows:
        check_choice("rows", row, ROWS)
    for row in rows:
        yield from _MEASURES[row](options)


def load_twin() -> Any:
    """The plain twins of the clone.

    Raises:
        ConfigurationError: if they are not there.
    """
    if not _TWIN.is_file():
        raise ConfigurationError(
            f"`rows` must be without reconstruct, fig3 and build where there is no {_TWIN}, their reference. Run from "
            "a clone, or choose others with --rows."
        )
    spec = importlib.util.spec_from_file_location("refine_env_twin", _TWIN)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


Timer = Callable[[], float]


def alternate(repetitions: int, *timers: Timer) -> list[list[float]]:
    """Values of every timer, taken in turns; each runs once before."""
    for timer in timers:
        timer()
    turns = [[timer() for timer in timers] for _ in range(repetitions)]
    return [list(values) for values in zip(*turns, strict=True)]


def timed(run: Callable[[], Any], loops: int = 1) -> float:
    """Seconds that ``run`` takes, mean of some loops."""
    start = time.perf_counter()
    for _ in range(loops):
        run()
    return (time.perf_counter() - start) / loops


def compare(
    row: str,
    case: str,
    unit: str,
    values: Sequence[float],
    references: Sequence[float],
    against: str,
    target: str = "",
    note: str = "",
) -> Measurement:
    """The medians of paired values, and of their ratios.

    Args:
        row, case, against, target, note: of the measurement; for the target see :func:`is_met`.
        unit: of the values; what is counted ``/s`` is a speed, and anything else the less the better.
        values: one a repetition.
        references: measured beside each.
    """
    is_speed = unit.endswith("/s")
    pairs = zip(values, references, strict=True)
    ratio = statistics.median(a / b if is_speed else b / a for a, b in pairs)
    value, reference = statistics.median(values), statistics.median(references)
    met = is_met(target, value, ratio) if target else None
    return Measurement(row, case, unit, value, reference, ratio, against, target, met, note)


def is_met(target: str, value: float, ratio: float) -> bool:
    """Whether a target is met.

    Args:
        target: bounds with a sign, a number and a unit: ``×`` bounds the ratio, any other unit the value. A comma
            joins bounds that must all hold, and "or" those of which one is enough, as in ``≤ 4 ns, ≥ 15×``.
        value: what was measured, in the unit of the bounds; a million (``M``) and a GB are bounds of ones and MB.
        ratio: how many times as good as the reference it is.
    """

    def holds(bound: str) -> bool:
        sign, number, unit = _BOUND.fullmatch(bound).groups()  # type: ignore[union-attr]
        return bool(_SIGNS[sign](ratio if unit == "×" else value, float(number) * _MULTIPLES.get(unit, 1.0)))

    return any(all(map(holds, re.split(r", ", alternative))) for alternative in target.split(" or "))


def measure_reconstruct(options: Options) -> Iterator[Measurement]:
    """One refinement of 16,384 values, and what it makes of the memory's bandwidth."""
    twin = load_twin()
    rng = np.random.default_rng(0)
    rows = 32  # what is worked on leaves the first-level cache, as in an evaluation
    held = rng.standard_normal((rows, _DIMENSIONS), dtype=np.float32)
    latents = (0.9 * held + np.sqrt(0.19) * rng.standard_normal((rows, _DIMENSIONS))).astype(np.float16)
    gain, scale = 0.9, float(np.sqrt(0.19))
    patterns, devices = latents.view(np.uint16), held.copy()

    def ours(quantizer: LloydMax, loops: int = 8) -> float:
        taken: float = 0.0
        for _ in range(loops):
            devices[:] = held
            start = time.perf_counter()
            for latent, device in zip(patterns, devices, strict=True):
                kernels.refine(latent, device, gain, scale, quantizer.table)
            taken += time.perf_counter() - start
        return float(taken / (loops * latents.size) * 1e9)

    def plain(levels: Any, thresholds: Any, count: int = 4) -> float:
        start = time.perf_counter()
        for latent, device in zip(latents[:count], held[:count], strict=True):
            twin.refine(latent, device, gain, scale, levels, thresholds)
        return (time.perf_counter() - start) / (count * _DIMENSIONS) * 1e9

    speed = []
    for bits in (3, 4, 8, 10):
        quantizer = LloydMax(bits)
        tables = quantizer.levels.astype(np.float32), quantizer.thresholds.astype(np.float32)
        values, references = alternate(options.repetitions, partial(ours, quantizer), partial(plain, *tables))
        target = "≤ 4 ns, ≥ 15×" if bits == 8 else "≤ 4 ns"
        if bits == 8:
            speed = values
        yield compare("reconstruct", f"b = {bits}", "ns/value", values, references, "searchsorted", target)
    source = np.zeros(1 << 24, dtype=np.float32)  # 64 MiB
    copy = np.empty_like(source)
    (copied,) = alternate(options.repetitions, lambda: timed(partial(np.copyto, copy, source)))
    bandwidths = [2.0 * source.nbytes / seconds / 1e9 for seconds in copied]
    bytes_per_value = 2 + 4 + 4  # x_t is read; what the device holds is read and written
    traffic = [bytes_per_value / nanoseconds for nanoseconds in speed]
    yield compare("reconstruct", "b = 8, traffic", "GB/s", traffic, bandwidths, "copy of 64 MiB")


def measure_step(options: Options) -> Iterator[Measurement]:
    """The single environment."""
    from gymnasium.utils.performance import benchmark_step

    ours, reference = gym.make(ENV_ID), gym.make("CartPole-v1")

    def steps(env: Any) -> float:
        return float(benchmark_step(env, target_duration=2 * options.seconds, seed=0))  # type: ignore[arg-type]

    values, references = alternate(options.repetitions, partial(steps, ours), partial(steps, reference))
    yield compare("step", "single", "steps/s", values, references, "CartPole-v1", "≥ 1×")


def measure_vector(options: Options) -> Iterator[Measurement]:
    """The vector environment, resets included."""
    for count in options.num_envs:
        ours = gym.make_vec(ENV_ID, num_envs=count)
        singles = gym.make_vec(ENV_ID, num_envs=count, vectorization_mode="sync")
        cartpole = gym.make_vec("CartPole-v1", num_envs=count, vectorization_mode="vector_entry_point")
        period = ours.unwrapped.config.deadline + 1  # type: ignore[attr-defined]  # with its reset

        def rate(env: Any, period: int = period) -> float:
            env.action_space.seed(0)
            actions = [env.action_space.sample() for _ in range(16)]
            env.reset(seed=0)
            start, steps = time.perf_counter(), 0
            while steps == 0 or time.perf_counter() - start < options.seconds:  # whole episodes of ours
                for k in range(period):
                    env.step(actions[k % 16])
                steps += period
            return float(steps * env.num_envs / (time.perf_counter() - start))

        values, own, native = alternate(
            options.repetitions, partial(rate, ours), partial(rate, singles), partial(rate, cartpole)
        )
        targets = ("≥ 20×", "≥ 0.4× or ≥ 1 M") if count == 256 else ("", "")
        yield compare("vector", f"{count} envs", "slots/s", values, own, "SyncVectorEnv", targets[0])
        yield compare("vector", f"{count} envs", "slots/s", values, native, "CartPole, native", targets[1])
        for env in (ours, singles, cartpole):
            env.close()


def _kept_folder() -> Path:
    kept = store_directory()
    if kept is None:
        raise ConfigurationError(
            f"`--fig3-cache` must be given where nothing is kept for the user, got neither it nor "
            f"{DIRECTORY_VARIABLE}. Choose a folder for 1.7 GB."
        )
    return kept / "benchmark" / "gaussian"


def open_gaussian(options: Options) -> TrajectoryCache:
    """The cache of ``fig3``, generated where it is not there, and verified once, so that its pages are in memory.

    Raises:
        CacheError: if there is another at that place, or too little space, or it is damaged.
        ConfigurationError: if no place is given, and nothing is kept for the user.
    """
    folder = options.cache or _kept_folder()
    if not folder.exists():
        needed = options.episodes * 101 * _DIMENSIONS * 2
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder.parent).free
        if free < 1.1 * needed:
            raise CacheError(
                f"`--fig3-cache` must be where {needed / 1e9:.1f} GB are free, got {free / 1e9:.1f} GB at {folder}. "
                "Choose another folder."
            )
        typer.echo(f"Generating {options.episodes} trajectories in {folder}, once.", err=True)
        generate_gaussian(folder, options.episodes, _SHAPE)
    cache = TrajectoryCache.open(folder)
    if len(cache) < options.episodes or cache.latent_shape != _SHAPE:
        raise CacheError(
            f"`--fig3-cache` must hold {options.episodes} trajectories of {_SHAPE}, got {len(cache)} of "
            f"{cache.latent_shape} at {folder}. Choose another folder, or remove that one."
        )
    cache.verify()
    return cache


def run_and_watch(command: list[str]) -> tuple[float, float]:
    """Run a command in the clone: seconds, and the most anonymous memory that it held [MB], which Linux tells, or 0."""
    start, most = time.perf_counter(), 0
    with subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            lines = status.read_text().splitlines() if status.is_file() else []
            most = max([most, *(int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))])
            time.sleep(0.02)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return time.perf_counter() - start, most * 1024 / 1e6


def measure_fig3(options: Options) -> Iterator[Measurement]:
    """The whole of Fig. 3 at the paper's scale; the twin plays a few episodes of every policy and SNR."""
    twin = load_twin()
    cache = open_gaussian(options)
    env_kwargs: dict[str, Any] = {"cache": str(cache.path), "split": "all"}
    total = options.episodes * len(DEFAULT_AGENTS) * len(DEFAULT_SNRS_DB)
    twins = []
    for snr_db in DEFAULT_SNRS_DB:
        config = EnvSettings.from_kwargs({**env_kwargs, "snr_db": snr_db}).config_for(cache)
        twins += [twin.Twin(cache, config, "all", twin.plain_rule(name, config)) for name in DEFAULT_AGENTS]
    seeds = iter(episode_seeds(0, options.twin_episodes * (options.repetitions + 1)))

    def ours() -> float:
        run = partial(evaluate, DEFAULT_AGENTS, DEFAULT_SNRS_DB, episodes=options.episodes, seed=0)
        return timed(lambda: run(env_kwargs=env_kwargs, workers=options.workers))

    def plain() -> float:
        own = [next(seeds) for _ in range(options.twin_episodes)]
        return timed(lambda: [one.play(seed) for seed in own for one in twins]) / (len(own) * len(twins)) * total

    values, references = alternate(options.repetitions, ours, plain)
    played = options.twin_episodes * options.repetitions * len(twins)
    note = (
        f"fig3: --workers {options.workers}; the twin played {played:,} episodes, of every policy and SNR alike, and "
        "its time is scaled."
    )
    yield compare("fig3", f"{total:,} episodes", "s", values, references, "NumPy twin", "≤ 25 s, ≥ 30×", note)
    speeds, plain_speeds = ([total / seconds for seconds in taken] for taken in (values, references))
    yield compare("fig3", "speed", "episodes/s", speeds, plain_speeds, "NumPy twin")
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "agents.evaluate", "--agents", ",".join(DEFAULT_AGENTS), "--no-figures"]
        command += ["--cache", str(cache.path.absolute()), "--split", "all", "--episodes", str(options.episodes)]
        command += ["--workers", str(options.workers), "--out", folder]
        seconds, memory = run_and_watch(command)
    yield compare("fig3", "whole command", "s", [seconds], [statistics.median(values)], "evaluation alone")
    if memory > 0.0:
        size = sum(shard.bytes for shard in cache.manifest.shards) / 1e6
        note = "anonymous memory: the most that the whole command held, beyond the page cache."
        yield compare("fig3", "anonymous memory", "MB", [memory], [size], "cache on disk", "< 1 GB", note)


def measure_build(options: Options) -> Iterator[Measurement]:
    """The look-ahead's table, and its decisions for a batch."""
    twin = load_twin()
    offsets = iter(np.arange(1, 100_000) * 1e-4)  # no SNR twice: nothing is remembered

    def ours() -> float:
        config = SystemConfig(snr_db=6.0 + float(next(offsets)))
        return timed(lambda: agents.make("lookahead", config)) * 1e3

    config = SystemConfig(snr_db=6.0)
    agent: Any = agents.make("lookahead", config)
    distortion = total_distortion(config.schedule, np.array([base_distortion(bits) for bits in config.bit_depths]))
    plain = partial(twin.lookahead_table, distortion, agent.latency, config.deadline)
    values, references = alternate(options.repetitions, ours, lambda: timed(plain) * 1e3)
    yield compare("build", "look-ahead table", "ms", values, references, "NumPy twin", "≤ 50 ms")
    count = 256
    envs = gym.make_vec(ENV_ID, num_envs=count)
    agent = agents.make("lookahead", envs.unwrapped.config)  # type: ignore[attr-defined]
    observations, infos = envs.reset(seed=0)
    for _ in range(30):
        observations, _, _, _, infos = envs.step(agent.select_action(observations, infos))
    single = {key: value[0] for key, value in observations.items()}
    mask = {"action_mask": infos["action_mask"][0]}
    values, references = alternate(
        options.repetitions,
        lambda: timed(lambda: agent.select_action(observations, infos), 500) / count * 1e6,
        lambda: timed(lambda: agent.select_action(single, mask), 500) * 1e6,
    )
    yield compare("build", f"decision, {count} envs", "µs/env", values, references, "one at a time", "≤ 1 µs")


def measure_start(options: Options) -> Iterator[Measurement]:
    """Imports and first steps, in fresh processes on a warm cache of compiled code."""

    def process(*arguments: str) -> float:
        command = [sys.executable, *arguments]
        return timed(lambda: subprocess.run(command, cwd=_ROOT, check=True, capture_output=True))

    libraries = "import numpy, scipy.special, scipy.integrate, scipy.linalg, gymnasium, numba, safetensors"
    values, references = alternate(
        options.repetitions, partial(process, "-c", "import refine_env"), partial(process, "-c", libraries)
    )
    yield compare("start", "import refine_env", "s", values, references, "its libraries")
    values, references = alternate(
        options.repetitions,
        lambda: timed(lambda: gym.make(ENV_ID), 10) * 1e3,
        lambda: timed(lambda: gym.make("CartPole-v1"), 10) * 1e3,
    )
    yield compare("start", "gym.make", "ms", values, references, "CartPole-v1")
    with tempfile.TemporaryDirectory() as folder:
        one = ("-m", "agents.evaluate", "--agents", "lookahead", "--snr-db", "6", "--episodes", "1", "--no-figures")
        values, references = alternate(
            options.repetitions,
            partial(process, *one, "--out", folder),
            partial(process, "-c", f"{libraries}, typer, rich.table, tqdm"),
        )
    note = "agents.evaluate: from the command to its end, with one episode."
    yield compare("start", "agents.evaluate", "s", values, references, "its libraries", "< 2 s", note)


_MEASURES: dict[str, Callable[[Options], Iterator[Measurement]]] = {
    "reconstruct": measure_reconstruct,
    "step": measure_step,
    "vector": measure_vector,
    "fig3": measure_fig3,
    "build": measure_build,
    "start": measure_start,
}
ROWS = tuple(_MEASURES)
"""What can be measured, in the order of the table."""


def describe_machine() -> dict[str, Any]:
    """What the figures were taken on."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cores": usable_cores(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "load_average": load,
        "versions": {
            "refine-env": __version__,
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("numpy", "scipy", "gymnasium", "numba")},
        },
    }


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000.0 else f"{value:.3g}"


def _cells(one: Measurement, marks: Mapping[bool | None, str]) -> list[str]:
    """A measurement as the cells of a line of the table, with what marks a target that was met, or was not."""
    numbers = _shown(one.value), _shown(one.reference), one.unit, f"{_shown(one.ratio)}×"
    return [one.row, one.case, *numbers, one.against, one.target + marks[one.met]]


def print_measurements(measurements: list[Measurement]) -> None:
    """Print the table on the terminal; a row or a case that goes on is named once."""
    marks = {True: ", [green]met[/green]", False: ", [red]missed[/red]", None: ""}
    lines: list[list[str] | None] = []
    before = None
    for one in measurements:
        cells = _cells(one, marks)
        if before is not None and one.row == before.row:
            cells[:2] = ["", "" if one.case == before.case else one.case]
        elif before is not None:
            lines.append(None)
        lines.append(cells)
        before = one
    print_table(
        _COLUMNS,
        lines,
        title="medians of alternating runs",
        notes=[one.note for one in measurements if one.note],
        padding=(0, 1, 0, 0),
        least_width=_TABLE_WIDTH,
    )


def markdown_table(content: dict[str, Any]) -> str:
    """What ``--out`` wrote, as Markdown."""
    machine = content["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    measurements = [Measurement(**fields) for fields in content["measurements"]]
    marks = {True: ": met", False: ": **missed**", None: ""}
    lines = [list(_COLUMNS), *(_cells(one, marks) for one in measurements)]
    table = ["| " + " | ".join(cells) + " |" for cells in lines]
    table.insert(1, "|" + "|".join("---:" if side == "right" else "---" for side in _COLUMNS.values()) + "|")
    load = machine["load_average"]
    busy = "" if load is None or load <= _BUSY else f", busy with something else: load average {load:.1f}"
    place = f"On {machine['cores']} cores ({machine['architecture']}, {machine['system']}{busy}); {versions}."
    return "\n".join([*table, "", *(one.note for one in measurements if one.note), place])


def insert_table(page: str, table: str) -> str:
    """The page with another table between its marks.

    Raises:
        ConfigurationError: if it has no such marks.
    """
    before, begin, rest = page.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ConfigurationError(
            f"`--page` must hold the lines {_BEGIN} and {_END}, got a page without. Put them where the table is to be."
        )
    return f"{before}{begin}\n\n{table}\n\n{end}{after}"


@command
def main(
    rows: Annotated[str, typer.Option(help="Comma-separated rows.")] = ",".join(ROWS),
    repetitions: Annotated[int, typer.Option(help="Of everything that is compared, in turns.", max=10_000)] = 5,
    seconds: Annotated[float, typer.Option(help="That a loop of steps runs for at least.", min=0, max=3600)] = 0.25,
    num_envs: Annotated[str, typer.Option(help="Sizes of the vector environment.")] = "1,4,16,64,256,1024",
    episodes: Annotated[int, typer.Option(help="Of every policy and SNR in fig3, and its cache's trajectories.")] = 500,
    workers: Annotated[int | None, typer.Option(help="Threads of fig3.", show_default="one a core")] = None,
    fig3_cache: Annotated[
        Path | None, typer.Option(help="Folder of fig3's cache, 1.7 GB, made once.", show_default="the user's cache")
    ] = None,
    twin_episodes: Annotated[
        int, typer.Option(help="The twin's, of every policy, SNR and repetition.", max=10_000)
    ] = 1,
    out: Annotated[Path | None, typer.Option(help="Write the figures as JSON, too.")] = None,
    page: Annotated[Path | None, typer.Option(help="Markdown page whose table is to be replaced, too.")] = None,
) -> None:
    """Measure the speed and print it as ratios to references that ran beside it.

    Exit codes: 0 done, 2 an argument is wrong, 3 the cache or the output cannot be written.
    """
    options = Options(
        repetitions=repetitions,
        seconds=seconds,
        num_envs=parse_list("--num-envs", num_envs, int, advice="For example: --num-envs 1,256"),
        episodes=episodes,
        workers=usable_cores() if workers is None else workers,
        cache=fig3_cache,
        twin_episodes=twin_episodes,
    )
    text = "" if page is None else insert_table(page.read_text(encoding="utf-8"), "")
    machine = describe_machine()
    measurements = []
    for one in measure(parse_list("--rows", rows, str, advice="For example: --rows step,vector"), options):
        typer.echo(f"{one.row}: {one.case}: {_shown(one.ratio)}× {one.against}", err=True)
        measurements.append(one)
    print_measurements(measurements)
    if machine["load_average"] is not None and machine["load_average"] > _BUSY:
        typer.echo(f"The machine was busy when this began: load average {machine['load_average']:.1f}.")
    content = {"machine": machine, "measurements": [asdict(one) for one in measurements]}
    if out is not None:
        write_atomically(out, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        typer.echo(f"wrote {out}")
    if page is not None:
        write_atomically(page, insert_table(text, markdown_table(content)))
        typer.echo(f"wrote {page}")


if __name__ == "__main__":
    run(main)
