"""Transports to compare, each to be run in a process of its own: `python -m bench.peers.NAME`."""
