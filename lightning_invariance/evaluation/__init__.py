"""One session over the ST matrix: walks, the registry of layers and accumulators, and collecting the result."""
