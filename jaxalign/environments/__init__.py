"""Worlds to act in: a small protocol, classic control, bandits, token and tabular worlds, wrappers and adapters."""
