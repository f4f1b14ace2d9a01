"""Studies by name."""

from __future__ import annotations

from agents.studies import ladder, scores, timeline
from agents.studies.base import Study

__all__ = ["STUDIES"]

STUDIES: dict[str, Study] = {
    study.name: study for study in (ladder.LADDER, ladder.ORDERING_STUDY, scores.SCORES_STUDY, timeline.FIG1)
}
"""All studies but the paper's comparison, which has more options: ``--study fig3a`` of :mod:`agents.evaluate`."""
