"""Compare policies over a range of SNRs: ``python -m agents.evaluate``.

Writes ``episodes.csv``, ``summary.csv`` and ``run.json``, prints the table, and draws ``fig3a`` where matplotlib is
installed. With ``--images`` what the devices hold is decoded and scored too: further columns, ``images.npz``,
``fig3b`` and ``strip``. With ``--html`` all of it becomes one page, ``report.html``. ``--study NAME`` asks one of the
other questions of :mod:`agents.studies.registry` instead.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

import agents
from agents.figures import draw_fig3a, draw_images, draw_studies, rows_by_policy
from agents.figures.series import summary_cells
from agents.studies.base import Request, Study, common_settings
from agents.studies.images import ImageScorer, open_decoder, open_metrics
from agents.studies.registry import STUDIES
from refine_env import CacheError, ConfigurationError, MissingExtraError, SystemConfig, TrajectoryCache, __version__
from refine_env._validation import check_choice, check_integer, shown
from refine_env.commands import command, parse_list, run
from refine_env.commands import print_table as print_lines
from refine_env.config import (
    DEFAULT_NAME_BITS,
    PAPER_BIT_DEPTHS,
    PAPER_DEADLINE,
    PAPER_LATENCY_QUANTILE,
    PAYLOADS,
)
from refine_env.dynamics.settings import DEVICE_DECODERS, EnvSettings
from refine_env.evaluation import (
    DecodingScorer,
    DeviceDecoder,
    Entry,
    Score,
    Table,
    episode_columns,
    episode_seeds,
    roll_out_many,
    summarize,
    summary_columns,
    write_atomically,
    write_table,
)
from refine_env.metrics import DEFAULT_METRICS, LPIPS, MAX_PSNR_DB, METRICS, GlyphTask, MapTask, gallery_path
from refine_env.render.decoder import scale_of
from refine_env.trajectories.denoising import open_denoiser

__all__ = [
    "DEFAULT_AGENTS",
    "DEFAULT_SNRS_DB",
    "evaluate",
    "main",
    "make_team",
    "own_env_kwargs",
    "usable_cores",
]

DEFAULT_AGENTS = (
    "lookahead",
    "persistent-q3",
    "persistent-q4",
    "persistent-q8",
    "persistent-q10",
    "persistent-q16",
    "final-only",
)
DEFAULT_SNRS_DB = tuple(float(snr_db) for snr_db in range(0, 31, 3))
_PAPER, _PAPER_HELP = "fig3a", "fig3a: the paper's comparison"  # the study with options of its own
_DEFAULT_BIT_DEPTHS = ",".join(map(str, PAPER_BIT_DEPTHS))
_DEFAULT_SNR_LIST = ",".join(f"{snr_db:g}" for snr_db in DEFAULT_SNRS_DB)


Team = dict[tuple[str, float], agents.Agent]
"""Policies by name and SNR."""


def own_env_kwargs(name: str, env_kwargs: dict[str, Any], snr_db: float) -> dict[str, Any]:
    """Environment arguments of one policy at one SNR: those of the evaluation, with what the policy is made for on top.

    A payload that the evaluation asks for holds for policies on the closed-loop coder; the paper's coder sends only
    latents.

    Raises:
        ConfigurationError: if there is no such policy.
    """
    own = agents.env_kwargs(name)
    if own.get("coder") == "closed_loop" and "payload" in env_kwargs:
        own["payload"] = env_kwargs["payload"]
    return {**env_kwargs, **own, "snr_db": snr_db}


def make_team(names: tuple[str, ...], snrs_db: tuple[float, ...], env_kwargs: dict[str, Any]) -> Team:
    """Make every policy at every SNR, so that what cannot work is known before the first episode.

    Raises:
        ConfigurationError: if a name or SNR is out of range.
        CacheError: if the cache is missing or damaged.
    """
    cache = common_settings({**env_kwargs, "snr_db": snrs_db[0]}).open_cache()
    team: Team = {}
    for name in names:
        for snr_db in snrs_db:
            own = EnvSettings.from_kwargs(own_env_kwargs(name, env_kwargs, snr_db))
            team[name, snr_db] = agents.make(name, own.config_for(cache))
    return team


def evaluate(
    names: tuple[str, ...],
    snrs_db: tuple[float, ...],
    *,
    episodes: int,
    seed: int,
    env_kwargs: dict[str, Any],
    progress: Any = None,
    score: Score | None = None,
    workers: int = 1,
    team: Team | None = None,
    anytime: bool = False,
    target_mse: float | None = None,
) -> Table:
    """Episodes of every policy at every SNR on common draws: row k of every agent at one SNR has the same seed.

    Args:
        names: names of the policies, see :func:`agents.names`.
        snrs_db: mean SNRs [dB].
        episodes: how many to play for each policy and SNR.
        seed: seed of the evaluation.
        env_kwargs: environment arguments; each policy's ``agents.env_kwargs`` come on top.
        progress: called with the number of episodes that have just ended.
        score: see :func:`refine_env.evaluation.roll_out`.
        workers: see :func:`refine_env.evaluation.roll_out_many`.
        team: the policies, if :func:`make_team` made them already.
        anytime, target_mse: see :func:`refine_env.evaluation.roll_out_many`.

    Raises:
        ConfigurationError: if a name, SNR or count is out of range.
        CacheError: if the cache is missing or damaged.
    """
    made = make_team(names, snrs_db, env_kwargs) if team is None else team
    entries = [
        Entry(
            partial(_already_made, made[name, snr_db]),
            own_env_kwargs(name, env_kwargs, snr_db),
        )
        for snr_db in snrs_db
        for name in names
    ]
    tables = roll_out_many(
        entries,
        episodes=episodes,
        seed=seed,
        workers=workers,
        progress=progress,
        score=score,
        anytime=anytime,
        target_mse=target_mse,
    )
    return [row for table in tables for row in table]


def usable_cores() -> int:
    """Processor cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _already_made(agent: agents.Agent, config: SystemConfig) -> agents.Agent:
    """The policy that is there already, for :class:`refine_env.evaluation.Entry`, which wants to make one."""
    return agent


