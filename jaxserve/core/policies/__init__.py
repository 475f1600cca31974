"""The scheduling policies: one file each, found by name in `registry.py`."""
