"""A sweep over every option of every command: whatever is given ends in 0, 2, 3 or 4, and never in a traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from refine_env.commands import LARGEST_INTEGER, command, parse_list, print_table, run
from refine_env.errors import ConfigurationError
from tests import command_lines
from tests.command_lines import BASE, ENDS, ROOT, commands, lines, make_folder, modules

COMMANDS = [name for module in modules() if module.split(".")[0] != "train" for name in commands(module)]
TRAINING = [module for module in modules() if module.split(".")[0] == "train"]
NEEDS = {"agents.record": "PIL", "refine_env.cli generate diffusers": "diffusers", "train.ldm": "diffusers"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("command-lines")
    make_folder(path)
    return path


def test_every_command_is_swept() -> None:
    assert {*COMMANDS, *TRAINING} == set(BASE)
    assert len(modules()) >= 15


@pytest.mark.skipif(sys.platform == "win32", reason="needs signals and limits of memory")
@pytest.mark.parametrize("name", [*COMMANDS, *TRAINING])
def test_no_command_line_ends_in_a_traceback(name: str, folder: Path, tmp_path: Path) -> None:
    if name in TRAINING:
        for module in (
            "torch",
            "stable_baselines3",
            "sb3_contrib",
            "minari",
            "h5py",
            "optuna",
            "diffusers",
            "fontTools",
        ):
            pytest.importorskip(module, reason="an extra for the trainings is not installed")
    elif name in NEEDS:
        pytest.importorskip(NEEDS[name])
    own = shutil.copytree(folder, tmp_path / "own")
    done = subprocess.run(
        [sys.executable, "-m", "tests.command_lines", name, str(own)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
        timeout=1800,  # of a line that waits for ever
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(list(lines(name)))
    first = results[0]
    assert (first["code"], first["escaped"]) == (ENDS.get(name, 0), None), first  # else the others would say nothing
    assert "Usage" in results[-1]["out"]
    assert [wrong for wrong in results if not is_well(wrong)] == []


def is_well(result: dict[str, Any]) -> bool:
    """Whether a command line was done, or refused in one sentence that any terminal can show."""
    if result["escaped"] is not None or result["code"] not in (0, 2, 3, 4):
        return False
    if result["code"] == 0:
        return True
    sentences = [line for line in result["err"].split("\n") if "error: " in line]
    return (
        len(sentences) == 1
        and sentences[0] == result["err"].rstrip("\n").split("\n")[-1]
        and len(sentences[0]) < 2000
        and sentences[0].rpartition("error: ")[2].isprintable()
        and "\x1b" not in result["err"]
    )


def test_what_does_not_end_well_is_seen() -> None:
    well = {"escaped": None, "code": 2, "err": "error: `x` must be a number, got 'y'. Give one.\n"}
    assert is_well(well)
    assert not is_well({**well, "escaped": "KeyError: 'x'"})
    assert not is_well({**well, "code": 1})
    assert not is_well({**well, "err": ""})
    assert not is_well({**well, "err": "error: \x1b[31mred\n"})
    assert not is_well({**well, "err": well["err"] + "Traceback"})
    assert not is_well({**well, "err": "error: " + "x" * 5000})


def test_the_sweep_cannot_write_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    code = (
        "import os, pathlib; from tests.command_lines import forbid\n"
        f"outside, inside = pathlib.Path({str(tmp_path)!r}), pathlib.Path({str(tmp_path / 'inside')!r})\n"
        "(outside / 'there').write_text('')\n"
        "forbid(inside); (inside / 'file').write_text(''); os.remove(inside / 'file')\n"
        "for act in (lambda: (outside / 'file').write_text(''), lambda: (outside / 'there').unlink(),\n"
        "            lambda: (outside / 'folder').mkdir(), lambda: inside.rename(outside / 'other')):\n"
        "    try: act()\n"
        "    except PermissionError: print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "refused\n" * 4


# --- What the commands share --------------------------------------------------------------------------------------


def ends(function: Callable[..., None], *arguments: str) -> int:
    with pytest.raises(SystemExit, match=r"^\d+$") as end:
        run(function, arguments)
    assert isinstance(end.value.code, int)
    return end.value.code


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (ConfigurationError("`x` must be\n1, got \x1b[31m\udcff. Do."), 2, r"`x` must be 1, got \x1b[31m\udcff. Do."),
        (MemoryError(), 2, "The arguments must fit in memory, and do not. Ask for less at once."),
        (
            IsADirectoryError(21, "Is a directory", "temporary", None, "out"),
            3,
            "`out` must be readable or writable here, and is not (Is a directory). Choose another.",
        ),
        (FileNotFoundError("A sentence."), 3, "A sentence."),
        (KeyboardInterrupt(), 130, "interrupted."),
    ],
)
def test_errors_become_sentences(
    raised: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @command
    def fail() -> None:
        raise raised

    assert ends(fail) == code
    assert capsys.readouterr().err == f"error: {message}\n"
    with pytest.raises(typer.Exit, match=str(code)):
        fail()


def test_a_defect_is_not_hidden() -> None:
    @command
    def fail() -> None:
        raise KeyError("a defect")

    with pytest.raises(KeyError, match="a defect"):
        run(fail, [])


def test_a_long_sentence_keeps_its_ends(capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def fail() -> None:
        raise ConfigurationError(f"`x` must be short, got {'y' * 100_000}. Cut it.")

    assert ends(fail) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: `x` must be short, got yyy")
    assert message.endswith("yyy. Cut it.\n")
    assert len(message) < 700


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e999"])
def test_numbers_are_finite(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def take(some_number: float = 0.0, count: int = 0) -> None:
        print(some_number, count)

    assert ends(take, f"--some-number={value}") == 2
    assert "`--some-number` must be a finite number" in capsys.readouterr().err
    assert ends(take, f"--count={LARGEST_INTEGER + 1}") == 2
    assert "`--count` must be at most 2**53 in size" in capsys.readouterr().err
    assert ends(take, f"--count={LARGEST_INTEGER}", "--some-number=1e308") == 0


def test_bytes_that_are_no_text_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def take(text: str = "") -> None:
        print(text)

    assert ends(take, "--text", "bad\udce9") == 2
    assert r"`arguments` must be text that UTF-8 can hold, got 'bad\udce9'" in capsys.readouterr().err


def test_lists() -> None:
    assert parse_list("--snr-db", " 0, 6.5 ", float, advice="") == (0.0, 6.5)
    assert parse_list("--shape", "4,4", int, advice="", valid=lambda shape: True) == (4, 4)
    for text in ("", " ", ",", "1,", "1,,2", "a", "1,1", "9" * 5000):
        with pytest.raises(
            ConfigurationError, match="`--snr-db` must be a comma-separated list without repetition, got"
        ):
            parse_list("--snr-db", text, int, advice="For example: --snr-db 0,3")
    with pytest.raises(ConfigurationError, match="`--sizes` must be ascending, got '2,1'. Sort them."):
        parse_list("--sizes", "2,1", int, what="ascending", advice="Sort them.", valid=lambda v: v == tuple(sorted(v)))


@pytest.mark.parametrize("package", ["refine_env", "agents", "train"])
def test_lists_are_parsed_in_one_place(package: str) -> None:
    files = {path.name for path in (ROOT / package).rglob("*.py") if '.split(",' in path.read_text(encoding="utf-8")}
    assert files <= {"commands.py"}


def test_a_command_without_a_line_fails_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "another.py").write_text('if __name__ == "__main__":\n    pass\n')
    monkeypatch.setattr(command_lines, "ROOT", tmp_path)
    assert modules() == ["agents.another"]


def test_a_table_breaks_words_and_never_numbers(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "26")
    lines = [["a policy with a long name", "1.234567e-05"], None, ["another", "[bold]2[/bold]"]]
    for least_width, broken in ((0, True), (60, False)):
        print_table(
            {"policy": "left", "latent MSE": "right"}, lines, title="errors", notes=["below"], least_width=least_width
        )
        shown = capsys.readouterr().out
        assert ("a policy with a long name" not in shown) == broken
        assert "1.234567e-05" in shown
        assert "bold" not in shown
        assert shown.index("errors") < shown.index("latent MSE") < shown.index("another") < shown.index("below")
