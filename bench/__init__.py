"""Benchmarks. Part of the repository, not of the package; `README.md` says what each measures."""
