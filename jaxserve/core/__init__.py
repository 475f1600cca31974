"""Host-only scheduling core, shared by engine and simulator. Nothing in here imports jax."""
