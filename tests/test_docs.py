"""The pages are held to the code: blocks run, links and names resolve, tables are computed anew."""

from __future__ import annotations

import csv
import dataclasses
import importlib
import json
import re
import tomllib
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np
import pytest

import agents
import refine_env
from refine_env.coding import base_distortion, entropy
from refine_env.dynamics.process import FULL_LATENT_MSE
from refine_env.dynamics.settings import EnvSettings
from refine_env.link import latency_quantile, rate_statistics
from refine_env.wrappers import ENCODINGS
from tests.test_layering import ROOMS

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("**/*.md")) + [
    path for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md") if (path := ROOT / name).is_file()
]
RUNNABLE = [page for page in PAGES if "```python\n" in page.read_text(encoding="utf-8")]
NOT_RUN = "<!-- not run -->"

_FENCE = re.compile(r"(?P<fence>`{3,}|~{3,})(?P<language>[^\s`]*)[^`]*")
_LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)")
_EXTERNAL = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_NAME = re.compile(r"`((?:refine_env|agents)(?:\.\w+)+)(?:\([^`]*\))?`")


class Block(NamedTuple):
    """A fenced block: its language, the line of its first line of text (1-based), its text, whether it runs."""

    language: str
    line: int
    text: str
    runs: bool


def _name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(markdown: str) -> Iterator[Block]:
    """All fenced blocks; one runs unless the last line of text before it is the comment NOT_RUN."""
    lines = markdown.splitlines()
    number, before = 0, ""
    while number < len(lines):
        opening = _FENCE.fullmatch(lines[number].strip())
        if opening is None:
            before = lines[number].strip() or before
            number += 1
            continue
        start = number + 1
        fence = opening["fence"]
        closing = re.compile(f"{re.escape(fence[0])}{{{len(fence)},}}")
        end = next((n for n in range(start, len(lines)) if closing.fullmatch(lines[n].strip())), None)
        if end is None:
            raise ValueError(f"The block that line {number + 1} opens must be closed.")
        yield Block(opening["language"], start + 1, "\n".join(lines[start:end]), before != NOT_RUN)
        number, before = end + 1, ""


def run_python_blocks(page: Path) -> int:
    """Run a page's Python blocks in order, in one namespace; returns how many."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    count = 0
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language != "python" or not block.runs:
            continue
        # Blank lines in front, so that a traceback names the page's own line.
        code = compile("\n" * (block.line - 1) + block.text, str(page), "exec", dont_inherit=True)
        exec(code, namespace)
        count += 1
    return count


def without_blocks(markdown: str) -> str:
    """The text without what is in fenced blocks."""
    lines = markdown.splitlines()
    for block in blocks(markdown):
        for number in range(block.line - 1, block.line + block.text.count("\n")):
            lines[number] = ""
    return "\n".join(lines)


def anchors(markdown: str) -> set[str]:
    """The anchors that GitHub gives the headings."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6}\s+(.*?)\s*$", without_blocks(markdown), flags=re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")
        unique, number = slug, 0
        while unique in found:
            number += 1
            unique = f"{slug}-{number}"
        found.add(unique)
    return found


