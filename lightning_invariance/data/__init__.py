"""Samples: which of them, in batches, under every transformation, and on which rank."""
