"""Will it fit: a model on a machine, both by name, from the configuration alone."""
