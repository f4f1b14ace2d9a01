"""The model: the noise schedule, and how the distortion develops over a chain of deliveries."""
