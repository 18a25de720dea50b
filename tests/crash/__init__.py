"""Processes that die, stop and fork at every step."""
