"""Commands of the project, run in this process or in one of their own."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run(command: Any, *words: object) -> str:
    """What a typer command prints, run in this process; it has to end well."""
    import typer
    from typer.testing import CliRunner

    app = typer.Typer()
    app.command()(command)
    result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def run_module(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """What came of ``python -m`` with these words."""
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )


def assert_refused(result: subprocess.CompletedProcess[str], code: int, match: str) -> None:
    """Check that a command ended with that code, and that the last thing it said is one sentence that matches."""
    assert result.returncode == code, result.stderr
    said = result.stderr.splitlines()[-1]
    assert said.startswith("error: ")
    assert re.search(match, said), said
    assert "Traceback" not in result.stderr
