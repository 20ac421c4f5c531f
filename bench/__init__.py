"""Measurements: `python -m bench` in a checkout."""
