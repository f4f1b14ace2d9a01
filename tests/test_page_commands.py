"""Every command that a page prints: read by the command's own parser, and run, made small, where that can be."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from typer.testing import CliRunner

from refine_env.cli import app as refine_env_app
from tests.test_docs import PAGES, ROOT, blocks, without_blocks

# Not ours: nothing is checked but the extras that are installed.
FOREIGN = ("apt", "build", "dask", "hf", "pip", "pytest", "sphinx", "ulimit", "venv")
# Read, and not run, with the reason. What stands here is the beginning of a command.
ONLY_READ = {
    "agents.benchmark": "minutes of an idle machine; tests/agents/test_benchmark.py runs it small",
    "refine-env decoder": "writes into a cache's manifest; tests/trajectories/test_denoising.py runs it",
    "agents.evaluate --study assumptions": "minutes of generation; tests/agents/studies/test_assumptions.py",
    "agents.evaluate --study sensitivity": "27 systems; tests/agents/studies/test_sensitivity.py runs eight",
    "agents.evaluate --study coverage": "minutes; tests/agents/test_radio_maps.py runs a small one",
    "agents.evaluate --study sequential": "20 minutes of generation; tests/agents/studies/test_sequential.py",
    "refine-env generate diffusers --model stable-diffusion-v1-5": "gigabytes of weights; see test_sd15.py",
    "refine-env generate diffusers --model emoji --reuse-ratio": "prompts in pairs; tests/trajectories/test_reuse.py",
    "refine-env generate diffusers …": "a Dask cluster; tests/trajectories/test_workers.py has a local one",
    "refine-env verify sd15": "what the command before it would have made",
    "tests": "what runs this test",
    "tests.coding.golden": "writes the golden files anew",
    "tests.transport.hostile": "half a minute; tests/transport/test_transport.py plays some of it",
    "train.diffusion.assess": "writes into the bundled model's folder; tests/train/diffusion runs it elsewhere",
    "train.diffusion.gallery": "needs the font; tests/train/diffusion/test_gallery.py writes one",
    "train.ldm": "hours; tests/train/diffusion/test_ldm.py trains a small one",
    "train.rl.out_of_the_box": "an hour; tests/train/rl/test_out_of_the_box.py runs a small one",
    "train.diffusion.scene_sheet": "compiles the kernels; tests/train/diffusion/test_scenes.py draws one",
    "train.diffusion.reuse": "twenty minutes of generation; tests/train/diffusion/test_reuse.py runs a small one",
    "refine-env generate diffusers --model radiomap": "a minute; see tests/trajectories/test_conditions.py",
    "train.diffusion.radiomap.assess": "writes into the bundled model's folder; see test_radiomap.py",
    "train.diffusion.radiomap.experiments": "hours; tests/train/diffusion/test_radiomap_experiments.py",
    "train.diffusion.radiomap.scene_file": "compiles the kernels; see test_radiomap.py",
    "train.radiomap": "hours; tests/train/diffusion/test_radiomap.py trains a small one",
    "train.rl.search": "hours; tests/train/rl/test_search.py runs a small one",
    "train.rl.study": "an hour; tests/train/rl/test_study.py runs a small one",
}
# What makes a command small, after its own words, the last of which counts; of the longest beginning that fits.
SMALL = {
    "agents.distortion": "--trajectories 2 --no-images",
    "agents.evaluate": "--episodes 2 --snr-db 12",
    "agents.evaluate --study": "--episodes 2 --snr-db 12 --deadline 4",
    "agents.evaluate --study reuse": "--episodes 2 --snr-db 12 --deadline 4 --reuse-ratios 0.94 --target-mse 0.5",
    "agents.evaluate --images": "--episodes 2 --snr-db 12 --image-episodes 1 --agents persistent-q3",
    "agents.figures": "",
    "agents.leaderboard": "--tasks paper-6dB --episodes 2",
    "agents.record": "--deadline 3 --slot 2 --decoder none",
    "agents.report": "",
    "agents.send": "",
    "refine-env generate diffusers --model emoji": "--num-prompts 2 --num-train 1 --num-steps 2 --batch-size 2",
    "refine-env generate gaussian": "--num-trajectories 4 --latent-shape 4,4,4",
    "refine-env info": "",
    "refine-env midpoints": "",
    "refine-env verify": "",
    "refine_env.receive": "--port 0",
    "train.rl.export_minari": "--episodes 2 --out datasets",
    "train.ppo": (
        "--total-steps 256 --num-envs 8 --rollout-steps 16 --batch-size 64 --epochs 1 --eval-every 0 "
        "--eval-episodes 2 --test-episodes 2 --rivals persistent-q3 --no-tensorboard"
    ),
}
PLACEHOLDERS = {"…": "", "DIR": "folder", "FILE": "file", "FOLDER": "folder", "N": "1"}


class Command(NamedTuple):
    """A command of a page: ``refine-env`` or a module of ours with its words, or a foreign program."""

    place: str
    program: str
    words: list[str]

    @property
    def text(self) -> str:
        return " ".join([self.program, *self.words])

    def longest_beginning_among(self, beginnings: Any) -> str | None:
        """Options may stand anywhere, other words in order."""
        fitting = []
        for beginning in beginnings:
            program, *words = beginning.split()
            plain = [word for word in words if not word.startswith("--")]
            named = {word for word in words if word.startswith("--")}
            if program == self.program and named <= set(self.words):
                rest = iter(self.words)
                if all(any(word.startswith(wanted) for word in rest) for wanted in plain):
                    fitting.append(beginning)
        return max(fitting, key=len, default=None)


def commands(page: Path) -> list[Command]:
    """Those of the page's shell blocks, in order."""
    found = []
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language not in ("sh", "bash", "console", "shell"):
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            words: list[str] = []
            for word in [*lexer, ";"]:
                if not set(word) <= set("();<>|&"):
                    words.append(word)
                elif words:
                    found.append(_command(f"{page.name}:{block.line}", words))
                    words = []
    return found


