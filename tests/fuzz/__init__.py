"""Fuzzing: what a stranger can send or plant, driven by hypothesis and, for coverage, by atheris."""
