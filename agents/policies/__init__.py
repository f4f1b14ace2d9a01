"""The policies. They know the system's description and the observation, never the simulator or a cache."""
