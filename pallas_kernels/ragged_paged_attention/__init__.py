"""Causal attention of a ragged batch of queries over a paged KV cache, which it also extends."""
