"""Every command of the project, and hostile command lines of each: a process for `test_command_lines.py`.

``python -m tests.command_lines COMMAND FOLDER`` runs one command's lines in a folder, one after the other, and prints
what came of each as a line of JSON. Whatever is not below that folder cannot be written, as it would be for a user
without rights: the process may be root's, and ``--out /`` is among the lines. No name is looked up but this machine's.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import inspect
import io
import json
import os
import resource
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import traceback
import types
import typing
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import typer

ROOT = Path(__file__).parents[1]
SECONDS = 30  # of processor time that one line may take, however busy the machine is
MEMORY = 12 << 30  # address space of the process; torch's libraries alone take some

# A command line of each command that is right and soon done; options replace it one by one. `{out}` is new every time.
# A command that has none makes the sweep fail: give it one here.
_TRAIN = (
    "--out {out} --cache tiny --total-steps 4 --num-envs 2 --rollout-steps 2 --batch-size 2 --epochs 1 --actor 2 "
    "--critic 2 --deadline 4 --bit-depths 3 --eval-snr-db 9 --snr-db 9 --eval-episodes 1 --test-episodes 1 "
    "--rivals persistent-q3 --no-progress --no-tensorboard --checkpoint-every 0 --clone-decisions 8"
)
BASE = {
    "refine_env.cli generate gaussian": "-n 1 --latent-shape 1,1,2 --num-steps 2 --out {out}",
    "refine_env.cli generate forward-process": "-c x.npy --num-steps 2 --out {out}",
    "refine_env.cli generate diffusers": "-m model -p prompts.txt --num-steps 1 --batch-size 1 --out {out}",
    "refine_env.cli info": "tiny",
    "refine_env.cli verify": "tiny",
    "refine_env.cli decoder": "tiny",
    "refine_env.cli midpoints info": "--midpoints {out}",
    "refine_env.cli midpoints verify": "--midpoints {out}",
    "refine_env.cli midpoints clear": "--midpoints {out}",
    "refine_env.receive": "--port 0 --timeout 0.01",
    "agents.benchmark": "--rows reconstruct --repetitions 1 --seconds 0.001 --num-envs 1 --episodes 1 --workers 1 "
    "--fig3-cache fig3 --twin-episodes 1",
    "agents.distortion": "--cache tiny --bit-depths 3 --trajectories 1 --no-images --no-figures --out {out}",
    "agents.evaluate": "--agents persistent-q3 --snr-db 9 --episodes 1 --cache tiny --bit-depths 3 --deadline 4 "
    "--workers 1 --no-figures --out {out}",
    "agents.figures": "tables --out {out}",
    "agents.leaderboard": "--tasks paper-6dB --episodes 1 --out {out}",
    "agents.record": "--agent final-only --cache tiny --deadline 3 --decoder none --out {out}.png",
    "agents.report": "tables --out {out}.html",
    "agents.send": "--agent final-only --cache tiny --port 1 --timeout 0.01",
    "train.diffusion.reuse": "--out {out} --figures {out} --work {out}-work --model nowhere",
    "train.diffusion.scene_sheet": "--out {out}.png --side 65",
    "train.diffusion.assess": "--model nowhere --prompts prompts.txt --sheet {out}.png --font nowhere",
    "train.diffusion.gallery": "--model nowhere --font nowhere --out {out}.npz",
    "train.diffusion.radiomap.assess": "--model nowhere --work nowhere --sheet {out}.png",
    "train.diffusion.radiomap.experiments": "--model nowhere --regressor nowhere --work {out}-work --out {out} "
    "--figures {out}",
    "train.diffusion.radiomap.scene_file": "--train 1 --test 1 --out {out}.npz",
    "train.rl.export_minari": "{out}-v0 --agent final-only --cache tiny --episodes 1 --out datasets",
    "train.ldm": "--out {out} --work {out}-work --sheet {out}.png --trajectory-prompts {out}.txt --font nowhere",
    "train.ppo": _TRAIN,
    "train.rl.out_of_the_box": "--out {out} --setups learning --snr-db 6 --seeds 1 --total-steps 1 --episodes 1 "
    "--cache nowhere",
    "train.radiomap": "--stages data --scenes 1 --vae-scenes 1 --held-out 1 --out {out} --work {out}-work "
    "--sheet {out}.png",
    "train.rl.search": "--out {out} --trials 1 --total-steps 1 --eval-every 1 --eval-episodes 1 --rival nobody "
    "--cache tiny",
    "train.rl.study": "--out {out} --runs {out}-runs --seeds 0 --cache tiny",
}
# What a right command line ends with, where that is not 0: nobody connects, nobody listens, nothing to work on.
ENDS = {
    "refine_env.receive": 3,
    "agents.send": 3,
    "train.diffusion.assess": 3,
    "train.diffusion.gallery": 2,
    "train.diffusion.radiomap.assess": 2,
    "train.diffusion.reuse": 2,
    "train.diffusion.scene_sheet": 2,
    "train.diffusion.radiomap.experiments": 4,
    "train.ldm": 3,
    "train.rl.out_of_the_box": 3,
    "train.rl.search": 2,
    "train.rl.study": 2,
}

_DIGITS = "9" * 400
_BROKEN = "bad\udce9"
_ESCAPE = "\x1b[31mred\x1b[0m\a"
_LONG = "x" * 100_000
WORDS = ["", "x", ",", ",,,", _BROKEN, _ESCAPE, _LONG]
NUMBERS = [
    "nan",
    "inf",
    "-inf",
    "-1",
    "0",
    "1e308",
    "1e-320",
    "1e400",
    "9007199254740992",
    "99999999999999999999",
    _DIGITS,
    "9" * 5000,
    "٣",
]
LISTS = ["persistent-q" + "9" * 5000, "100000000000,1,1", "1," * 5000 + "1", "[" * 5000, "{}"]
PATHS = ["/", "nowhere", "prompts.txt", "folder", "deep.json", "deep.csv", "/proc/nowhere/x", "y" * 5000]
HOSTILE: dict[type, list[str]] = {
    int: [*WORDS, *NUMBERS],
    float: [*WORDS, *NUMBERS],
    str: [*WORDS, *NUMBERS, *LISTS, *PATHS],
    Path: [*WORDS, "-1", *PATHS],
    bool: [],
}


class Option(NamedTuple):
    """A parameter of a command: how it is given (empty for an argument), and what it is."""

    flag: str
    kind: type


def modules() -> list[str]:
    """Every module that can be run with ``python -m``."""
    files = (path for package in ("refine_env", "agents", "train") for path in sorted((ROOT / package).rglob("*.py")))
    return [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
        for path in files
        if any(
            isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
            for node in ast.parse(path.read_text(encoding="utf-8")).body
        )
    ]


def commands(module: str) -> dict[str, Callable[..., Any]]:
    """Every command of a module: one, or those of its application."""
    loaded = importlib.import_module(module)

    def below(name: str, app: typer.Typer) -> Iterator[tuple[str, Callable[..., Any]]]:
        for info in app.registered_commands:
            assert info.callback is not None
            yield f"{name} {info.name}", info.callback
        for group in app.registered_groups:
            assert group.typer_instance is not None
            yield from below(f"{name} {group.name}", group.typer_instance)

    if hasattr(loaded, "app"):
        return dict(below(module, loaded.app))
    return {module: loaded.main}


def options(function: Callable[..., Any]) -> list[Option]:
    """The parameters of a command, read off its signature."""
    hints = typing.get_type_hints(function, include_extras=True)
    found = []
    for name, parameter in inspect.signature(function).parameters.items():
        kind, info = typing.get_args(hints.get(name, parameter.annotation))
        if typing.get_origin(kind) in (types.UnionType, typing.Union):
            kind = next(member for member in typing.get_args(kind) if member is not types.NoneType)
        if typing.get_origin(kind) is list:
            (kind,) = typing.get_args(kind)
        if typing.get_origin(kind) is typing.Literal:
            kind = str
        is_option = isinstance(info, type(typer.Option()))
        declared = [flag for flag in info.param_decls or () if flag.startswith("--")]
        found.append(Option((declared or ["--" + name.replace("_", "-")])[0] if is_option else "", kind))
    return found


def lines(command: str) -> Iterator[list[str]]:
    """The right command line, then each hostile value in each place, then some that are wrong as a whole."""
    module, *words = command.split()
    base = BASE[command].split()
    yield [*words, *base]
    for option in options(commands(module)[command]):
        for value in HOSTILE[option.kind]:
            if option.flag:
                yield [*words, *base, f"{option.flag}={value}"]
            else:
                yield [*words, value, *(base if base[0].startswith("-") else base[1:])]
    for strange in ("--nowhere", f"--{_ESCAPE}", "--\udcff", _LONG):
        yield [*words, *base, strange]
    yield [*words, *base, *base[:1] * 3]
    yield [*words, "--help"]


def make_folder(folder: Path) -> None:
    """The files that the command lines name."""
    from agents import evaluate
    from refine_env.trajectories import generate_gaussian

    generate_gaussian(folder / "tiny", 4, (1, 1, 2), num_steps=4)
    np.save(folder / "x.npy", np.zeros((2, 1, 1, 2), dtype=np.float32))
    (folder / "folder").mkdir()
    (folder / "prompts.txt").write_text("a cat\n", encoding="utf-8")
    (folder / "deep.json").write_text("[" * 5000 + "]" * 5000, encoding="utf-8")
    (folder / "deep.csv").write_text("a,b\n" + "[" * 5000, encoding="utf-8")
    evaluate.main(
        agent_names="final-only",
        snr_db="9",
        episodes=1,
        cache=str(folder / "tiny"),
        deadline=4,
        workers=1,
        figures=False,
        out=folder / "tables",
    )
    if importlib.util.find_spec("diffusers") is not None:
        from tests.trajectories.models import save_tiny

        save_tiny(folder)


def forbid(folder: Path) -> None:
    """From now on this process can write below a folder alone, and finds no host but this one."""
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    allowed = (str(folder), os.devnull)
    changing = {
        "os.mkdir": 1,
        "os.remove": 1,
        "os.rmdir": 1,
        "os.truncate": 1,
        "os.chmod": 1,
        "sqlite3.connect": 1,
        "os.rename": 2,
        "os.link": 2,
        "os.symlink": 2,
    }

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.getaddrinfo" and arguments[0] not in (None, "", "127.0.0.1", "localhost"):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        paths = arguments[: changing.get(event, 0)]
        if event == "open" and int(arguments[2] or 0) & writing:
            paths = arguments[:1]
        for path in paths:
            if isinstance(path, str | bytes | os.PathLike):
                full = os.path.abspath(os.fsdecode(path))
                if not full.startswith(allowed) and "__pycache__" not in full:
                    raise PermissionError(13, "Permission denied", path)

    sys.addaudithook(watch)


class TookTooLongError(BaseException):
    """A line that did not end."""


def run(module: str, arguments: list[str]) -> dict[str, Any]:
    """What came of one line: its exit code, or the traceback of what escaped; and what it wrote on stderr."""
    out, err = (  # as a terminal in UTF-8 is opened
        io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=errors, write_through=True)
        for errors in ("strict", "backslashreplace")
    )
    sys.argv = [module, *arguments]
    escaped, code = None, 0
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = 0 if end.code is None else end.code
    except (Exception, TookTooLongError) as error:
        escaped = f"{type(error).__name__}: {error!s:.200}\n" + "".join(traceback.format_tb(error.__traceback__)[-4:])
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    texts = [stream.buffer.getvalue().decode(errors="replace") for stream in (out, err)]
    return {
        "arguments": [repr(argument)[:80] for argument in arguments],
        "code": code,
        "escaped": escaped,
        "out": texts[0],
        "err": texts[1],
    }


def main(command: str, folder: Path) -> None:
    """Run all lines of a command in a folder that `make_folder` filled, and print what came of them."""

    def stop(*_: object) -> None:
        raise TookTooLongError(f"{SECONDS} s")

    signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.chdir(folder)
    tempfile.tempdir = str(folder)
    everything = list(lines(command))
    forbid(folder)
    for number, arguments in enumerate(everything):
        print(f"{number}/{len(everything)} {[word[:60] for word in arguments]!a}", file=sys.stderr)
        result = run(command.split()[0], [word.replace("{out}", f"out{number}") for word in arguments])
        print(json.dumps(result), flush=True)
        for path in folder.glob("out*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    os._exit(0)  # what a line may have left running is not waited for


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]).resolve())