def describe_run(
    names: tuple[str, ...],
    snrs_db: tuple[float, ...],
    episodes: int,
    seed: int,
    env_kwargs: dict[str, Any],
    team: Team | None = None,
) -> dict[str, Any]:
    """What is needed to repeat an evaluation: arguments, systems, the cache's hash and the versions.

    Args:
        names, snrs_db, episodes, seed, env_kwargs, team: as :func:`evaluate` has them.

    Raises:
        ConfigurationError, CacheError: as :func:`evaluate`.
    """
    settings = common_settings({**env_kwargs, "snr_db": snrs_db[0]})
    cache = settings.open_cache()
    episode_seeds(seed, episodes)
    made = make_team(names, snrs_db, env_kwargs) if team is None else team
    systems = {
        name: {key: value for key, value in made[name, snrs_db[-1]].config.to_dict().items() if key != "snr_db"}
        for name in names
    }
    packages = ("numpy", "scipy", "gymnasium", "numba", "safetensors")
    return {
        "agents": list(names),
        "snr_db": list(snrs_db),
        "episodes": episodes,
        "seed": seed,
        "env_kwargs": env_kwargs,
        "config": systems,
        "cache": {"name": settings.cache, "sha256": cache.sha256, "trajectories": len(cache)},
        "versions": {
            "refine-env": __version__,
            "python": platform.python_version(),
            **{package: metadata.version(package) for package in packages},
        },
    }


