"""Floor 1: the alphabet, errors, configuration, precision, mesh and tree paths."""
