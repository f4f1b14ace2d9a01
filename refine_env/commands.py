"""What all command lines have in common: an error is one sentence on stderr, and an exit code that says its kind.

2: an argument or an input file is not valid. 3: a cache, a file or a connection cannot be used. 4: an optional
dependency or a model's weights are missing. 130: interrupted. A warning is one sentence, too.
"""

from __future__ import annotations

import functools
import inspect
import io
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, Literal, NoReturn, ParamSpec, TypeVar

import typer
from tqdm import tqdm

from refine_env._compiled import tell_of_compiling
from refine_env._validation import check_text
from refine_env.errors import (
    BitstreamError,
    CacheError,
    ConfigurationError,
    MissingExtraError,
    ModelNotFoundError,
    TransportError,
    printable,
)

__all__ = [
    "LARGEST_INTEGER",
    "CacheOption",
    "SnrOption",
    "SplitOption",
    "command",
    "parse_list",
    "print_table",
    "run",
    "set_parameters",
]

LARGEST_INTEGER = 2**53
"""Up to here every whole number is exact in JSON, and so in what the commands write."""

# Options that several commands have.
SnrOption = Annotated[float, typer.Option("--snr-db", help="Mean SNR per subchannel in dB.")]
CacheOption = Annotated[str, typer.Option(help="Name or folder of a trajectory cache.")]
SplitOption = Annotated[str, typer.Option(help="Trajectories: train, test or all.")]

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
_Item = TypeVar("_Item")

_MOST_CHARACTERS, _FIRST_CHARACTERS = 600, 400  # of a sentence, before escaping
# Some versions of typer bring a copy of click of their own: this is UsageError of the one in use.
_UsageError: Any = typer.BadParameter.__base__


