"""The command line `refine-env`: generate trajectory caches, describe them, check them; and the store of midpoints."""

from __future__ import annotations

import contextlib
import functools
import inspect
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from refine_env.commands import command, parse_list, run, set_parameters
from refine_env.errors import ConfigurationError, printable
from refine_env.trajectories import (
    Reuse,
    TrajectoryCache,
    find_cache,
    find_damage,
    generate_diffusers,
    generate_forward_process,
    generate_gaussian,
    read_manifest,
    read_prompts,
)
from refine_env.trajectories.conditions import read_conditions
from refine_env.trajectories.denoising import measure_decoder, open_denoiser, record_decoder
from refine_env.trajectories.manifest import MANIFEST_FILE, REUSE_MODES
from refine_env.trajectories.midpoints import DEFAULT_MAX_BYTES, MidpointStore
from refine_env.trajectories.pipeline import DTYPES, SCHEDULERS
from refine_env.trajectories.workers import ENGINES

__all__ = ["app", "main"]

EXIT_DAMAGED = 1
EXIT_INTERRUPTED = 130

_EXIT_CODES = """
Exit codes: 0 done; 1 `verify` found damage; 2 an argument or an input file is not valid; 3 a cache
is missing, of another format, or cannot be read or written; 4 an optional dependency or a model's weights are
missing; 130 interrupted.
"""

