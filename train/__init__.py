"""Training of the bundled diffusion model; not part of the installed package."""