def broken_links(page: Path, root: Path) -> list[str]:
    """The relative links of a page that lead to nothing inside the repository."""
    broken = []
    markdown = page.read_text(encoding="utf-8")
    for link in _LINK.findall(re.sub(r"`[^`\n]*`", "", without_blocks(markdown))):
        if _EXTERNAL.match(link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        found = target.is_relative_to(root.resolve()) and target.exists()
        if found and anchor and target.suffix == ".md":
            found = anchor in anchors(target.read_text(encoding="utf-8"))
        if not found:
            broken.append(link)
    return broken


def fragile_math(markdown: str) -> list[str]:
    """Inline formulas that Markdown may take apart before they are set.

    An escaped punctuation mark loses its backslash, `}_` and `*` can begin an emphasis, and a letter right
    after the closing dollar sign makes it none.
    """
    text = re.sub(r"`[^`\n]*`", "", without_blocks(markdown))
    return [
        formula
        for formula, after in re.findall(r"\$([^$]+)\$(.?)", text, flags=re.DOTALL)
        if re.search(r"\\[^a-zA-Z]|\}_|\*|\n", formula) or formula != formula.strip() or after.isalnum()
    ]


@cache
def resolve(name: str) -> Any:
    """The object of a dotted name: modules are imported, a dataclass's fields give the field."""
    parts = name.split(".")
    found: Any = importlib.import_module(parts[0])
    for position, part in enumerate(parts[1:], start=1):
        if dataclasses.is_dataclass(found) and part in (known := {f.name: f for f in dataclasses.fields(found)}):
            found = known[part]
        elif hasattr(found, part):
            found = getattr(found, part)
        else:
            found = importlib.import_module(".".join(parts[: position + 1]))
    return found


def table_rows(markdown: str, marker: str) -> list[list[str]]:
    """The body of the table that follows a comment ``<!-- table: marker -->``, cell by cell."""
    _, found, rest = markdown.partition(f"<!-- table: {marker} -->")
    if not found:
        raise ValueError(f"The page must mark a table as {marker}.")
    lines = []
    for line in rest.strip().splitlines():
        if not line.startswith("|"):
            break
        lines.append([cell.strip() for cell in line.strip().strip("|").split("|")])
    return lines[2:]


def rows_under(text: str, heading: str) -> list[list[str]]:
    """The body of the first table after a heading, cell by cell, code marks taken off."""
    body = text.split(f"{heading}\n", 1)[1]
    lines = re.findall(r"^ *\|(.*)\|$", body.split("\n## ")[0].split("\n    ## ")[0], flags=re.MULTILINE)
    return [[cell.strip().strip("`") for cell in line.split(" | ")] for line in lines[2:]]


def names_in(rows: list[list[str]]) -> list[str]:
    """The names in code of the first cells, several in some."""
    return [name for row in rows for name in re.split(r"`?(?:, | … )`?", row[0])]


def _page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", RUNNABLE, ids=_name_of)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run_python_blocks(page) >= 1


def test_the_pages_with_examples_are_run() -> None:
    assert {"docs/model.md", "docs/own-agent.md"} <= {_name_of(page) for page in RUNNABLE}


@pytest.mark.parametrize("page", PAGES, ids=_name_of)
def test_nothing_is_left_to_fill_in(page: Path) -> None:
    assert "@@" not in page.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=_name_of)
def test_relative_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page, ROOT) == []


@pytest.mark.parametrize("page", PAGES, ids=_name_of)
def test_names_in_the_text_exist(page: Path) -> None:
    for name in _NAME.findall(without_blocks(page.read_text(encoding="utf-8"))):
        try:
            resolve(name)
        except ImportError as error:
            pytest.fail(f"{page.name} names {name}: {error}")


@pytest.mark.parametrize("page", PAGES, ids=_name_of)
def test_inline_formulas_survive_markdown(page: Path) -> None:
    assert fragile_math(page.read_text(encoding="utf-8")) == []


def test_every_page_is_in_the_index() -> None:
    linked = {link.partition("#")[0] for link in _LINK.findall(_page("index.md"))}
    assert {page.name for page in (ROOT / "docs").glob("*.md")} - {"index.md"} <= linked


def test_the_rooms_are_those_of_the_layering() -> None:
    tree = next(block.text for block in blocks(_page("architecture.md")) if "\nagents/" in block.text)
    listed: dict[str, set[str]] = {}
    for line in tree.splitlines():
        if not line.startswith(" "):
            package = line.split("/")[0]
        else:
            listed.setdefault(package, set()).update(re.findall(r"(?<!\S)(\w+)(?:\.py|/)(?=[ ,;:])", line))
    assert listed == {name: {room for room in rooms if not room.startswith("_")} for name, rooms in ROOMS.items()}


def test_defaults_in_the_notation_are_those_of_the_code() -> None:
    """Every row whose code name is a field with a default and whose default is given as code."""
    checked = 0
    for line in _page("notation.md").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        names = _NAME.findall(cells[1]) if len(cells) == 5 else []
        if not names or not re.fullmatch(r"`[^`]+`", cells[2]):
            continue
        field = resolve(names[0])
        assert isinstance(field, dataclasses.Field), names[0]
        assert repr(field.default) == cells[2].strip("`"), names[0]
        checked += 1
    assert checked >= 10


