"""Online learning: which of a few safe configurations runs, chosen anew every epoch (docs/learning.md)."""
