"""Training of the bundled diffusion model, and its assessment."""
