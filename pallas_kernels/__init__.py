if __name__ != "jaxserve.pallas_kernels":
    raise ImportError("import this package as jaxserve.pallas_kernels, not pallas_kernels")
