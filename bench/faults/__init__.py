"""Random faults: `python -m bench faults`."""
