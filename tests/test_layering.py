"""Data moves one way: an import points only to what is upstream, and the core stays light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

import refine_env

ROOT = Path(__file__).parents[1]

# Every room with the rooms that it may import; a room may import its own files, too.
BASE = {"errors", "_compiled", "_validation"}
MODELS = BASE | {"model", "link", "coding", "config"}
ROOMS: dict[str, dict[str, set[str]]] = {
    "refine_env": {
        "errors": set(),
        "_compiled": set(),
        "_store": {"_files"},
        "_files": set(),
        "_validation": {"errors"},
        "commands": BASE,
        "models": set(),
        "metrics": BASE | {"radiomap"},
        "radiomap": BASE,
        "model": BASE,
        "link": BASE | {"_store"},
        "coding": BASE | {"model"},
        "config": BASE | {"model", "link", "coding"},
        "trajectories": BASE | {"model", "radiomap", "_files", "_store"},
        "dynamics": MODELS | {"trajectories"},
        "evaluation": MODELS | {"dynamics", "trajectories", "_files"},
        "render": BASE | {"config", "dynamics", "radiomap", "trajectories"},
        "env": BASE | {"config", "dynamics", "render", "trajectories"},
        "vector_env": BASE | {"config", "dynamics", "env", "render", "trajectories"},
        "wrappers": MODELS,
        "learning": MODELS | {"env", "evaluation", "vector_env", "wrappers"},
        "sb3": BASE | {"env", "evaluation", "learning", "wrappers"},
        "transport": BASE | {"coding", "config", "env", "evaluation"},
        "cli": BASE | {"commands", "model", "trajectories"},
        "receive": BASE | {"commands", "evaluation", "transport"},
    },
    "agents": {
        "base": set(),
        "policies": {"base"},
        "registry": {"base", "policies"},
        "studies": {"", "base", "policies", "registry"},
        "figures": {"studies"},
        "report": {"", "figures", "studies"},
        "evaluate": {"", "figures", "report", "studies"},
        "distortion": {"figures", "studies"},
        "leaderboard": {""},
        "record": {""},
        "send": {""},
        "benchmark": {"", "evaluate"},
    },
    "train": {
        "options": set(),
        "rl": {"options"},
        "ppo": {"options", "rl"},
        "diffusion": {"options"},
        "ldm": {"diffusion", "options"},
        "radiomap": {"diffusion", "options"},
    },
}
# What imports what of another package: policies see descriptions and models, never the simulator or a cache.
SEES = {"base": MODELS, "policies": MODELS | {"wrappers"}, "registry": MODELS}
# What `from refine_env import …` hands on: the room that each name comes from.
HANDED_ON = {
    name: getattr(value, "__module__", "refine_env.").split(".")[1]
    for name, value in vars(refine_env).items()
    if name in refine_env.__all__ and not isinstance(value, ModuleType)
} | {"__version__": "version", "ENV_ID": "env"}


def import_lines(path: Path) -> Iterator[tuple[str, list[str] | None]]:
    """What a file imports, at its top or in its functions: a module, and the names from it; None is the module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or "", [alias.name for alias in node.names]


def imported(path: Path, package: str) -> set[str]:
    """Rooms of ``package`` that a file imports; ``""`` is the package itself."""
    found = set()
    for module, names in import_lines(path):
        top, *below = module.split(".")
        if top != package:
            continue
        if below:
            found.add(below[0])
        elif names is not None:  # from package import names: rooms, or names it hands on
            found |= {HANDED_ON.get(name, name) for name in names}
        else:
            found.add("")
    return found


def violations(root: Path) -> list[str]:
    bad = []
    for package, rooms in ROOMS.items():
        for path in sorted((root / package).rglob("*.py")):
            relative = path.relative_to(root / package)
            room = relative.parts[0].removesuffix(".py")
            if room == "__init__":
                continue
            if room not in rooms:
                bad.append(f"{package}/{relative}: a room that the layering does not know")
                continue
            allowed = {package: rooms[room] | {room, "version"}}
            if package == "agents":
                allowed["refine_env"] = SEES.get(room, set(ROOMS["refine_env"])) | {"version"}
            elif package == "train":
                allowed["agents"] = {"", *ROOMS["agents"]}
                allowed["refine_env"] = {"", "version", *ROOMS["refine_env"]}
            for other in ROOMS:
                targets = imported(path, other)
                if targets and other not in allowed:
                    bad.append(f"{package}/{relative}: must not import {other}")
                    continue
                bad.extend(
                    f"{package}/{relative}: {room} must not import {target or 'the package'} of {other}"
                    for target in sorted(targets - allowed.get(other, set()))
                )
    return bad


