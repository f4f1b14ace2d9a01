"""``python -m agents.report``: see :mod:`agents.report.page`."""

from agents.report import main
from refine_env.commands import run

if __name__ == "__main__":
    run(main)
