"""Studies by name."""

from __future__ import annotations

from agents.studies import assumptions, coverage, decoder, ladder, reuse, scores, sensitivity, sequential, timeline
from agents.studies.base import Study

__all__ = ["STUDIES"]

_ALL = (
    ladder.LADDER,
    ladder.ORDERING_STUDY,
    sequential.SEQUENTIAL,
    decoder.DECODER,
    assumptions.ASSUMPTIONS,
    sensitivity.SENSITIVITY,
    reuse.REUSE,
    coverage.COVERAGE,
    scores.SCORES_STUDY,
    timeline.FIG1,
)

STUDIES: dict[str, Study] = {study.name: study for study in _ALL}
"""All studies but the paper's comparison, which has more options: ``--study fig3a`` of :mod:`agents.evaluate`."""
