# jaxlib's compiled modules come without types: what our signatures name stands here, for the type checker.