app = typer.Typer(
    name="refine-env",
    help="Trajectory caches of refine-env: generate, describe and check them.",
    epilog=_EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
generate = typer.Typer(
    help="""Generate a trajectory cache.

    A generation that was interrupted goes on where it stopped when the same command is run again, and ends
    in the same bytes. A finished cache is never replaced without --overwrite, and then only when the new one
    is complete.
    """,
    epilog=_EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.add_typer(generate, name="generate")
midpoints = typer.Typer(
    help="""The store of midpoints, from which a generation with --reuse-ratio starts.

    It is `midpoints` in the folder of the user's cached files, or the one that --midpoints names.
    """,
    epilog=_EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode="markdown",
)
app.add_typer(midpoints, name="midpoints")

Out = Annotated[
    Path, typer.Option("--out", "-o", metavar="FOLDER", help="Folder of the new cache.", show_default=False)
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar and no summary.")]
Cache = Annotated[
    str,
    typer.Argument(
        metavar="CACHE",
        help="A cache's folder, or its name in `cached_trajectories/` (`default` is bundled).",
        show_default=False,
    ),
]
Midpoints = Annotated[
    Path | None,
    typer.Option("--midpoints", metavar="FOLDER", help="Store of midpoints.", show_default="in the user's cache"),
]


_Item = TypeVar("_Item")
_Generator = Callable[..., TrajectoryCache]


def _writing_options(
    seed: Annotated[int, typer.Option(help="Base seed; every sample has its own seed, derived from it.")] = 0,
    num_train: Annotated[
        int | None,
        typer.Option(
            help="Size of the train split: the first trajectories. The rest is the test split.", show_default="half"
        ),
    ] = None,
    shard_size: Annotated[int, typer.Option(help="Trajectories in one file.")] = 16,
    note: Annotated[
        str | None,
        typer.Option(help="Free text for the manifest, such as the license of the samples.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a finished cache.")] = False,
) -> None:
    """The options that all generators share, as they hand them on."""


def _generator(name: str) -> Callable[[Callable[..., _Generator]], None]:
    """Register a command that generates a cache, with the options that all of them share.

    The function takes the options of its own, and gives what generates the cache when it is called with the shared
    ones. Where both have an option, the function's own is the command's. Typer reads the options from the signature,
    so the command gets one of all of them.
    """

    def register(function: Callable[..., _Generator]) -> None:
        own = inspect.signature(function, eval_str=True).parameters
        shared = inspect.signature(_writing_options, eval_str=True).parameters
        handed_on = [parameter for parameter in shared if parameter not in own]

        @functools.wraps(function)
        def run_generator(*, quiet: bool, **options: Any) -> None:
            writing = {option: options.pop(option) for option in handed_on}
            with _progress(quiet) as progress:
                cache = function(**options)(**writing, progress=progress)
            if not quiet:
                _say(f"{len(cache)} trajectories in {cache.path} (manifest SHA-256 {cache.sha256}).")

        last = inspect.Parameter("quiet", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Quiet)
        set_parameters(run_generator, [*own.values(), *(shared[option] for option in handed_on), last])
        generate.command(name, epilog=_EXIT_CODES)(command(run_generator))

    return register


@_generator("gaussian")
def _gaussian(
    out: Out,
    num_trajectories: Annotated[int, typer.Option("--num-trajectories", "-n", help="How many.")] = 128,
    latent_shape: Annotated[str, typer.Option(help="Shape of one latent, C,H,W.")] = "4,64,64",
    num_steps: Annotated[int, typer.Option(help="T, steps of Stable Diffusion v1-5's schedule.")] = 50,
) -> _Generator:
    """Ideal trajectories from i.i.d. N(0, 1) clean latents.

    The forward process, read backwards. Needs no torch.

    Example: refine-env generate gaussian -n 500 --out cached_trajectories/gaussian
    """
    shape = _parse_list("--latent-shape", latent_shape, int, "integers C,H,W", "4,64,64")
    return partial(generate_gaussian, out, num_trajectories, shape, num_steps=num_steps)


@_generator("forward-process")
def _forward_process(
    clean_latents: Annotated[
        str,
        typer.Option(
            "--clean-latents",
            "-c",
            metavar="FILE|CACHE",
            help="Clean latents (N, C, H, W): a .npy or .safetensors file, or a cache whose x_0 are taken.",
            show_default=False,
        ),
    ],
    out: Out,
    num_steps: Annotated[
        int | None,
        typer.Option(help="T, steps of Stable Diffusion v1-5's schedule.", show_default="the cache's schedule, or 50"),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Prompts, one per line and latent; blank lines are skipped.",
            show_default=False,
        ),
    ] = None,
) -> _Generator:
    """Ideal trajectories from given clean latents.

    x_0 is noised step by step, and read backwards. Needs no torch.

    Example: refine-env generate forward-process --clean-latents default --out cached_trajectories/ideal
    """
    texts = None if prompts is None else read_prompts(prompts)
    return partial(generate_forward_process, out, clean_latents, num_steps=num_steps, prompts=texts)


@_generator("diffusers")
def _diffusers(
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="ID|FOLDER",
            help="Hub id, local folder, or `emoji` or `radiomap` (bundled). The paper's is "
            "stable-diffusion-v1-5/stable-diffusion-v1-5.",
            show_default=False,
        ),
    ],
    out: Out,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            "-p",
            metavar="FILE",
            help="Prompts, one a trajectory: a text with one per line, or a table .csv, .tsv, .parquet or .json, "
            "such as DiffusionDB's metadata.parquet.",
            show_default="the conditions' names",
        ),
    ] = None,
    conditions: Annotated[
        Path | None,
        typer.Option(
            "--conditions",
            "-c",
            metavar="FILE",
            help="Images that the network sees beside the latents, one a trajectory: a .npz, .npy or .safetensors file "
            "with an array (N, C, H, W) in [0, 1].",
            show_default=False,
        ),
    ] = None,
    num_prompts: Annotated[
        int | None, typer.Option("--num-prompts", "-n", help="Draw a sample of the prompts.", show_default="all")
    ] = None,
    prompt_seed: Annotated[int, typer.Option(help="Seed of that sample.")] = 0,
    prompt_column: Annotated[
        str | None, typer.Option(help="The table's column of prompts.", show_default="prompt, or p")
    ] = None,
    max_nsfw: Annotated[
        float | None,
        typer.Option(
            help="Leave out a table's rows of which DiffusionDB's prompt_nsfw or image_nsfw is greater or missing.",
            show_default="keep all",
        ),
    ] = None,
    unique: Annotated[
        bool | None,
        typer.Option("--unique/--repeats", help="Leave out prompts that come again.", show_default="in a table"),
    ] = None,
    num_steps: Annotated[int, typer.Option(help="T, the reverse diffusion steps.")] = 50,
    scheduler: Annotated[
        str,
        typer.Option(
            metavar="|".join(SCHEDULERS),
            help="Sampler: ddpm (the paper's: ancestral, posterior variance), ddim, dpmsolver++ (2M), or the model's "
            "own.",
        ),
    ] = "ddpm",
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none.")] = 7.5,
    batch_size: Annotated[
        int, typer.Option(help="Samples at once. Part of the recipe: the last bits depend on it.")
    ] = 8,
    device: Annotated[
        str, typer.Option(help="Torch device, such as cpu or cuda; or several, as in cuda:0,cuda:1.")
    ] = "cpu",
    dtype: Annotated[
        str, typer.Option(metavar="|".join(DTYPES), help="Number format that the network runs in.")
    ] = "float32",
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub model.", show_default=False)
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            help="Processes, each with a model of its own. The bytes do not depend on it.", show_default="one a device"
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option(metavar="|".join(ENGINES), help="What runs several workers: loky on this host, dask, or ray.")
    ] = "loky",
    address: Annotated[
        str | None,
        typer.Option(
            help="A running Dask scheduler or Ray cluster, whose hosts share the folder.",
            show_default="one is started here",
        ),
    ] = None,
    shard_size: Annotated[
        int | None,
        typer.Option(help="Trajectories in one file.", show_default="least multiple of the batch size >= 16"),
    ] = None,
    reuse_ratio: Annotated[
        float,
        typer.Option(help="R: start at the midpoint x_m of another run, m = round((1 - R)·T); 0 is a full run."),
    ] = 0.0,
    reuse_mode: Annotated[
        str, typer.Option(metavar="|".join(REUSE_MODES), help="Where the midpoint comes from, see docs/reuse.md.")
    ] = "vanilla",
    static_prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Prompts of the runs that make the midpoints: one for each prompt, or one for all.",
            show_default=False,
        ),
    ] = None,
    static_conditions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Conditions of the runs that make the midpoints: one for each trajectory, or one for all.",
            show_default=False,
        ),
    ] = None,
    stage_one_model: Annotated[
        str | None,
        typer.Option(metavar="ID|FOLDER", help="Model that makes the midpoints of `two-stage`.", show_default=False),
    ] = None,
    mean_runs: Annotated[int, typer.Option(help="Runs of which `mean` and `mean-plain` take the average.")] = 4,
    midpoints: Midpoints = None,
    midpoints_limit: Annotated[
        int, typer.Option(help="Size of that store [bytes], beyond which what was not used for longest is deleted.")
    ] = DEFAULT_MAX_BYTES,
    with_full: Annotated[
        bool, typer.Option("--with-full", help="Record x_0 of the full run with the same seed beside, for its cost.")
    ] = False,
) -> _Generator:
    """Trajectories of a diffusion model: any text-to-image latent pipeline of diffusers.

    One of --prompts and --conditions is needed; a model whose network sees an image beside the latent, such as
    `radiomap`, takes --conditions.

    Records x_T … x_0 and the network's estimate of the clean sample at every step, in the model's own units.
    Equal bytes are for one kind of machine and the library versions in the manifest, whatever the number of
    workers (on a CPU each runs on one thread); the noise is the same everywhere. Needs the extra `generate`.

    Example: refine-env generate diffusers --model emoji --prompts prompts.txt --out cached_trajectories/mine
    """
    images = None if conditions is None else read_conditions(conditions)
    static_images = None if static_conditions is None else read_conditions(static_conditions)
    reuse = None
    given = (static_prompts, static_conditions, stage_one_model, midpoints)
    if reuse_ratio or reuse_mode != "vanilla" or with_full or any(given):
        static: Sequence[str] = () if static_images is None else ("",)
        reuse = Reuse(
            ratio=reuse_ratio,
            static_prompts=static if static_prompts is None else read_prompts(static_prompts, unique=False),
            static_conditions=static_images,
            mode=reuse_mode,
            stage_one_model=stage_one_model,
            mean_runs=mean_runs,
            midpoints=midpoints,
            max_bytes=midpoints_limit,
            with_full=with_full,
        )
    texts = None
    if prompts is not None:
        texts = read_prompts(
            prompts, column=prompt_column, num_prompts=num_prompts, seed=prompt_seed, max_nsfw=max_nsfw, unique=unique
        )
    elif any(value is not None for value in (prompt_column, num_prompts, max_nsfw, unique)):
        raise ConfigurationError(
            "`--prompts` must be given where prompts are to be chosen from it, got none. Name the file, or leave the "
            "choice out."
        )
    return partial(
        generate_diffusers,
        out,
        model,
        texts,
        conditions=images,
        num_steps=num_steps,
        scheduler=scheduler,
        guidance_scale=guidance_scale,
        batch_size=batch_size,
        device=_parse_list("--device", device, str, "torch devices with commas between", "cuda:0,cuda:1"),
        dtype=dtype,
        revision=revision,
        workers=workers,
        engine=engine,
        address=address,
        shard_size=shard_size,
        reuse=reuse,
    )


