"""The parts that a decoder is put together from."""
