"""Training of policies by reinforcement learning."""