def test_imports_point_upstream() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("refine_env/link/fading.py", "from refine_env.env import x", "link must not import env of refine_env"),
        ("refine_env/link/fading.py", "from refine_env import env", "link must not import env of refine_env"),
        ("refine_env/config.py", "import refine_env.dynamics.process", "config must not import dynamics"),
        ("refine_env/config.py", "import refine_env", "config must not import the package of refine_env"),
        ("refine_env/env.py", "import agents", "must not import agents"),
        ("agents/policies/fixed.py", "from refine_env import dynamics", "policies must not import dynamics"),
        ("agents/policies/fixed.py", "from refine_env import TrajectoryCache", "must not import trajectories"),
        ("agents/policies/fixed.py", "from refine_env import LatentRefinementEnv", "policies must not import env"),
        ("agents/policies/fixed.py", "import train.ppo", "must not import train"),
        ("agents/policies/fixed.py", "import agents.studies", "policies must not import studies of agents"),
        ("agents/studies/ladder.py", "from agents import figures", "studies must not import figures of agents"),
        ("train/rl/envs.py", "from train.diffusion import emoji", "rl must not import diffusion of train"),
        ("train/rl/study.py", "from train import ppo", "rl must not import ppo of train"),
        ("train/diffusion/assess.py", "from train import ldm", "diffusion must not import ldm of train"),
    ],
)
def test_a_wrong_import_is_seen(tmp_path: Path, file: str, line: str, complaint: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(f"def f():\n    {line}\n")
    assert any(complaint in violation for violation in violations(tmp_path))


def file_imports(path: Path, files: set[Path], root: Path) -> set[Path]:
    """Files of ``root`` that a file imports, at its top or in its functions."""
    found = set()
    for module, names in import_lines(path):
        # Who asks for the version makes no circle: it is a constant, set by hand.
        for name in [module] if names is None else [f"{module}.{name}" for name in names if name != "__version__"]:
            # `from a.b import c`: the module a/b/c.py if there is one, else what a/b.py or a/b/__init__.py has.
            place = root.joinpath(*name.split("."))
            for one in (place, place.parent):
                file = next((file for file in (one.with_suffix(".py"), one / "__init__.py") if file in files), None)
                if file is not None:
                    found.add(file)
                    break
    return found - {path}


def circles(root: Path) -> list[str]:
    """Circles of files of our packages that import each other, each with its files in order."""
    files = {path for package in ROOMS for path in (root / package).rglob("*.py")}
    graph = {path: file_imports(path, files, root) for path in sorted(files)}
    found = []
    while True:
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as error:
            circle = error.args[1]
            found.append(" → ".join(str(path.relative_to(root)) for path in circle))
            graph[circle[1]].discard(circle[0])  # the edge that the sorter names last: cut, and look for the next one
        else:
            return found


@pytest.mark.parametrize(
    "package",
    ["refine_env", "agents", "train"],
)
def test_no_files_import_each_other_in_a_circle(package: str) -> None:
    assert [circle for circle in circles(ROOT) if circle.startswith(package)] == []


@pytest.mark.parametrize("line", ["from agents.second import b", "from agents import second", "import agents.second"])
def test_a_circle_is_seen(tmp_path: Path, line: str) -> None:
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents" / "first.py").write_text(f"def f():\n    {line}\n")
    (tmp_path / "agents" / "second.py").write_text("from agents.first import f\n")
    (circle,) = circles(tmp_path)
    assert "agents/first.py → agents/second.py" in circle


PICKLES = {"pickle", "_pickle", "cloudpickle", "dill", "shelve", "marshal", "jsonpickle"}
LOADERS = {"torch": "weights_only=True", "np": "allow_pickle=False", "numpy": "allow_pickle=False"}
"""Modules whose ``load`` unpickles unless a keyword forbids it."""
UNPICKLERS = {"joblib", "PPO", "DQN", "MaskablePPO", *PICKLES}
UNPICKLING_NAMES = {"load_replay_buffer", "load_from_zip_file", "load_from_pkl", "read_pickle", "set_parameters"}


def unpickled(path: Path) -> list[str]:
    """Where a file imports, or calls, what runs code that lies in the data that it reads."""
    bad = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name.split(".")[0] for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [(node.module or "").split(".")[0], *(alias.name for alias in node.names)]
            if names[0] in LOADERS.keys() | UNPICKLERS and {"load", "loads"} & set(names):
                bad.append(f"{path.name}:{node.lineno}: from {names[0]} import load")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value]  # import_extra("pickle", ...)
        bad.extend(f"{path.name}:{getattr(node, 'lineno', 0)}: {name}" for name in PICKLES & set(names))
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        owner = node.func.value
        where = f"{path.name}:{node.lineno}: {ast.unparse(node.func)}"
        if node.func.attr in UNPICKLING_NAMES:
            bad.append(where)
        elif node.func.attr in ("load", "loads"):
            keywords = {f"{keyword.arg}={ast.unparse(keyword.value)}" for keyword in node.keywords}
            known = ast.unparse(owner)
            if not isinstance(owner, ast.Name) or known in UNPICKLERS or LOADERS.get(known) not in {None, *keywords}:
                bad.append(where)
    return bad


