"""Ragged paged attention for Hopper GPUs, in Pallas's Mosaic GPU dialect."""
