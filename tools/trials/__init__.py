"""Kernels that are tried and not installed. `python -m tools.trials` counts them beside those that are."""
