"""The engine's own scheduler and step loop on a virtual clock, with a cost model for a device; no jax."""