def test_nothing_that_is_read_is_unpickled() -> None:
    files = [path for package in ("refine_env", "agents", "train") for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(files) > 80
    assert [complaint for path in files for complaint in unpickled(path)] == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from cloudpickle import loads",
        "from joblib import load",
        "import_extra('cloudpickle', 'train')",
        "joblib.load(path)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "np.load(path)",
        "PPO.load(path)",
        "kinds[algorithm].load(path)",
        "model.load_replay_buffer(path)",
    ],
)
def test_what_would_unpickle_is_seen(tmp_path: Path, line: str) -> None:
    path = tmp_path / "module.py"
    path.write_text(line + "\n")
    assert unpickled(path)
    path.write_text(
        "json.loads(x); torch.load(x, weights_only=True); np.load(x, allow_pickle=False); safetensors.load(x)\n"
    )
    assert unpickled(path) == []


def run_python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    return result.stdout.strip()


HEAVY = (
    "torch",
    "diffusers",
    "transformers",
    "matplotlib",
    "stable_baselines3",
    "lpips",
    "plotly",
    "selenium",
    "skimage",
    "constriction",
    "pandas",
    "scipy.stats",
)


@pytest.mark.parametrize("package", ["refine_env", "agents", "train"])
def test_no_folder_that_others_can_foresee(package: str) -> None:
    """In the system's temporary folder everybody may make one first; ``tempfile`` makes private ones."""
    for file in (ROOT / package).rglob("*.py"):
        assert not re.search(r"gettempdir|mktemp|[\"'](/var)?/tmp", file.read_text(encoding="utf-8")), file


@pytest.mark.parametrize(
    "module",
    [
        "refine_env",
        "agents",
        "agents.evaluate",
        "agents.figures",
        "agents.send",
        "agents.distortion",
        "agents.report",
        "agents.benchmark",
        "refine_env.cli",
    ],
)
def test_import_is_light(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    assert run_python(code) == "[]"


def test_command_line_libraries_are_not_the_core_s() -> None:
    code = "import sys, refine_env, agents; print([m for m in ('typer', 'rich', 'tqdm') if m in sys.modules])"
    assert run_python(code) == "[]"


def test_registration_is_idempotent() -> None:
    code = (
        "import warnings; warnings.simplefilter('error');"
        "import importlib, gymnasium, refine_env; importlib.reload(refine_env);"
        "print(gymnasium.spec('refine_env/LatentRefinement-v0').id)"
    )
    assert run_python(code) == "refine_env/LatentRefinement-v0"


def test_id_with_the_module_s_name_registers_itself(gaussian_cache: Path) -> None:
    code = (
        "import gymnasium;"
        f"env = gymnasium.make('refine_env:refine_env/LatentRefinement-v0', cache={str(gaussian_cache)!r});"
        "print(type(env.unwrapped).__name__)"
    )
    assert run_python(code) == "LatentRefinementEnv"
