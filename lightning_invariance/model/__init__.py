"""The model: its layers, their hooks and outputs, and what an evaluation leaves as it was."""
