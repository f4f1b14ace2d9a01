"""The dynamics: the environment's arguments, episodes that are played slot by slot, and what they show."""
