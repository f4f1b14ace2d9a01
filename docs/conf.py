"""How the site is built: ``python -m sphinx -W --keep-going -n docs site``, in a clone with the extra ``docs``."""

from __future__ import annotations

import importlib
import inspect
import operator
import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from docutils import nodes
from numpy.typing import ArrayLike
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.errors import PycodeError
from sphinx.ext import intersphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.inspect import isroutine
from sphinx.util.typing import stringify_annotation

SOURCE = Path(__file__).resolve().parent
ROOT = SOURCE.parent
sys.path.insert(0, str(ROOT))
# Of the tutorials: where they find the packages; and their progress bars are text, which a library regrets.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"

# Without compilation a kernel is an ordinary function, with a signature that can be shown; the tutorials compile.
os.environ["NUMBA_DISABLE_JIT"] = "1"
import numba  # noqa: F401

del os.environ["NUMBA_DISABLE_JIT"]
import refine_env

project = "refine-env"
author = "The refine-env developers"
copyright = f"2026, {author}"
version = release = refine_env.__version__
html_title = f"refine-env {version}"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_parts"]
html_theme = "furo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_theme_options = {"navigation_with_keys": True}
copybutton_exclude = ".linenos, .gp, .go"

# The pages are written for GitHub, too: its math, its anchors.
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_fence_as_directive = ["math"]
myst_heading_anchors = 4
myst_links_external_new_tab = False

nb_execution_mode = "force"
nb_execution_timeout = 900  # seconds for a cell; a busy machine takes many times what an idle one does
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True

autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style")]

# The few names of other projects that ours refer to; a build needs no network.
intersphinx_mapping = {
    name: (url, f"inventories/{name}.txt")
    for name, url in {
        "python": "https://docs.python.org/3/",
        "numpy": "https://numpy.org/doc/stable/",
        "gymnasium": "https://gymnasium.farama.org/",
    }.items()
}
nitpicky = True

ENVIRONMENT = "refine_env.LatentRefinementEnv"


def setup(app: Sphinx) -> None:
    """What no extension does."""
    app.connect("source-read", put_in_what_is_elsewhere)
    app.connect("source-read", add_constants)
    app.connect("autodoc-skip-member", leave_fields_out)
    app.connect("autodoc-process-docstring", complete_docstring, priority=400)  # before napoleon
    app.connect("autodoc-process-docstring", restore_colon, priority=600)  # after napoleon
    app.connect("autodoc-process-signature", shorten_arrays)
    app.connect("missing-reference", resolve_as_python_does, priority=400)  # before intersphinx
    app.connect("viewcode-follow-imported", stay_with_aliases)
    app.connect("html-page-context", lead_back)
    app.connect("doctree-resolved", show_source_files)


# --- Pages whose text is elsewhere -----------------------------------------------------------------------------------

_ELSEWHERE = re.compile(r"This page is (?:the docstring of )?\[.*?\]\((\.\./[^)]*)\)\.")
_PART = re.compile(r"<!-- on the site: (\S+) -->")
_LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")
PAGE_OF = {
    (page.parent / found[1]).resolve(): page
    for page in SOURCE.rglob("*.md")
    if (found := _ELSEWHERE.fullmatch(page.read_text(encoding="utf-8").splitlines()[-1]))
}


def put_in_what_is_elsewhere(app: Sphinx, name: str, source: list[str]) -> None:
    """In place of the sentence that says where a page's text is, the text; and links to such texts lead to the page."""
    page = SOURCE / f"{name}.md"
    base = page.parent
    source[0] = _PART.sub(lambda part: (SOURCE / part[1]).read_text(encoding="utf-8"), source[0])
    for path in (path for path, shown in PAGE_OF.items() if shown == page):
        app.env.note_dependency(path)
        if path.suffix == ".py":  # the class docstring, in Markdown but for its roles
            text = inspect.getdoc(refine_env.LatentRefinementEnv) or ""
            text = re.sub(r":meth:`(?=\w+`)", f":meth:`~{ENVIRONMENT}.", text)
            text = re.sub(r":(\w+):(?=`)", r"{py:\1}", text)
            text = re.sub(r"``docs/([\w-]+\.md)``", r"[docs/\1](\1)", text)
        else:
            text, base = path.read_text(encoding="utf-8"), path.parent
        source[0] = _ELSEWHERE.sub(text.replace("\\", r"\\"), source[0])

    def from_here(found: re.Match[str]) -> str:
        path, _, anchor = found[1].partition("#")
        target = (base / path).resolve()
        target = PAGE_OF.get(target, target)
        return "#".join(filter(None, [os.path.relpath(target, page.parent), anchor]))

    source[0] = _LINK.sub(from_here, source[0])


