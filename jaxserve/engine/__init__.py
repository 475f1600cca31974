"""The engine: the step loop, the thread that runs it, and the Python APIs on top."""