def _command(place: str, words: list[str]) -> Command:
    while "=" in words[0]:
        words = words[1:]  # a variable of the environment
    program, *rest = (words[0].removeprefix(".venv/bin/"), *words[1:])
    if program in ("python", "python3") and rest[0] == "-m":
        program, *rest = rest[1:]
    return Command(place, program, rest)


def spoken(page: Path) -> Iterator[Command]:
    """Commands in the text, placeholders filled in."""
    for text in re.findall(r"(?<!`)`([^`]+)`(?!`)", without_blocks(page.read_text(encoding="utf-8"))):
        words = [PLACEHOLDERS.get(word, word) for word in text.split()]
        if words[:2] == ["python", "-m"] and len(words) > 2:
            yield _command(page.name, words)


def app_of(program: str) -> typer.Typer:
    """As its ``__main__`` makes it."""
    if program == "refine-env":
        return refine_env_app
    app = typer.Typer()
    app.command()(importlib.import_module(program).main)
    return app


def leaves(app: typer.Typer) -> Iterator[Any]:
    yield from app.registered_commands
    for group in app.registered_groups:
        assert group.typer_instance is not None
        yield from leaves(group.typer_instance)


def read(command: Command) -> None:
    """Have the command's own parser read the words; nothing is run."""
    if command.program.split(".")[0] == "tests":
        assert importlib.util.find_spec(command.program) is not None, command
        return
    app, done = app_of(command.program), []
    with pytest.MonkeyPatch.context() as patch:
        for leaf in leaves(app):
            stub = functools.wraps(leaf.callback)(lambda **values: done.append(values))
            patch.setattr(leaf, "callback", stub)
        words = [word for word in command.words if word != "…"]
        result = CliRunner().invoke(app, words)
    missing = "Missing option" in result.output and "…" in command.words
    assert result.exit_code == 0 or missing, f"{command.place}: {command.text}\n{result.output}"
    assert len(done) == 1 or missing or "--help" in words


class Runner:
    """Runs the commands of a page, one after the other, in one folder."""

    def __init__(self) -> None:
        self.device: subprocess.Popen[str] | None = None

    def run(self, command: Command, more: list[str]) -> None:
        if command.program == "refine_env.receive":
            self.device = subprocess.Popen(
                [sys.executable, "-m", command.program, *command.words, *more], stdout=subprocess.PIPE, text=True
            )
            assert self.device.stdout is not None
            self.port = self.device.stdout.readline().strip().rpartition(":")[2]
            return
        if command.program == "agents.send":
            more = [*more, "--port", self.port]
        result = CliRunner().invoke(app_of(command.program), [*command.words, *more], catch_exceptions=False)
        if result.exit_code == 4:
            pytest.skip(result.output.strip().splitlines()[-1])
        assert result.exit_code == 0, f"{command.place}: {command.text}\n{result.output}"

    def close(self) -> None:
        if self.device is not None:
            with self.device:
                assert self.device.wait(60.0) == 0


