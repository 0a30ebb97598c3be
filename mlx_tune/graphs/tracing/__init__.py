"""From a step to its graph, with nothing evaluated."""
