"""The Python that a step or a block can reach: what its code names, for tracing and for checkpointing alike."""