WITH_COMMANDS = [page for page in PAGES if commands(page)]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.name)
def test_commands_are_read(page: Path) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for command in commands(page):
        if command.program in FOREIGN:
            for names in re.findall(r"\[([\w,-]+)\]", command.text) if command.program == "pip" else ():
                assert set(names.split(",")) <= set(extras), command
        else:
            read(command)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_the_text_are_read(page: Path) -> None:
    for command in spoken(page):
        if command.program not in FOREIGN:
            read(command)


def test_options_in_the_text_are_some_command_s() -> None:
    programs = {command.program for page in PAGES for command in [*commands(page), *spoken(page)]} - set(FOREIGN)
    known = {"--help"}
    for program in programs:
        if program.split(".")[0] == "tests":
            spec = importlib.util.find_spec(program)
            assert spec is not None
            assert spec.origin is not None
            for file in (Path(spec.origin), ROOT / "tests" / "conftest.py"):  # whose options are those of pytest here
                known |= set(re.findall(r'"(--[a-z-]+)"', file.read_text(encoding="utf-8")))
        else:
            for leaf in leaves(app_of(program)):
                app = typer.Typer()
                app.command()(leaf.callback)
                for parameter in typer.main.get_command(app).params:
                    known |= {*parameter.opts, *parameter.secondary_opts}
    for page in PAGES:
        for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", without_blocks(page.read_text(encoding="utf-8"))):
            if not code.startswith(FOREIGN):
                assert set(re.findall(r"(?<!\S)--[a-z][\w-]*", code)) <= known, f"{page.name}: {code}"


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=lambda page: page.name)
def test_commands_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder that has of a clone what the commands take from it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs" / "figures").mkdir(parents=True)
    (tmp_path / "cached_trajectories").mkdir()
    shutil.copy(ROOT / "cached_trajectories" / "default.prompts.txt", "cached_trajectories")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))  # which train.rl.export_minari sets
    runner = Runner()
    for command in commands(page):
        if command.program in FOREIGN or command.longest_beginning_among(ONLY_READ):
            continue
        small = command.longest_beginning_among(SMALL)
        assert small is not None, f"{command.place}: {command.text}: name it in SMALL, or with a reason in ONLY_READ"
        runner.run(command, SMALL[small].split())
    runner.close()


def test_what_is_named_here_is_printed_somewhere() -> None:
    printed = [command for page in PAGES for command in commands(page)]
    for table in (ONLY_READ, SMALL):
        used = {command.longest_beginning_among(table) for command in printed}
        assert set(table) <= used


class TestTheChecks:
    """The checks themselves: each is seen to fail."""

    def page(self, folder: Path, text: str) -> Path:
        path = folder / "page.md"
        path.write_text(f"```sh\n{text}\n```\n")
        return path

    def test_how_a_line_is_taken_apart(self, tmp_path: Path) -> None:
        text = (
            "A=1 .venv/bin/python -m a.b --x 'y z' \\\n --w # so\n(ulimit -d 7; refine-env info) && pip install 'p[q]'"
        )
        assert [(command.program, command.words) for command in commands(self.page(tmp_path, text))] == [
            ("a.b", ["--x", "y z", "--w"]),
            ("ulimit", ["-d", "7"]),
            ("refine-env", ["info"]),
            ("pip", ["install", "p[q]"]),
        ]

    @pytest.mark.parametrize(
        "text",
        [
            "python -m agents.evaluate --coder closed_loop",
            "python -m agents.evaluate --episodes many",
            "python -m agents.report results more",
            "refine-env generate gaussian --out a --bogus",
            "refine-env generate gaussian",
            "refine-env nothing",
        ],
    )
    def test_an_option_that_is_none(self, tmp_path: Path, text: str) -> None:
        (command,) = commands(self.page(tmp_path, text))
        with pytest.raises(AssertionError, match=re.escape(text.split(" -m ")[-1])):
            read(command)

    def test_commands_in_the_text(self, tmp_path: Path) -> None:
        path = tmp_path / "page.md"
        path.write_text("```sh\na\n```\nWith `python -m\na.b --x N` or `python -m` and ``b`` more.\n")
        assert [(command.program, command.words) for command in spoken(path)] == [("a.b", ["--x", "1"])]

    def test_the_longest_beginning(self) -> None:
        command = Command("", "agents.evaluate", ["--out", "x", "--study", "ladder"])
        assert command.longest_beginning_among(SMALL) == "agents.evaluate --study"
        assert command.longest_beginning_among(ONLY_READ) is None
        assert Command("", "refine-env", ["verify", "sd15"]).longest_beginning_among(ONLY_READ) is not None
        assert Command("", "refine-env", ["verify", "mine"]).longest_beginning_among(ONLY_READ) is None