@app.command("info", epilog=_EXIT_CODES)
@command
def _info(
    cache: Cache,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Describe a cache; the data are not read."""
    summary = _summary(TrajectoryCache.open(cache))
    if as_json:
        typer.echo(json.dumps(summary, indent=2))  # in ASCII, which escapes what a terminal would obey
        return
    by_step = summary.pop("by_step")
    facts = Table(show_header=False, box=None, pad_edge=False)
    for name, value in summary.items():
        if value is not None:
            facts.add_row(name, Text(_line(_text(value))))
    steps = Table("t", "ᾱ_t", "E‖x_t‖²/M", "E‖y_t − x_0‖²/M", box=None, pad_edge=False)
    for row in by_step:
        steps.add_row(str(row["t"]), f"{row['alpha_bar']:.6f}", f"{row['mean_square']:.4f}", f"{row['mmse']:.4g}")
    console = Console()
    console.print(facts)
    console.print()
    console.print(steps)


@app.command("verify", epilog=_EXIT_CODES)
@command
def _verify(
    cache: Cache,
    deep: Annotated[
        bool, typer.Option("--deep", help="Recompute the statistics, the seeds and ᾱ, too, where that is possible.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Read a whole cache, compare the manifest and each shard with its hash, and name what is damaged."""
    folder = find_cache(cache)
    manifest, sha256 = read_manifest(folder)
    if not manifest.is_sealed:
        _say(
            f"The manifest of {folder} is of format version 1, which holds no hash of itself, so it is not protected: "
            f"damage to it may go unseen{'' if deep else ', most of it not with --deep'}.",
            error=True,
        )
    with _progress(quiet) as progress:
        damage = find_damage(folder, manifest, partial(progress, "verifying"), deep=deep)
    for sentence in damage:
        _say(sentence, error=True)
    if damage:
        _say(
            f"{folder} is damaged in {len(damage)} place{'s' * (len(damage) > 1)}. Restore these files, or generate "
            "the cache again with --overwrite.",
            error=True,
        )
        raise typer.Exit(EXIT_DAMAGED)
    if quiet:
        return
    count = len(manifest.shards)
    _say(f"{count} of {count} shards of {folder} are whole (manifest SHA-256 {sha256}).")
    if deep:
        schedule = "ᾱ" if manifest.recipe.scheduler_alpha_bar() is not None else "not ᾱ, whose source it does not name"
        _say(f"The manifest says of them what they hold: second moments, mean squares, seeds, and {schedule}.")


@app.command("decoder", epilog=_EXIT_CODES)
@command
def _decoder(
    cache: Cache,
    draws: Annotated[int, typer.Option(help="Noises per trajectory of the train split.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the noises.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Latents that the network sees at once.")] = 64,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="ID|FOLDER",
            help="Hub id or folder of the cache's model.",
            show_default="as the cache says",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="Torch device, such as cpu or cuda.")] = "cpu",
    quiet: Quiet = False,
) -> None:
    """Measure what a device's copy of the model makes of what the device holds.

    One evaluation of the network, on the train split, at every step and at coding errors of all sizes, for both
    payloads. The curves are written into the cache's manifest, where `device_decoder="denoise"` finds them. Needs the
    extra `generate`; ideal trajectories need nothing.

    Example: refine-env decoder default
    """
    opened = TrajectoryCache.open(cache)
    denoiser = open_denoiser(opened, model, device=device)
    with _progress(quiet) as progress:
        record = measure_decoder(opened, denoiser, draws=draws, seed=seed, batch_size=batch_size, progress=progress)
    written = record_decoder(opened, record)
    if not quiet:
        _say(f"{written.path / MANIFEST_FILE} holds the decoder's curves (manifest SHA-256 {written.sha256}).")