def print_table(summary: Table) -> None:
    """The summary on the terminal, within 80 columns: one row an SNR, one column a policy, the lowest mean marked."""
    policies = rows_by_policy(summary)
    headings = ["SNR\n[dB]"]
    for policy in policies:
        agent, parenthesis, details = policy.partition(" (")
        details = f"{parenthesis}{details}".replace(" ", "\n").replace("_", "\n")
        headings.append(agent.replace("-", "\n", 1) + details)
    lines = [
        [
            snr_db,
            *(
                "–"
                if cell is None
                else f"{f'[bold]{cell.mean}[/bold]' if cell.lowest else cell.mean}\n[dim]{cell.interval}[/dim]"
                for cell in cells
            ),
        ]
        for snr_db, cells in summary_cells(policies, dict.fromkeys(row["snr_db"] for row in summary))
    ]
    print_lines(
        dict.fromkeys(headings, "right"),
        lines,
        title="latent MSE at the deadline, mean over episodes",
        notes=["Second line: 95 % bootstrap interval, in the mean's power of ten. Bold: lowest."],
        padding=(0,),
    )


@command
def main(
    agent_names: Annotated[
        str | None,
        typer.Option("--agents", help="Comma-separated policies.", show_default=",".join(DEFAULT_AGENTS)),
    ] = None,
    snr_db: Annotated[
        str | None,
        typer.Option(
            "--snr-db",
            help="Comma-separated mean SNRs per subchannel in dB.",
            show_default=f"{_DEFAULT_SNR_LIST}; the other studies have their own",
        ),
    ] = None,
    episodes: Annotated[
        int | None,
        typer.Option(help="Episodes per policy and SNR.", show_default="200; the other studies have their own"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the evaluation; the same seed gives the same draws.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for tables and figures.", show_default="results/STUDY"),
    ] = None,
    study: Annotated[
        str,
        typer.Option(
            help="; ".join(("fig3a: the paper's comparison", *(f"{s.name}: {s.summary}" for s in STUDIES.values())))
        ),
    ] = _PAPER,
    cache: Annotated[str, typer.Option(help="Name or folder of a trajectory cache.")] = "default",
    split: Annotated[str, typer.Option(help="Trajectories: train, test or all.")] = "test",
    bit_depths: Annotated[str, typer.Option(help="Comma-separated bit depths.")] = _DEFAULT_BIT_DEPTHS,
    deadline: Annotated[int, typer.Option(help="Deadline in slots.")] = PAPER_DEADLINE,
    latency_quantile: Annotated[
        float | None,
        typer.Option(help="q of the latency model.", show_default=f"{PAPER_LATENCY_QUANTILE:g}"),
    ] = None,
    payload: Annotated[
        str, typer.Option(help="What policies on the closed-loop coder send: latent or posterior_mean.")
    ] = "latent",
    moments: Annotated[
        str, typer.Option(help="What the closed-loop coder predicts with: model, or measured on the train split.")
    ] = "model",
    anytime: Annotated[
        bool, typer.Option("--anytime", help="Also the mean over the slots of the latent MSE that the device shows.")
    ] = False,
    target_mse: Annotated[
        float | None, typer.Option(help="Also the slots until that MSE is below this; deadline + 1 where it never is.")
    ] = None,
    warm_start: Annotated[
        str | None,
        typer.Option(
            metavar="STEP[,shared]",
            help="Generation starts from the midpoint x_STEP, which with `shared` the device has, too.",
            show_default="from noise, or as the cache says",
        ),
    ] = None,
    name_bits: Annotated[
        float | None,
        typer.Option(help="Length of a shared midpoint's name in bits.", show_default=f"{DEFAULT_NAME_BITS:g}"),
    ] = None,
    reuse_ratios: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated ratios R of --study reuse.", show_default="eight, or that of a cache of midpoints"
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Threads for the deliveries; the tables do not depend on it.", show_default="one a core"),
    ] = None,
    figures: Annotated[bool, typer.Option(help="Draw the figure (needs matplotlib).")] = True,
    html: Annotated[bool, typer.Option("--html", help="Write the report, one HTML page (needs plotly).")] = False,
    images: Annotated[bool, typer.Option(help="Decode what the devices hold, and score the images.")] = False,
    metrics: Annotated[
        str, typer.Option(help=f"Comma-separated metrics of the images, among {', '.join(METRICS)}.")
    ] = ",".join(DEFAULT_METRICS),
    image_episodes: Annotated[
        int | None, typer.Option(help="Score the first so many episodes of every row.", show_default="all")
    ] = None,
    lpips_weights: Annotated[
        Path | None, typer.Option(help="File of AlexNet's weights for LPIPS.", show_default="in torch's cache")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Hub id or folder of the cache's model.", show_default="as the cache says")
    ] = None,
    device: Annotated[str, typer.Option(help="Torch device for images and the devices' decoder.")] = "cpu",
    device_decoder: Annotated[
        str, typer.Option(help="What devices do at the deadline: none, or denoise what they hold, with their own copy.")
    ] = "none",
) -> None:
    """Compare policies on common random numbers and write table, figure and how to repeat the run.

    Exit codes: 0 done, 2 an argument is wrong, 3 a cache or model is missing or damaged, or the output cannot be
    written, 4 what decodes images is not installed.
    """
    quantile = {} if latency_quantile is None else {"latency_quantile": latency_quantile}
    scoring = _ImageOptions(metrics, image_episodes, lpips_weights, model, device) if images else None
    ratios = None
    if reuse_ratios is not None:
        ratios = parse_list("--reuse-ratios", reuse_ratios, float, advice="For example: --reuse-ratios 0,0.5,0.9")
    denoising = check_choice("--device-decoder", device_decoder, DEVICE_DECODERS) == "denoise"
    if check_choice("--study", study, (_PAPER, *STUDIES)) != _PAPER:
        for option, given in (
            ("--agents", agent_names),
            ("--html", html),
            ("--images", images),
            ("--device-decoder", device_decoder if denoising else None),
            ("--anytime", anytime),
            ("--target-mse", target_mse),
            ("--warm-start", warm_start),
            ("--name-bits", name_bits),
            ("--reuse-ratios", reuse_ratios),
        ):
            if given not in (None, False) and option not in STUDIES[study].takes:
                raise ConfigurationError(
                    f"`{option}` must be left out of --study {study}, got {given!r}. Its policies are fixed; "
                    "use --study fig3a."
                )
        chosen = STUDIES[study]
        _run_study(
            chosen,
            Request(
                chosen.snrs_db if snr_db is None else _parse_snrs(snr_db),
                chosen.episodes if episodes is None else episodes,
                seed,
                {"cache": cache, "split": split, "deadline": deadline, **quantile},
                out or Path("results", study),
                _number_of_workers(workers),
                target_mse,
                ratios,
            ),
            figures,
        )
        return
    if ratios is not None:
        raise ConfigurationError(
            f"`--reuse-ratios` must be left out of --study {study}, got {reuse_ratios!r}. Use --study reuse."
        )
    names = parse_list(
        "--agents", agent_names or ",".join(DEFAULT_AGENTS), str, advice="For example: --agents lookahead,persistent-q8"
    )
    snrs_db = _parse_snrs(snr_db or _DEFAULT_SNR_LIST)
    depths = parse_list("--bit-depths", bit_depths, int, advice=f"For example: --bit-depths {_DEFAULT_BIT_DEPTHS}")
    env_kwargs = {
        "cache": cache,
        "split": split,
        "bit_depths": list(depths),
        "deadline": deadline,
        "moments": moments,
        **quantile,
    }
    if check_choice("--payload", payload, PAYLOADS) != "latent":
        env_kwargs["payload"] = payload
    if denoising:
        env_kwargs["device_decoder"] = device_decoder
    if warm_start is not None or name_bits is not None:
        env_kwargs["warm_start"] = _parse_warm_start(warm_start, name_bits)
    _run_comparison(
        names,
        snrs_db,
        200 if episodes is None else episodes,
        seed,
        out or Path("results/fig3a"),
        env_kwargs,
        _number_of_workers(workers),
        figures,
        html,
        scoring,
        _CourseOptions(anytime, target_mse),
        _DecoderOptions(model, device) if denoising else None,
    )


