"""The measured model: selection of layers, hooks, layouts of outputs, and restoring its state."""
