"""One checkpointed block: running it again for its gradient, and all that this has to look after."""