class TestTablesOfNames:
    """Tables that list what the code has list all of it, with its defaults."""

    DOCSTRING = refine_env.LatentRefinementEnv.__doc__ or ""

    def test_arguments_of_the_environment(self) -> None:
        rows = rows_under(self.DOCSTRING, "## Arguments")
        defaults = {field.name: field.default for field in dataclasses.fields(EnvSettings)}
        assert {row[0]: row[1] for row in rows} == {
            name: json.dumps(value) if isinstance(value, str | tuple) else str(value)
            for name, value in {**defaults, "render_mode": None}.items()
        }

    def test_infos_and_observations(self) -> None:
        env = gym.make(refine_env.ENV_ID)
        observation, info = env.reset(seed=0)
        infos = {row[0]: row[1] for row in rows_under(self.DOCSTRING, "## Info")}
        assert infos.pop(FULL_LATENT_MSE) == "float"  # of caches with full runs: tests/test_reuse_cache.py
        assert {name: kind.split()[0] for name, kind in infos.items()} == {
            name: str(value.dtype) if isinstance(value, np.ndarray) else type(value).__name__
            for name, value in info.items()
        }
        config = env.unwrapped.config  # type: ignore[attr-defined]
        numbers = {"T_d": config.deadline, "T": config.num_steps, "history_length": config.deadline}
        for name, space, _ in rows_under(self.DOCSTRING, "## Observation Space"):
            own = env.observation_space[name]  # type: ignore[index]
            if isinstance(own, gym.spaces.Discrete):
                assert eval(space.removeprefix("Discrete"), {}, numbers) == own.n, name
            else:
                kind, dtype, shape = space.split(" ", 2)
                assert (kind, dtype) == ("Box", str(own.dtype))
                assert eval(shape, {}, numbers) == own.shape, name
            assert np.asarray(observation[name]).shape == own.shape
        listed = [row[0] for row in rows_under(self.DOCSTRING, "## Observation Space")]
        assert set(listed) == set(env.observation_space)  # type: ignore[call-overload]
        assert [row[0] for row in rows_under(_page("own-agent.md"), "## What an agent may know")] == listed

    def test_fields_of_a_link(self) -> None:
        defaults = {field.name: field.default for field in dataclasses.fields(refine_env.LinkConfig)}
        for name, default, *_ in rows_under(_page("links.md"), "## The fields"):
            value = defaults[name]
            assert default == ("–" if value is None else json.dumps(value)), name

    def test_policies(self) -> None:
        rows = rows_under(_page("policies.md"), "## By name")
        at_one_depth = ("persistent-q", "final-q")  # the first and the last of them stand for all
        listed = {name for name in names_in(rows) if not name.startswith(at_one_depth)}
        assert listed == {name for name in agents.names() if not name.startswith(at_one_depth)} | {
            "learned",
            "learned:PATH",
        }
        for row in rows_under(_page("closed-loop.md"), "## The optimum"):
            assert agents.env_kwargs(row[0])["coder"] == "closed_loop"

    def test_encodings(self) -> None:
        assert [
            row[0].split("`")[0].strip('"') for row in rows_under(_page("learning.md"), "## What the policy sees")
        ] == [*ENCODINGS]

    def test_extras(self) -> None:
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        page = _page("get-started.md")
        assert set(names_in(rows_under(page, "## Installation"))) == set(project["optional-dependencies"])
        core = re.search(r"The core needs (.*?) for its command line", page, flags=re.DOTALL)
        assert core is not None
        assert {re.split("[<>=]", line)[0] for line in project["dependencies"]} == {
            word.lower() for word in re.findall(r"\w+", core[1])
        } - {"and"}


def test_the_table_of_rate_statistics_is_computed() -> None:
    rows = table_rows(_page("model.md"), "rate-statistics")
    for row in rows:
        statistics = rate_statistics(float(row[0]))
        expected = [
            f"{statistics.cutoff:.6f}",
            f"{statistics.mean:.3f}",
            f"{statistics.std:.3f}",
            f"{statistics.fixed_power_std:.1f}",
            ", ".join(str(latency_quantile(16384 * bits, statistics, 0.9)) for bits in (3, 4, 8, 10, 16)),
        ]
        assert row[1:] == expected
    assert len(rows) >= 4


def test_the_table_of_base_distortions_is_computed() -> None:
    rows = table_rows(_page("model.md"), "base-distortion")
    for row in rows:
        assert row[1] == f"{base_distortion(int(row[0])):.9g}"
    assert [int(row[0]) for row in rows] == [3, 4, 8, 10]


