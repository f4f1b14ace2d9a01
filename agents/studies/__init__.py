"""Studies: each plays or decodes what it needs, and makes tables; ``agents.figures`` draws them."""
