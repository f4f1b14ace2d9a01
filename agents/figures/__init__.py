"""Figures, each a function of a table; ``python -m agents.figures DIR`` draws all that a folder has tables of."""

from agents.figures.canvas import save_figure
from agents.figures.curves import draw_fig3a, draw_fig3b
from agents.figures.decoder import draw_decoder
from agents.figures.distortion import draw_fig2a, draw_fig2b
from agents.figures.folder import draw_all, draw_images, draw_studies, main
from agents.figures.images import draw_strip
from agents.figures.ladder import draw_ladder
from agents.figures.scores import draw_scores
from agents.figures.style import rows_by_policy, styles_by_policy
from agents.figures.timeline import draw_timeline

__all__ = [
    "draw_all",
    "draw_decoder",
    "draw_fig2a",
    "draw_fig2b",
    "draw_fig3a",
    "draw_fig3b",
    "draw_images",
    "draw_ladder",
    "draw_scores",
    "draw_strip",
    "draw_studies",
    "draw_timeline",
    "main",
    "rows_by_policy",
    "save_figure",
    "styles_by_policy",
]