def command(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Make a function a command: wrong numbers are refused, and every error ends in ``typer.Exit``.

    Args:
        function: as typer wants it.

    Returns:
        The same with this around it. Numbers among its keyword arguments must be finite, and whole ones at most
        2**53 in size.
    """

    @functools.wraps(function)
    def guarded(*arguments: _Arguments.args, **options: _Arguments.kwargs) -> _Result:
        with _exit_codes():
            for name, value in options.items():
                _check_number("--" + name.replace("_", "-"), value)
            return function(*arguments, **options)

    return guarded


def run(program: typer.Typer | Callable[..., Any], arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command line and exit.

    Args:
        program: an application, or the function of a single command.
        arguments: default ``sys.argv[1:]``.
    """
    if isinstance(program, typer.Typer):
        app = program
    else:
        app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
        app.command()(program)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every terminal has every letter
    code: int | None
    try:
        with _exit_codes():
            for word in sys.argv[1:] if arguments is None else arguments:
                check_text("arguments", word)
            # A single command is called what it was called with; typer has a placeholder for its name.
            name = app.info.name if isinstance(app.info.name, str) else None
            code = app(args=None if arguments is None else list(arguments), prog_name=name, standalone_mode=False)
    except typer.Exit as end:
        code = end.exit_code
    sys.exit(code or 0)


def set_parameters(function: Callable[..., Any], parameters: Iterable[inspect.Parameter]) -> None:
    """Give a function that takes ``**options`` the signature that typer reads.

    Args:
        function: the function.
        parameters: its options in their order, with the annotations and defaults that typer wants.
    """
    options = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    function.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    function.__annotations__ = {option.name: option.annotation for option in options}


def parse_list(
    name: str,
    text: str,
    kind: Callable[[str], _Item],
    *,
    what: str = "a comma-separated list without repetition",
    advice: str,
    valid: Callable[[tuple[_Item, ...]], bool] = lambda items: len(set(items)) == len(items),
) -> tuple[_Item, ...]:
    """The items of an option that is a list with commas between.

    Args:
        name: the option.
        text: the text that was given; it holds at least one item, and no empty one.
        kind: makes an item of its text; ``ValueError`` says that it cannot.
        what: for the message, what the option must be.
        advice: for the message, what to give instead.
        valid: whether the items, at least one, may stand together; by default none may occur twice.

    Raises:
        ConfigurationError: if the text is no such list.
    """
    words = [word.strip() for word in text.split(",")]
    try:
        items = tuple(kind(word) for word in words) if all(words) else ()
    except ValueError:
        items = ()
    if not items or not valid(items):
        raise ConfigurationError(f"`{name}` must be {what}, got {text!r}. {advice}")
    return items


def print_table(
    columns: Mapping[str, Literal["left", "right"]],
    lines: Iterable[Sequence[str] | None],
    *,
    title: str,
    notes: Iterable[str] = (),
    padding: tuple[int, ...] = (0, 1),
    least_width: int = 0,
) -> None:
    """Print a table on the terminal.

    Args:
        columns: the headings, each with the side at which its cells stand. Numbers, which stand at the right, are
            never broken into several lines.
        lines: the cells of every line, in Rich's markup; None begins a new section.
        title: stands above the table.
        notes: remarks below the table.
        padding: blanks around a cell, as in CSS: top and bottom, then left and right; or all four.
        least_width: characters of a line that are used even where the terminal is narrower, or where there is none.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    view = Table(title=title, box=box.SIMPLE_HEAD, padding=padding)  # type: ignore[arg-type]
    for heading, side in columns.items():
        view.add_column(heading, justify=side, no_wrap=side == "right")
    for cells in lines:
        if cells is None:
            view.add_section()
        else:
            view.add_row(*cells)
    console = Console()
    console.width = max(console.width, least_width)
    console.print(view)
    for note in notes:
        console.print(note, style="dim")


def _check_number(name: str, value: object) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigurationError(f"`{name}` must be a finite number, got {value!r}. Give another.")
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise ConfigurationError(f"`{name}` must be at most 2**53 in size, got {value!r:.40}. Give a smaller number.")


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Turn every error that is the user's, or the machine's, into one sentence on stderr and ``typer.Exit``.

    Where something has to be compiled, which happens once in an installation, a line on stderr says so.
    """
    try:
        with warnings.catch_warnings(), tell_of_compiling(_say_compiling):
            warnings.showwarning = _show_warning
            yield
    except _UsageError as error:
        message = error.format_message()  # empty where the help was shown instead
        raise _exit(message and f"{message.rstrip('.')}. See --help.", error.exit_code) from None
    except (MissingExtraError, ModelNotFoundError) as error:
        raise _exit(str(error), 4) from None
    except ConfigurationError as error:
        raise _exit(str(error), 2) from None
    except MemoryError:
        raise _exit("The arguments must fit in memory, and do not. Ask for less at once.", 2) from None
    except (CacheError, TransportError, BitstreamError) as error:
        raise _exit(str(error), 3) from None
    except BrokenPipeError:
        raise  # nobody reads on: typer ends silently
    except OSError as error:
        if error.errno is None:  # raised with a sentence
            raise _exit(str(error), 3) from None
        path = error.filename2 or error.filename
        name = "A file" if path is None else f"`{path}`"
        sentence = f"{name} must be readable or writable here, and is not ({error.strerror}). Choose another."
        raise _exit(sentence, 3) from None
    except KeyboardInterrupt:
        raise _exit("interrupted.", 130) from None


def _say_compiling() -> None:
    tqdm.write("compiling, once, about 10 s", file=sys.stderr)  # above a progress bar, if there is one


def _exit(sentence: str, code: int) -> typer.Exit:
    if sentence:
        _say("error", sentence)
    return typer.Exit(code)


def _say(kind: str, sentence: str) -> None:
    """Write a sentence on stderr, cut in the middle, where the value stands, if it is too long."""
    line = " ".join(sentence.split())
    if len(line) > _MOST_CHARACTERS:
        line = f"{line[:_FIRST_CHARACTERS]} … {line[_FIRST_CHARACTERS - _MOST_CHARACTERS :]}"
    with tqdm.external_write_mode(file=sys.stderr):  # above a progress bar, if there is one
        typer.echo(f"{kind}: {printable(line, 6 * len(line))}", err=True)


def _show_warning(message: Warning | str, *place: object, **more: object) -> None:
    """Without the line of code that it came from, which is none of the caller's."""
    _say("warning", str(message))