def _parse_snrs(text: str) -> tuple[float, ...]:
    return parse_list("--snr-db", text, float, advice="For example: --snr-db 0,3,6")


def _parse_warm_start(text: str | None, name_bits: float | None) -> dict[str, Any]:
    """The environment's argument of ``--warm-start`` and ``--name-bits``."""
    advice = "Give for example --warm-start 25, or 25,shared where the device has the midpoint, too."
    found = re.fullmatch("([0-9]{1,9})(,shared)?", text or "")
    if text is not None and found is None:
        raise ConfigurationError(f"`--warm-start` must be STEP or STEP,shared, got {shown(text)}. {advice}")
    if found is None or (name_bits is not None and not found[2]):
        raise ConfigurationError(f"`--name-bits` must go with a shared midpoint, got {name_bits!r} without. {advice}")
    start = {"step": int(found[1]), "shared": bool(found[2])}
    return start if name_bits is None else {**start, "name_bits": name_bits}


class _CourseOptions(NamedTuple):
    """The options of the command that concern what the devices show before the deadline."""

    anytime: bool
    target_mse: float | None

    def given(self) -> dict[str, Any]:
        """Those that were given, which alone stand in ``run.json``."""
        return {name: value for name, value in self._asdict().items() if value not in (None, False)}


class _ImageOptions(NamedTuple):
    """The options of the command that concern images."""

    metrics: str
    episodes: int | None
    lpips_weights: Path | None
    model: str | None
    device: str

    def open(self, cache_name: str) -> tuple[ImageScorer, dict[str, Any]]:
        """Open the scorer, and describe it so that it can be opened again; print which metrics are missing."""
        cache = TrajectoryCache.open(cache_name)
        names = parse_list("--metrics", self.metrics, str, advice="For example: --metrics psnr,ssim")
        for name in names:  # before a model is loaded
            check_choice("metrics", name, METRICS)
        decoder = open_decoder(cache, self.model, device=self.device)
        gallery = gallery_path(decoder.folder) if "task" in names else None
        metrics, missing = open_metrics(
            names, self.lpips_weights, device=self.device, gallery=gallery, scale=scale_of(decoder)
        )
        scorer = ImageScorer(cache, decoder, metrics, image_episodes=self.episodes)
        for sentence in missing:
            typer.echo(sentence)
        lpips, task = metrics.get("lpips"), metrics.get("task")
        return scorer, {
            "metrics": list(metrics),
            "episodes": self.episodes,
            "model": {"id": decoder.model_id, "revision": decoder.revision},
            "device": self.device,
            "max_psnr_db": MAX_PSNR_DB,
            "lpips_weights": None if self.lpips_weights is None else str(self.lpips_weights),
            "lpips": {"net": lpips.net, "weights_sha256": lpips.sha256} if isinstance(lpips, LPIPS) else None,
            **({"task": {"gallery_sha256": task.sha256}} if isinstance(task, GlyphTask) else {}),
            **({"task": {"coverage_dbm": task.coverage_dbm}} if isinstance(task, MapTask) else {}),
            "versions": {
                package: metadata.version(package)
                for package in ("torch", "diffusers", "scikit-image", "lpips")
                if importlib.util.find_spec({"scikit-image": "skimage"}.get(package, package))
            },
        }


