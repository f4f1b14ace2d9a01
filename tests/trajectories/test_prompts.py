"""Prompts from text files and tables; DiffusionDB's columns; samples that are the same everywhere."""

from __future__ import annotations

import csv
import hashlib
import json
import random
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from refine_env import ConfigurationError, MissingExtraError
from refine_env.trajectories import PromptSelection, read_prompts

# The columns of DiffusionDB's metadata.parquet, in its order.
COLUMNS = (
    "image_name", "prompt", "part_id", "seed", "step", "cfg", "sampler", "width", "height", "user_name",
    "timestamp", "image_nsfw", "prompt_nsfw",
)  # fmt: skip
ROWS = [
    ("a small liquid sculpture", 0.08, 0.004),
    ("  portrait of a conquistador, 4 k, ", 0.07, 0.025),
    ("a small liquid sculpture", 0.2, 0.004),  # another image of it
    ("", 0.1, 0.1),
    ("something rude", 0.1, 0.9),
    ("something blurred", 2.0, 0.1),
    ('ein Bär, "quoted"\nand a second line', 0.3, 0.3),
    ("of unknown score", None, 0.1),
]
PROMPTS = (
    "a small liquid sculpture",
    "portrait of a conquistador, 4 k,",
    "something rude",
    "something blurred",
    'ein Bär, "quoted"\nand a second line',
    "of unknown score",
)


def record(prompt: str | None, image_nsfw: float | None, prompt_nsfw: float | None) -> dict[str, Any]:
    values = ("0.png", prompt, 1, 2026845913, 50, 7.0, 8, 512, 512, "c2f2", None, image_nsfw, prompt_nsfw)
    return dict(zip(COLUMNS, values, strict=True))


