"""Read prompts from text files and tables, DiffusionDB's among them, and draw the same sample of them every time."""

from __future__ import annotations

import csv
import hashlib
import heapq
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

from refine_env._validation import check_finite, check_integer
from refine_env.errors import ConfigurationError, import_extra
from refine_env.trajectories.files import hash_file

__all__ = ["PromptSelection", "read_prompts"]

PROMPT_COLUMNS = ("prompt", "p")
"""Names of the prompts' column by default: DiffusionDB's tables call it ``prompt``, its JSON parts ``p``."""

SCORE_COLUMNS = ("prompt_nsfw", "image_nsfw")
"""DiffusionDB's scores of a row, 0 … 1; an ``image_nsfw`` of 2 is an image that was blurred at its origin."""

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_TABLES = (*_SEPARATORS, ".parquet", ".json")
_ROWS_AT_ONCE = 65_536

_Row = tuple[str, float]
"""A prompt and the greatest of its scores."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptSelection(Sequence[str]):
    """Prompts with where they come from; a sequence of texts.

    Args:
        prompts: one per sample.
        source: what chose them, for the manifest: the file's name and SHA-256, the column, and the sample's
            size and seed.
    """

    prompts: tuple[str, ...]
    source: Mapping[str, Any]

    def __len__(self) -> int:
        return len(self.prompts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        return self.prompts[index]


def read_prompts(
    path: str | os.PathLike[str],
    *,
    column: str | None = None,
    num_prompts: int | None = None,
    seed: int = 0,
    max_nsfw: float | None = None,
    unique: bool | None = None,
) -> PromptSelection:
    """Read prompts from a file: UTF-8 text with one per line, or a table `.csv`, `.tsv`, `.parquet` or `.json`.

    Tables have a header; of JSON, a list of objects is understood, and DiffusionDB's parts, an object of
    objects. Blank prompts are left out, and white space around one. A table may be larger than the memory,
    unless it is JSON or all of its prompts are asked for.

    A sample of ``num_prompts`` holds the prompts with the least SHA-256 of seed and prompt, in that order: it
    does not depend on the rows' order, nor on a library's random generator, and is in random order itself.

    Args:
        path: the file; what does not end in one of the tables' suffixes is text.
        column: the table's column; default `prompt` or `p` in any case, or the only one.
        num_prompts: size of the sample; default all, in the file's order.
        seed: of the sample.
        max_nsfw: leave out rows of which one of DiffusionDB's scores (`prompt_nsfw`, `image_nsfw`) is greater,
            or missing. Default: none is left out.
        unique: whether a prompt that comes again is left out; default yes in a table, whose rows may be
            several images of a prompt, and no in a text, which is taken as it is.

    Raises:
        ConfigurationError: if the file cannot be read, has no such column or no such scores, or not enough
            prompts; or an argument is not valid.
        MissingExtraError: if pyarrow is not installed, for `.parquet`.
    """
    file = Path(path)
    is_table = file.suffix.lower() in _TABLES
    unique = is_table if unique is None else unique
    seed = check_integer("prompt_seed", seed, 0, advice="Give a seed such as 0.")
    if num_prompts is not None:
        num_prompts = check_integer("num_prompts", num_prompts, 1, advice="Ask for at least one prompt.")
    if max_nsfw is not None:
        max_nsfw = check_finite("max_nsfw", max_nsfw, advice="The scores are within 0 … 1; give for instance 0.5.")
    if not is_table and (column is not None or max_nsfw is not None):
        raise ConfigurationError(
            f"`prompts` must be a table ({', '.join(_TABLES)}) to have columns and scores, got {str(file)!r}. "
            "Leave out the options of tables, or convert the file."
        )
    try:
        column, rows = _read_table(file, column, max_nsfw is not None) if is_table else (None, _read_text(file))
        texts = (text for text, score in rows if max_nsfw is None or score <= max_nsfw)
        prompts, count = _choose(texts, num_prompts, seed, unique)
        sha256 = hash_file(file)
    except (OSError, ValueError, RecursionError, csv.Error) as error:  # of text, JSON, or a number in it
        if isinstance(error, ConfigurationError):
            raise
        kind = "table" if is_table else "UTF-8 text file"
        raise ConfigurationError(
            f"`prompts` must be a readable {kind}, got {str(file)!r} ({_reason(error)}). Check the path and the file."
        ) from None
    if not prompts:
        raise ConfigurationError(
            f"`prompts` must hold at least one prompt, got {str(file)!r} without any. Write one per line, or "
            "name another column or a greater score."
        )
    if num_prompts is not None and len(prompts) < num_prompts:
        raise ConfigurationError(
            f"`num_prompts` must be at most the {count} prompts that {file.name} offers, got {num_prompts}. Ask for "
            "fewer."
        )
    source = {
        "file": file.name,
        "sha256": sha256,
        "column": column,
        "unique": unique,
        "max_nsfw": max_nsfw,
        "num_prompts": num_prompts,
        "seed": None if num_prompts is None else seed,
    }
    return PromptSelection(prompts=prompts, source=source)


def _choose(texts: Iterator[str], num_prompts: int | None, seed: int, unique: bool) -> tuple[tuple[str, ...], int]:
    """Choose prompts; their number is less than ``num_prompts`` if the file offers fewer."""
    if num_prompts is None:
        everything = tuple(dict.fromkeys(texts) if unique else texts)
        return everything, len(everything)
    worst: list[tuple[int, str]] = []  # the sample so far, as a heap, the one to go next on top
    chosen: set[int] = set()
    repeats: Counter[str] = Counter()
    for text in texts:
        name = text
        if not unique:  # a prompt that comes again has another place in the order
            name = f"{text}\0{repeats[text]}"
            repeats[text] += 1
        key = -int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest())
        if key in chosen or (len(worst) == num_prompts and key <= worst[0][0]):
            continue  # one that was thrown out stays out: what is kept only gets better
        chosen.add(key)
        if len(worst) < num_prompts:
            heapq.heappush(worst, (key, text))
        else:
            chosen.remove(heapq.heapreplace(worst, (key, text))[0])
    return tuple(text for _, text in sorted(worst, reverse=True)), len(worst)


def _read_text(file: Path) -> Iterator[_Row]:
    with file.open(encoding="utf-8-sig") as lines:
        for line in lines:
            if text := line.strip():
                yield text, 0.0


def _read_table(file: Path, column: str | None, scored: bool) -> tuple[str, Iterator[_Row]]:
    """Return the column of the prompts, and the rows whose prompt is not blank."""
    names, read = _open_table(file)
    column = _find_column(file, names, column)
    scores = [name for name in SCORE_COLUMNS if name in names] if scored else []
    if scored and not scores:
        raise ConfigurationError(
            f"`max_nsfw` must be left out where a table has no scores, got {file.name} with the columns "
            f"{_listed(names)}. DiffusionDB's are {' and '.join(SCORE_COLUMNS)}."
        )

    def rows() -> Iterator[_Row]:
        for text, *values in read([column, *scores]):
            if isinstance(text, str) and (prompt := text.strip()):
                yield prompt, max(map(_score, values), default=0.0)

    return column, rows()


_Reader = Callable[[Sequence[str]], Iterator[Sequence[Any]]]


def _open_table(file: Path) -> tuple[list[str], _Reader]:
    """Return the names of the columns, and a function that reads given columns row by row."""
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        return _open_parquet(file)
    if suffix == ".json":
        return _open_json(file)

    def records() -> Iterator[dict[str, Any]]:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            yield from csv.DictReader(lines, delimiter=_SEPARATORS[suffix])

    with file.open(encoding="utf-8-sig", newline="") as lines:
        names = next(csv.reader(lines, delimiter=_SEPARATORS[suffix]), [])
    return names, lambda wanted: ([row.get(name) for name in wanted] for row in records())


def _open_parquet(file: Path) -> tuple[list[str], _Reader]:
    parquet = import_extra("pyarrow.parquet", "generate")
    arrow = import_extra("pyarrow", "generate")
    try:
        table = parquet.ParquetFile(file)
    except arrow.ArrowInvalid as error:
        raise OSError(str(error)) from None

    def read(wanted: Sequence[str]) -> Iterator[Sequence[Any]]:
        try:
            for batch in table.iter_batches(_ROWS_AT_ONCE, columns=list(wanted)):
                # By name: a file's columns come in its own order.
                yield from zip(*(batch.column(name).to_pylist() for name in wanted), strict=True)
        except arrow.ArrowInvalid as error:
            raise OSError(str(error)) from None

    return list(table.schema_arrow.names), read


def _open_json(file: Path) -> tuple[list[str], _Reader]:
    content = json.loads(file.read_text(encoding="utf-8-sig"))
    records = list(content.values()) if isinstance(content, dict) else content
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ConfigurationError(
            f"`prompts` must be a list or an object of objects where it is JSON, got {file.name} with something "
            "else. Convert it to a text file with one prompt per line."
        )
    names = list(dict.fromkeys(name for record in records for name in record))
    return names, lambda wanted: ([record.get(name) for name in wanted] for record in records)


def _find_column(file: Path, names: list[str], column: str | None) -> str:
    if column is None:
        lower = {name.lower(): name for name in reversed(names)}
        found = [lower[name] for name in PROMPT_COLUMNS if name in lower] or (names if len(names) == 1 else [])
        if found:
            return found[0]
    elif column in names:
        return column
    wanted = " or ".join(map(repr, PROMPT_COLUMNS)) if column is None else repr(column)
    raise ConfigurationError(
        f"`prompt_column` must be one of {file.name}'s columns, got {wanted} among {_listed(names)}. Name the "
        "column that holds the prompts."
    )


def _score(value: Any) -> float:
    """Read a score as a number, a missing one as infinity, so that no limit admits its row."""
    try:
        score = float(value)
    except (TypeError, ValueError):
        return float("inf")
    return score if score == score else float("inf")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:20])) + (", …" if len(names) > 20 else "") if names else "none"


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeError):
        return "not UTF-8 text"
    return getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