class _DecoderOptions(NamedTuple):
    """The options of the command that concern the devices' decoder."""

    model: str | None
    device: str

    def open(self, cache_name: str) -> DeviceDecoder:
        """Open the decoder of the cache's model."""
        cache = TrajectoryCache.open(cache_name)
        return DeviceDecoder(cache, open_denoiser(cache, self.model, device=self.device))


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CacheError(
            f"`--out` must be a folder that can be written, got {str(out)!r} ({error.strerror}). Choose another."
        ) from None


def _number_of_workers(workers: int | None) -> int:
    number = usable_cores() if workers is None else workers
    return check_integer("--workers", number, 1, advice="Give the number of processor cores to use.")


def _draw(draw: Callable[[], list[Path]]) -> list[Path]:
    """The figures' files; where matplotlib is not installed a sentence says so, and there are none."""
    try:
        return draw()
    except MissingExtraError as error:
        typer.echo(f"No figure: {error}")
        return []


def _run_study(study: Study, request: Request, figures: bool) -> None:
    """Play, write and show one of the studies that are not the paper's comparison."""
    run = describe_run(("lookahead",), request.snrs_db, request.episodes, request.seed, dict(request.env_kwargs))
    _make_folder(request.out)
    written, details = study.run(request)
    write_atomically(request.out / "run.json", json.dumps({**run, "study": study.name, **details}, indent=1) + "\n")
    written.append(request.out / "run.json")
    if figures and study.has_figure:
        written += _draw(lambda: draw_studies(request.out, request.out))
    typer.echo("wrote " + ", ".join(str(path) for path in written))


