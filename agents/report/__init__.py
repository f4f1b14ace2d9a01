"""An evaluation as one HTML page, with a player of single episodes; ``python -m agents.report DIR``."""

from agents.report.page import REPORT_FILE, command_of, import_libraries, main, read_run, write_report
from agents.report.replay import TRACE_COLUMNS, replay_row, trace_episode

__all__ = [
    "REPORT_FILE",
    "TRACE_COLUMNS",
    "command_of",
    "import_libraries",
    "main",
    "read_run",
    "replay_row",
    "trace_episode",
    "write_report",
]