def test_the_table_of_entropies_is_computed() -> None:
    rows = table_rows(_page("bitstream.md"), "entropy")
    for row in rows:
        bits = int(row[0])
        model = entropy.index_model(bits)
        expected = [f"{model.entropy:.4f}", f"{bits - model.entropy:.4f}"]
        for dim in (1024, 16384):
            size = 8 * (entropy.coded_bytes(dim, bits) or dim * bits // 8)
            expected += [str(size), f"{bits - size / dim:.3f}"]
        assert row[1:] == expected
    assert [int(row[0]) for row in rows] == list(range(1, 16))


def test_how_much_larger_the_learned_policy_s_error_is_where_it_is_small() -> None:
    """As the evaluation that is shipped with the policy has it."""
    from agents.policies.learned import SHIPPED

    with (SHIPPED / "evaluations.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "test"]
    mse = {(row["agent"], float(row["snr_db"])): float(row["latent_mse"]) for row in rows}
    ratios = [f"{mse['learned', snr_db] / mse['dp-inferred', snr_db]:.1f}" for snr_db in (18.0, 21.0, 24.0)]
    assert max(mse["learned", 18.0], mse["dp-inferred", 18.0]) < 1e-6
    text = " ".join(_page("learning.md").split())
    assert f"<!-- raw ratios -->{ratios[0]}, {ratios[1]} and {ratios[2]} times that of `dp-inferred`" in text
    assert " and ".join(f"{mse['learned', snr_db]:.1e}".replace("e-0", "e-") for snr_db in (21.0, 24.0)) in text
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert (
        f"from 18 dB on, where the MSE is below that, the learned policy's is {ratios[0]} to {ratios[2]} times"
        in readme
    )


def test_the_citation_is_of_this_version() -> None:
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.*)$", citation, flags=re.MULTILINE) == [refine_env.__version__]
    assert re.findall(r"^cff-version: (.*)$", citation, flags=re.MULTILINE) == ["1.2.0"]


class TestTheChecks:
    """The checks themselves: each is seen to fail."""

    def test_blocks(self) -> None:
        markdown = f"```python\na = 1\n```\n\n{NOT_RUN}\n\n```python\nb\n```\n~~~~sh\n~~~\n~~~~\n"
        assert list(blocks(markdown)) == [
            Block("python", 2, "a = 1", True),
            Block("python", 8, "b", False),
            Block("sh", 11, "~~~", True),
        ]

    def test_an_open_block_is_refused(self) -> None:
        with pytest.raises(ValueError, match="line 2 opens must be closed"):
            list(blocks("text\n```python\na = 1\n"))

    def test_blocks_share_a_namespace_and_skipped_ones_do_not_run(self, tmp_path: Path) -> None:
        page = tmp_path / "page.md"
        page.write_text(f"```python\na = 1\n```\n{NOT_RUN}\n```python\na = 2\n```\n```python\nassert a == 1\n```\n")
        assert run_python_blocks(page) == 2

    def test_a_failing_block_fails_with_the_pages_line(self, tmp_path: Path) -> None:
        page = tmp_path / "page.md"
        page.write_text("text\n\n```python\n\nraise RuntimeError('wrong')\n```\n")
        with pytest.raises(RuntimeError, match="wrong") as caught:
            run_python_blocks(page)
        assert caught.traceback[-1].lineno + 1 == 5

    @pytest.mark.parametrize("link", ["missing.md", "../outside.md", "#nowhere", "other.md#nowhere"])
    def test_a_broken_link_is_found(self, tmp_path: Path, link: str) -> None:
        root = tmp_path / "root"
        root.mkdir()
        (tmp_path / "outside.md").write_text("# Outside\n")
        (root / "other.md").write_text("# A heading: here\n")
        (root / "page.md").write_text(f"# Title\n[text]({link}) [good](other.md#a-heading-here) [good](#title)\n")
        assert broken_links(root / "page.md", root) == [link]

    def test_links_in_code_and_to_elsewhere_are_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "page.md").write_text("`[a](b)` [web](https://example.org)\n```\n[a](b)\n```\n")
        assert broken_links(tmp_path / "page.md", tmp_path) == []

    def test_fragile_formulas_are_found(self) -> None:
        markdown = r"$a\,b$ and $\bar{x}_t$, $n$th, $ x$ but $\bar x_t$ and `$a*b$`"
        assert fragile_math(markdown) == [r"a\,b", r"\bar{x}_t", "n", " x"]

    def test_a_name_that_is_not_there(self) -> None:
        assert resolve("refine_env.SystemConfig.latent_dim").default == 16384
        with pytest.raises(ImportError, match="no_such_name"):
            resolve("refine_env.link.no_such_name")