# --- Docstrings of the API -------------------------------------------------------------------------------------------


def add_constants(app: Sphinx, page: str, source: list[str]) -> None:
    """After a module its public constants: of what is handed on autodoc shows classes and functions alone."""

    def constants(found: re.Match[str]) -> str:
        module = importlib.import_module(found[1])
        seen = ModuleAnalyzer.for_module(module.__name__).find_attr_docs()
        values = {name: getattr(module, name) for name in getattr(module, "__all__", ()) if ("", name) not in seen}
        names = [name for name, value in values.items() if not isinstance(value, (type, ModuleType))]
        names = [name for name in names if not isroutine(values[name])]
        return "\n".join([found[0], "", *(f".. autodata:: {module.__name__}.{name}" for name in names), ""])

    source[0] = re.sub(r"^\.\. automodule:: (\S+)(?:\n +:.*)*$", constants, source[0], flags=re.MULTILINE)


def leave_fields_out(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Fields of a named tuple are said in its docstring."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def complete_docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """What autodoc does not see: where a constant comes from, and that a colon ends no type."""
    if name == ENVIRONMENT:
        lines[1:] = ["", "Description, spaces, rewards and arguments: :doc:`/environment`.", ""]
    if what == "data":
        if "\n".join(lines).strip() == (inspect.getdoc(type(obj)) or "").strip():
            lines.clear()
        module, _, constant = name.rpartition(".")
        for origin in sorted(known for known in sys.modules if known.startswith(f"{module}.")):
            with suppress(PycodeError):
                lines[:] = lines or ModuleAnalyzer.for_module(origin).find_attr_docs().get(("", constant), [])
    lines[:] = [re.sub(r"``docs/([\w-]+)\.md``", r":doc:`/\1`", line) for line in lines]
    lines[:] = ["".join(_escape(part) for part in _LITERAL.split(line)) for line in lines]
    if what in ("attribute", "data", "property") and lines:
        lines[0] = lines[0].replace(":", _COLON)


def restore_colon(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Napoleon has passed, which takes "a: b" in the first line of these for a type and its description.

    And a field that says no more than "K." is no list that begins with K.
    """
    lines[:] = [re.sub(r"^(\s*:[^:]+: )(?=\w+\.$)", r"\1\\", line.replace(_COLON, ":")) for line in lines]


_COLON = "\ue000"
_LITERAL = re.compile(r"(``.*?``|`.*?`)")


def _escape(text: str) -> str:
    """Bars are absolute values, and a star before a word unpacks or is a product: no docstring has emphasis."""
    return text if text.startswith("`") else re.sub(r"[|*](?=\S)", r"\\\g<0>", text)


def shorten_arrays(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """``NDArray[float64]``, as the source has it."""
    array = re.compile(r"~numpy\.ndarray\[tuple\[~typing\.Any, \.\.\.\], ~numpy\.dtype\[([^\[\]]+)\]\]")
    anything = stringify_annotation(ArrayLike, "smart")

    def shorten(text: str | None) -> str | None:
        if text is None:
            return None
        text = array.sub(r"~numpy.typing.NDArray[\1]", text.replace(anything, "~numpy.typing.ArrayLike"))
        return re.sub(r"(?<![\w.])NDArray\[np\.(\w+)\]", r"~numpy.typing.NDArray[~numpy.\1]", text)

    return shorten(signature), shorten(returns)


# --- Links -----------------------------------------------------------------------------------------------------------


def resolve_as_python_does(app: Sphinx, env: Any, node: Any, contnode: nodes.Node) -> nodes.Node | None:
    """A name as the module that uses it knows it, under the shortest public name that it has.

    What exists and is on no page is shown without a link; what does not exist is left to be warned of.
    """
    if node.get("refdomain") != "py":
        return None
    found, words = find(node), node["reftarget"].split(".")
    if found is None:
        return None
    module, name = getattr(found, "__module__", None), getattr(found, "__qualname__", None)
    parts = module.split(".") if isinstance(module, str) and isinstance(name, str) else []
    for length in range(1, len(parts) + 1):
        public = ".".join(parts[:length])
        if getattr(sys.modules.get(public), name.split(".")[0], None) is None:
            continue
        node["reftarget"] = f"{public}.{name}"
        domain = env.domains["py"]
        link = domain.resolve_xref(
            env, node["refdoc"], app.builder, node["reftype"], node["reftarget"], node, contnode
        ) or intersphinx.missing_reference(app, env, node, contnode)
        if link is not None:
            return link
    node["reftarget"] = ".".join(words)
    return contnode


def stay_with_aliases(app: Sphinx, module: str, name: str) -> str | None:
    """The source of ``Table = list[…]`` is where it is written, not that of ``list``."""
    value = follow(sys.modules[module], name.split("."))
    return module if type(value).__name__ == "GenericAlias" else None


def lead_back(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: nodes.document | None) -> None:
    """From the source of an object back to where it is described, under the name that it has there.

    Viewcode takes all of a module to be described under one name, but what the package hands on has a shorter one.
    """
    known, parts = app.env.domains["py"].objects, page.split("/")[1:]

    def back(found: re.Match[str]) -> str:
        names = [".".join([*parts[:length], found[2]]) for length in range(len(parts), 0, -1)]
        return found[1] + next((known[name].node_id for name in names if name in known), "")

    if page.startswith("_modules/") and "body" in context:
        block = r'(<div class="viewcode-block" id="([^"]+)">\s*<a class="viewcode-back" href="[^"#]*#)[^"]*'
        context["body"] = re.sub(block, back, context["body"])


def show_source_files(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """A link to a module that the API shows leads to its source on the site; other files are there to download."""
    shown = getattr(app.env, "_viewcode_modules", {})
    for node in list(doctree.findall(addnodes.download_reference)):
        path = (SOURCE / page).parent / node["reftarget"]
        module = ".".join(path.resolve().relative_to(ROOT).with_suffix("").parts)
        if path.suffix == ".py" and shown.get(module.removesuffix(".__init__")):
            target = app.builder.get_relative_uri(page, f"_modules/{module.replace('.', '/')}")
            node.replace_self(nodes.reference("", "", *node.children, refuri=target, internal=True))


def find(node: Any) -> Any:
    """The object that a reference names, seen from the class and the module that it is in, or from outside."""
    module, target = node.get("py:module") or "", node["reftarget"].lstrip(".")
    owner = operator.attrgetter(node["py:class"])(sys.modules[module]) if module and node.get("py:class") else None
    places = [owner, sys.modules.get(getattr(owner, "__module__", "")), sys.modules.get(module)]
    for place in places:
        if place is not None and (found := follow(place, target.split("."))) is not None:
            return found
    top, *names = target.split(".")
    with suppress(ImportError, ValueError):
        return follow(importlib.import_module(top), names)
    return None


def follow(place: Any, names: list[str]) -> Any:
    """What a path of attributes and modules leads to; None if nowhere."""
    for name in names:
        if isinstance(place, type) and not hasattr(place, name):  # an attribute that the docstring alone describes?
            return place if re.search(rf"^ +([\w, ]+, )?{name}[:,]", place.__doc__ or "", flags=re.MULTILINE) else None
        if not hasattr(place, name):
            with suppress(ImportError):
                importlib.import_module(f"{getattr(place, '__name__', '')}.{name}")
        place = getattr(place, name, None)
        if place is None:
            return None
    return place