def write_csv(file: Path, records: Sequence[dict[str, Any]], delimiter: str = ",") -> Path:
    with file.open("w", encoding="utf-8", newline="") as handle:
        writer = csv.DictWriter(handle, list(records[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(records)
    return file


def write_parquet(file: Path, records: Sequence[dict[str, Any]]) -> Path:
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(list(records)), file, row_group_size=3)
    return file


def write_json(file: Path, records: Sequence[dict[str, Any]]) -> Path:
    file.write_text(json.dumps(list(records), ensure_ascii=False), encoding="utf-8")
    return file


TABLES: dict[str, Callable[[Path, Sequence[dict[str, Any]]], Path]] = {
    "metadata.csv": write_csv,
    "metadata.tsv": lambda file, records: write_csv(file, records, "\t"),
    "metadata.parquet": write_parquet,
    "metadata.json": write_json,
}


@pytest.fixture(params=TABLES)
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return TABLES[request.param](tmp_path / request.param, [record(*row) for row in ROWS])


def test_diffusiondb(table: Path) -> None:
    selection = read_prompts(table)
    assert isinstance(selection, PromptSelection)
    assert tuple(selection) == PROMPTS
    assert selection[1:3] == PROMPTS[1:3]
    assert selection.source == {
        "file": table.name,
        "sha256": hashlib.sha256(table.read_bytes()).hexdigest(),
        "column": "prompt",
        "unique": True,
        "max_nsfw": None,
        "num_prompts": None,
        "seed": None,
    }
    assert len(read_prompts(table, unique=False)) == len(PROMPTS) + 1


def test_scores(table: Path) -> None:
    """The greater of the two counts, and one that is missing is too great."""
    assert tuple(read_prompts(table, max_nsfw=0.5)) == (*PROMPTS[:2], PROMPTS[4])
    assert tuple(read_prompts(table, max_nsfw=0.1)) == PROMPTS[:2]
    assert tuple(read_prompts(table, max_nsfw=1.0)) == (*PROMPTS[:3], PROMPTS[4])
    with pytest.raises(ConfigurationError, match="`prompts` must hold at least one prompt, got .* without any"):
        read_prompts(table, max_nsfw=0.0)


def test_a_table_with_one_score(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", [{"prompt": "a", "prompt_nsfw": 0.9}, {"prompt": "b", "prompt_nsfw": 0.1}])
    assert tuple(read_prompts(file, max_nsfw=0.5)) == ("b",)
    other = write_csv(tmp_path / "b.csv", [{"prompt": "a", "x": 1}])
    with pytest.raises(ConfigurationError, match=r"`max_nsfw` must be left out .* the columns 'prompt', 'x'\. Diff"):
        read_prompts(other, max_nsfw=0.5)


def test_a_part_of_diffusiondb(tmp_path: Path) -> None:
    part = {
        "a.png": {"p": "geodesic landscape, 4 k, ", "se": 38753269, "c": 12.0, "st": 50, "sa": "k_lms"},
        "b.png": {"p": "geodesic landscape, 4 k, ", "se": 1, "c": 12.0, "st": 50, "sa": "k_lms"},
        "c.png": {"p": "ein Bär", "se": 1, "c": 12.0, "st": 50, "sa": "k_lms"},
    }
    (tmp_path / "part-000001.json").write_text(json.dumps(part))
    selection = read_prompts(tmp_path / "part-000001.json")
    assert tuple(selection) == ("geodesic landscape, 4 k,", "ein Bär")
    assert selection.source["column"] == "p"


def test_columns(tmp_path: Path) -> None:
    file = write_csv(tmp_path / "a.csv", [{"Prompt": "upper", "caption": "other"}])
    assert tuple(read_prompts(file)) == ("upper",)
    assert tuple(read_prompts(file, column="caption")) == ("other",)
    alone = write_csv(tmp_path / "b.csv", [{"caption": "alone"}])
    assert tuple(read_prompts(alone)) == ("alone",)
    both = write_csv(tmp_path / "c.csv", [{"p": "short", "prompt": "long"}])
    assert tuple(read_prompts(both)) == ("long",)
    with pytest.raises(ConfigurationError, match="one of a.csv's columns, got 'text' among 'Prompt', 'caption'"):
        read_prompts(file, column="text")
    two = write_csv(tmp_path / "d.csv", [{"x": "1", "y": "2"}])
    with pytest.raises(ConfigurationError, match="d.csv's columns, got 'prompt' or 'p' among 'x', 'y'"):
        read_prompts(two)


def test_text_is_taken_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\ufeffa cat\n\n ein Bär \r\na cat\n", encoding="utf-8")
    assert tuple(read_prompts(file)) == ("a cat", "ein Bär", "a cat")
    assert tuple(read_prompts(file, unique=True)) == ("a cat", "ein Bär")
    assert sorted(read_prompts(file, num_prompts=3)) == ["a cat", "a cat", "ein Bär"]
    for kwargs in ({"column": "prompt"}, {"max_nsfw": 0.5}):
        with pytest.raises(ConfigurationError, match=r"`prompts` must be a table \(.csv, .tsv, .parquet, .json\)"):
            read_prompts(file, **kwargs)


class TestSample:
    TEXTS = tuple(f"prompt number {number}" for number in range(300))

    def file(self, tmp_path: Path, texts: Sequence[str]) -> Path:
        return write_csv(tmp_path / "prompts.csv", [{"prompt": text} for text in texts])

    def test_is_the_least_hashes(self, tmp_path: Path) -> None:
        selection = read_prompts(self.file(tmp_path, self.TEXTS), num_prompts=20, seed=5)
        by_hash = sorted(self.TEXTS, key=lambda text: hashlib.sha256(f"5\0{text}".encode()).digest())
        assert list(selection) == by_hash[:20]
        assert (selection.source["num_prompts"], selection.source["seed"]) == (20, 5)

    def test_does_not_depend_on_order_or_repeats(self, tmp_path: Path) -> None:
        first = tuple(read_prompts(self.file(tmp_path, self.TEXTS), num_prompts=20))
        shuffled = list(self.TEXTS) * 3
        random.Random(0).shuffle(shuffled)
        assert tuple(read_prompts(self.file(tmp_path, shuffled), num_prompts=20)) == first
        assert len(set(first)) == 20

    def test_same_and_other(self, tmp_path: Path) -> None:
        file = self.file(tmp_path, self.TEXTS)
        samples = [tuple(read_prompts(file, num_prompts=20, seed=seed)) for seed in (0, 0, 1)]
        assert samples[0] == samples[1]
        assert len(set(samples[0]) & set(samples[2])) < 10

    def test_a_smaller_one_begins_a_greater_one(self, tmp_path: Path) -> None:
        file = self.file(tmp_path, self.TEXTS)
        assert read_prompts(file, num_prompts=40)[:20] == tuple(read_prompts(file, num_prompts=20))
        assert sorted(read_prompts(file, num_prompts=300)) == sorted(self.TEXTS)

    def test_is_one_of_the_table_not_of_its_beginning(self, tmp_path: Path) -> None:
        """Positions of 60 of 300: mean 149.5, standard error 10."""
        sample = read_prompts(self.file(tmp_path, self.TEXTS), num_prompts=60)
        positions = [self.TEXTS.index(text) for text in sample]
        assert abs(sum(positions) / 60 - 149.5) < 40
        assert positions != sorted(positions)

    def test_too_many(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigurationError, match="`num_prompts` must be at most the 300 prompts .*, got 301"):
            read_prompts(self.file(tmp_path, (*self.TEXTS, "prompt number 7")), num_prompts=301)

    def test_needs_no_more_memory_for_a_longer_table(self, tmp_path: Path) -> None:
        peaks = []
        for count in (20_000, 60_000):
            file = self.file(tmp_path, [f"prompt number {number} {'x' * 80}" for number in range(count)])
            tracemalloc.start()
            read_prompts(file, num_prompts=50)
            peaks.append(tracemalloc.get_traced_memory()[1])
            tracemalloc.stop()
        assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.txt", None, r"`prompts` must be a readable UTF-8 text file, got .*a.txt' \(No such file or directory\)"),
        ("a.csv", None, r"`prompts` must be a readable table, got .*a.csv' \(No such file"),
        ("a.txt", b"\xe9t\xe9\n", r"`prompts` must be a readable UTF-8 text file, got .* \(not UTF-8 text\)"),
        ("a.csv", b"prompt\n\xe9t\xe9\n", r"`prompts` must be a readable table, got .* \(not UTF-8 text\)"),
        ("a.txt", b"\n \n", "`prompts` must hold at least one prompt, got .*a.txt' without any"),
        ("a.csv", b"", "one of a.csv's columns, got 'prompt' or 'p' among none"),
        ("a.csv", b"prompt\n", "`prompts` must hold at least one prompt"),
        ("a.json", b"[1", r"`prompts` must be a readable table, got .*a.json' \(Expecting"),
        ("a.json", b'["a cat"]', "must be a list or an object of objects where it is JSON, got a.json"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes | None, match: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigurationError, match=match):
        read_prompts(tmp_path / name)


def test_damaged_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more PAR1")
    with pytest.raises(ConfigurationError, match=r"`prompts` must be a readable table, got .*a.parquet' \("):
        read_prompts(tmp_path / "a.parquet")
    whole = write_parquet(tmp_path / "b.parquet", [record(*row) for row in ROWS]).read_bytes()
    (tmp_path / "b.parquet").write_bytes(b"x" * 600 + whole[600:])
    with pytest.raises(ConfigurationError, match=r"`prompts` must be a readable table, got .*b.parquet' \("):
        read_prompts(tmp_path / "b.parquet")


def test_pyarrow_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError, match=r"`pyarrow` must be installed .*refine-env\[generate\]"):
        read_prompts(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"num_prompts": 0}, "`num_prompts` must be an integer >= 1, got 0"),
        ({"seed": -1}, "`prompt_seed` must be an integer >= 0, got -1"),
        ({"max_nsfw": float("nan")}, "`max_nsfw` must be a finite number, got nan"),
    ],
)
def test_bad_arguments(tmp_path: Path, kwargs: dict[str, Any], match: str) -> None:
    file = write_csv(tmp_path / "a.csv", [record(*row) for row in ROWS])
    with pytest.raises(ConfigurationError, match=match):
        read_prompts(file, **kwargs)