def _run_comparison(
    names: tuple[str, ...],
    snrs_db: tuple[float, ...],
    episodes: int,
    seed: int,
    out: Path,
    env_kwargs: dict[str, Any],
    workers: int,
    figures: bool,
    html: bool,
    images: _ImageOptions | None,
    course: _CourseOptions,
    decoding: _DecoderOptions | None = None,
) -> None:
    """Play, write and show the comparison of policies."""
    from tqdm import tqdm

    team = make_team(names, snrs_db, env_kwargs)
    run = describe_run(names, snrs_db, episodes, seed, env_kwargs, team) | course.given()
    if html:
        from agents.report import import_libraries, write_report

        import_libraries()  # what is not installed is known before the first episode
    scorer = None
    if images is not None:
        scorer, run["images"] = images.open(env_kwargs["cache"])
    score: Score | None = scorer
    if decoding is not None:
        score = DecodingScorer(decoding.open(env_kwargs["cache"]), scorer)
        run["device_decoder"] = decoding._asdict()
    _make_folder(out)
    with tqdm(total=len(names) * len(snrs_db) * episodes, unit="episode", desc="evaluate") as bar:
        if scorer is not None:
            scorer.progress = lambda: bar.set_postfix(images=scorer.num_images)
        table = evaluate(
            names,
            snrs_db,
            episodes=episodes,
            seed=seed,
            env_kwargs=env_kwargs,
            progress=bar.update,
            score=score,
            workers=workers,
            team=team,
            **course._asdict(),
        )
    summary = summarize(table)
    write_table(out / "episodes.csv", table, episode_columns(table))
    write_table(out / "summary.csv", summary, summary_columns(summary))
    write_atomically(out / "run.json", json.dumps(run, indent=1) + "\n")
    print_table(summary)
    written = [out / name for name in ("episodes.csv", "summary.csv", "run.json")]
    if scorer is None:
        (out / "images.npz").unlink(missing_ok=True)  # an earlier evaluation may have left it
    else:
        scorer.write_tiles(out / "images.npz")
        written.append(out / "images.npz")
    if figures:
        written += _draw(lambda: draw_fig3a(summary, out) + (draw_images(out, out) if scorer is not None else []))
    if html:
        decoder = None
        if images is not None:
            decoder = open_decoder(TrajectoryCache.open(env_kwargs["cache"]), images.model, device=images.device)
        written.append(write_report(out, decoder=decoder))
    typer.echo("wrote " + ", ".join(str(path) for path in written))


if __name__ == "__main__":
    run(main)
