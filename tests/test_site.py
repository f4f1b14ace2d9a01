"""The site: it builds without a warning, its tutorials run, its links lead somewhere, and it can be read on a phone.

``--site DIR`` takes a site that is built already.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

import agents
import refine_env
from tests.browser import wait_until

ROOT = Path(__file__).parents[1]
COMMAND = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "docs"]
COMMAND_LINES = {"cli", "commands", "receive"}
LOOKED_AT = ("index", "environment", "model", "tutorials/problem", "api/link", "notation", "learning")

pytestmark = pytest.mark.site


class Page(HTMLParser):
    """The anchors of a page, and what it links to or loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = {""}
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value is not None}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag in ("script", "img", "iframe", "source") and "src" in values:
            self.loads.append(values["src"])
        elif tag == "link" and values.get("rel") in ("stylesheet", "icon", "preload"):
            self.loads.append(values["href"])


@cache
def page_of(path: Path) -> Page:
    return Page(path)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    built = request.config.getoption("--site")
    if built is not None:
        return Path(built).resolve()
    folder = tmp_path_factory.mktemp("site")
    result = subprocess.run(
        [*COMMAND, str(folder)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr
    return folder


def broken(site: Path) -> list[str]:
    """Links and files of the pages that lead to nothing in the site; those to elsewhere are left alone."""
    found = []
    for path in sorted(site.rglob("*.html")):
        for link in [*page_of(path).links, *page_of(path).loads]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file() or (
                target.suffix == ".html" and unquote(parts.fragment) not in page_of(target).anchors
            ):
                found.append(f"{path.relative_to(site)}: {link}")
    return found


def test_links_lead_somewhere(site: Path) -> None:
    assert broken(site) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        "<a href='b.html#here'></a> <a href='b.html#there'></a> <a href='c.html'></a> <img src='d.png'>"
        "<a href='https://example.org/none'></a> <a href='#'></a> <a href='#nowhere'></a>"
    )
    (tmp_path / "b.html").write_text("<p id='here'>")
    assert broken(tmp_path) == [
        "a.html: b.html#there",
        "a.html: c.html",
        "a.html: #nowhere",
        "a.html: d.png",
    ]


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    loaded = {link for path in site.rglob("*.html") for link in page_of(path).loads}
    assert {link for link in loaded if urlsplit(link).netloc} == set()


def test_every_page_can_be_reached(site: Path) -> None:
    seen, to_see = set(), [site / "index.html"]
    while to_see:
        path = to_see.pop()
        seen.add(path)
        for link in page_of(path).links:
            parts = urlsplit(link)
            target = (path.parent / unquote(parts.path)).resolve()
            if not parts.netloc and target.suffix == ".html" and target not in seen:
                to_see.append(target)
    pages = [page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")]
    written = {site / page.with_suffix(".html") for page in pages if page.parts[0] != "_parts"}
    assert len(written) > 40
    assert written <= seen


def test_the_environment_s_page_is_its_docstring(site: Path) -> None:
    text = (site / "environment.html").read_text(encoding="utf-8")
    for argument in ("same_step_refinement", "warm_start", "uplink_slots"):
        assert argument in text
    assert {"action-space", "observation-space", "rewards", "arguments", "info"} <= page_of(
        site / "environment.html"
    ).anchors


def public_names() -> set[str]:
    """What ``__all__`` says in every room of the installed package, and in ``agents``."""
    rooms: list[ModuleType] = [refine_env, agents]
    for found in pkgutil.iter_modules(refine_env.__path__, "refine_env."):
        room = importlib.import_module(found.name)
        if found.name.split(".")[1].startswith("_") or found.name.split(".")[1] in COMMAND_LINES:
            continue
        if hasattr(room, "__all__") or not found.ispkg:
            rooms.append(room)
        else:
            rooms += [
                importlib.import_module(part.name) for part in pkgutil.iter_modules(room.__path__, f"{found.name}.")
            ]
    return {
        f"{room.__name__}.{name}"
        for room in rooms
        for name in getattr(room, "__all__", ())
        if not isinstance(value := getattr(room, name), ModuleType)
        and (room is refine_env or value is not vars(refine_env).get(name))  # else under its shortest name
    }


def test_everything_public_is_in_the_reference(site: Path) -> None:
    inventory = importlib.import_module("sphinx.util.inventory").InventoryFile
    with (site / "objects.inv").open("rb") as file:
        known = {name for names in inventory.load(file, "", os.path.join).values() for name in names}
    missing = public_names() - known
    assert missing == set(), f"name them on a page of docs/api: {sorted(missing)}"


def test_the_search_finds_words_of_every_kind_of_page(site: Path) -> None:
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    found = json.loads(index[index.index("{") : index.rindex("}") + 1])
    names = found["docnames"]
    for word, page in [
        ("waterfil", "links"),
        ("clairvoy", "policies"),
        ("deadlin", "environment"),
        ("zigzag", "tutorials/own-policy"),
    ]:
        places = [found[kind].get(word, []) for kind in ("terms", "titleterms")]
        numbers = {number for place in places for number in ([place] if isinstance(place, int) else place)}
        assert names.index(page) in numbers, word


def set_screen(browser: Any, width: int, height: int, scheme: str) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 800},
    )
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


OUTSIDE = """
    const width = document.documentElement.clientWidth;
    const outside = [];
    for (const element of document.querySelectorAll("article *")) {
        const box = element.getBoundingClientRect();
        if (box.width === 0 || box.right <= width + 1) continue;
        let parent = element.parentElement;
        const scrolls = () => ["auto", "scroll"].includes(getComputedStyle(parent).overflowX);
        while (parent && !scrolls()) parent = parent.parentElement;
        if (!parent || parent === document.body || parent === document.documentElement)
            outside.push(`${element.tagName}.${element.className} to ${box.right}`);
    }
    return [document.documentElement.scrollWidth - width, outside];
"""


@pytest.mark.parametrize("page", LOOKED_AT)
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_a_page_fits_the_screen(site: Path, browser: Any, page: str, width: int, scheme: str) -> None:
    """What is wider than the screen scrolls in itself, formulas are set, images there, and nothing goes wrong."""
    set_screen(browser, width, 844, scheme)
    browser.get_log("browser")
    browser.get((site / f"{page}.html").as_uri())
    formulas = "return document.querySelectorAll('.math').length"
    if number := browser.execute_script(formulas):
        script = "return document.querySelectorAll('mjx-container').length"
        wait_until(lambda: browser.execute_script(script) >= number)
    assert browser.execute_script(OUTSIDE) == [0, []]
    images = "return [...document.querySelectorAll('article img')].filter(i => !i.complete || !i.naturalWidth).length"
    wait_until(lambda: browser.execute_script(images) == 0)
    dark = "return getComputedStyle(document.body).backgroundColor"
    assert (browser.execute_script(dark) == "rgb(255, 255, 255)") == (scheme == "light")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
