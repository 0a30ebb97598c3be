"""The plan before the act: which layer gets which format, and what stands in the way."""