@midpoints.command("info", epilog=_EXIT_CODES)
@command
def _midpoints_info(folder: Midpoints = None) -> None:
    """Say where the midpoints are, how many, and how large; they are not read."""
    store = MidpointStore(folder)
    sizes = store.sizes().values()
    _say(f"{len(sizes)} midpoints of {sum(sizes):,} bytes in {store.folder}.")


@midpoints.command("verify", epilog=_EXIT_CODES)
@command
def _midpoints_verify(folder: Midpoints = None, quiet: Quiet = False) -> None:
    """Read every midpoint, compare it with its hash and its name, and name those that are damaged."""
    store = MidpointStore(folder)
    with _progress(quiet) as progress:
        damage = store.find_damage(partial(progress, "verifying"))
    for sentence in damage:
        _say(sentence, error=True)
    if damage:
        _say(f"{len(damage)} midpoints in {store.folder} are damaged. The next run makes them again.", error=True)
        raise typer.Exit(EXIT_DAMAGED)
    if not quiet:
        _say(f"All {len(store.sizes())} midpoints in {store.folder} are whole.")


@midpoints.command("clear", epilog=_EXIT_CODES)
@command
def _midpoints_clear(folder: Midpoints = None, quiet: Quiet = False) -> None:
    """Delete all midpoints of the store, and nothing else in its folder."""
    store = MidpointStore(folder)
    count = store.clear()
    if not quiet:
        _say(f"{count} midpoints deleted in {store.folder}.")


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line, see `refine_env.commands.run`.

    Args:
        arguments: default `sys.argv[1:]`.
    """
    run(app, arguments)


def _say(text: str, *, error: bool = False) -> None:
    """Print a line, the only way in which this program does: it may hold what a file says, or a folder's name."""
    typer.echo(_line(text), err=error)


