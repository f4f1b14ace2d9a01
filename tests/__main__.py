"""Everything that has to pass: ``python -m tests`` runs lint, spelling, types and tests, in that order.

What this machine has not got, a browser or an optional package, is left out, and the summary of the tests says so.
Further arguments are those of pytest; ``--no-skips`` makes whatever would be left out a failure.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
STEPS: tuple[tuple[str, list[str]], ...] = (
    ("lint", ["ruff", "check", "."]),
    ("format", ["ruff", "format", "--check", "."]),
    ("spelling", ["codespell_lib"]),
    ("types", ["mypy"]),
    ("tests", ["pytest", "-n", str(os.cpu_count() or 1), "--dist", "loadfile", *sys.argv[1:]]),
)


def main() -> int:
    """Run every step, also after one has failed; the exit code is 0 only if all passed."""
    failed = []
    for name, command in STEPS:
        print(f"── {name}: {' '.join(command)}", flush=True)
        if subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=False).returncode:
            failed.append(name)
    print(f"── failed: {', '.join(failed)}" if failed else "── all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
