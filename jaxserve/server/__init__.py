"""gRPC in front of an engine: `jaxserve.v1.Inference`, health and reflection, and its Python clients."""
