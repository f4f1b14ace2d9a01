"""``python -m agents.distortion``: the distortion models against simulation, see :mod:`agents.studies.distortion`."""

from agents.studies.distortion import main
from refine_env.commands import run

if __name__ == "__main__":
    run(main)
