"""From a graph to the bytes that are alive over time, as a backend of MLX allocates them."""
