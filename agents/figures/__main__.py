"""``python -m agents.figures``: see :mod:`agents.figures.folder`."""

from agents.figures import main
from refine_env.commands import run

if __name__ == "__main__":
    run(main)
