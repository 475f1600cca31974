"""Drawing tokens in kernels."""
