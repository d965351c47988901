"""Load samples in batches, under every transformation, on every rank."""