def _line(text: str) -> str:
    return printable(text, limit=10 * len(text))


def _parse_list(name: str, text: str, kind: Callable[[str], _Item], what: str, example: str) -> tuple[_Item, ...]:
    """The items of an option, of which one may come again."""
    return parse_list(name, text, kind, what=what, advice=f"Write for instance {example}.", valid=lambda items: True)


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Callable[[str, float, int], None]]:
    """A bar on stderr with the time left for each phase; gives what it is called with: phase, done, total.

    Where stderr is no terminal, it writes a line now and then.
    """
    bars: dict[str, tqdm[NoReturn]] = {}

    def update(phase: str, done: float, total: int) -> None:
        if phase not in bars:
            for bar in bars.values():
                bar.close()
            count = "" if phase == "verifying" else " {n:.0f}/{total:.0f}"  # of bytes, nobody wants to know
            bars[phase] = tqdm(
                desc=phase,
                total=total,
                initial=done,  # what an earlier run did says nothing about the time left
                bar_format=f"{{desc}} {{percentage:3.0f}}% |{{bar}}|{count} [{{elapsed}} < {{remaining}}]",
                mininterval=0.1 if sys.stderr.isatty() else 10.0,
                disable=quiet,
            )
        bars[phase].update(done - bars[phase].n)

    try:
        yield update
    except KeyboardInterrupt:
        for bar in bars.values():
            bar.close()
        _say("error: interrupted. Run the same command again; a generation goes on where it stopped.", error=True)
        raise typer.Exit(EXIT_INTERRUPTED) from None
    finally:
        for bar in bars.values():
            bar.close()


_SHOWN_FIELDS = (
    *("source", "model", "scheduler", "guidance_scale", "batch_size", "model_dtype", "device", "prompt_source"),
    *("clean_latents", "clean_estimates", "units", "note", "generator", "seed"),
)
"""Fields of the recipe that a description of a cache shows, in this order; of a scheduler the class alone."""


def _summary(cache: TrajectoryCache) -> dict[str, Any]:
    recipe = cache.manifest.recipe
    steps = sorted({round(fraction * cache.num_steps) for fraction in (0, 0.02, 0.1, 0.2, 0.4, 0.6, 0.8, 1)})
    return {
        "path": str(cache.path),
        "sha256": cache.sha256,
        **{name: getattr(recipe, name) for name in _SHOWN_FIELDS},
        "scheduler": None if recipe.scheduler is None else recipe.scheduler["class"],
        "reuse": None if recipe.reuse is None else {**recipe.reuse, "sources": len(recipe.reuse["sources"])},
        "num_steps": cache.num_steps,
        "latent_shape": list(cache.latent_shape),
        "latent_dim": cache.latent_dim,
        "trajectories": {split: len(cache.indices(split)) for split in ("all", "train", "test")},
        "shards": len(cache.manifest.shards),
        "bytes": sum(shard.bytes for shard in cache.manifest.shards),
        "by_step": [
            {
                "t": t,
                "alpha_bar": float(cache.schedule.alpha_bar[t]),
                "mean_square": float(cache.mean_square[t]),
                "mmse": float(cache.mmse[t]),
            }
            for t in steps
        ],
    }


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items())
    if isinstance(value, list):
        return "×".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    main()
