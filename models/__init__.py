"""Model families: one decoder, and a small file a family that says how its checkpoints map onto it."""

if __name__ != "jaxserve.models":
    raise ImportError("import this package as jaxserve.models, not models")
