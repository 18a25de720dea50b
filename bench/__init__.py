"""Benchmarks that run their baselines beside them and check their own answers: ``python -m bench``."""
