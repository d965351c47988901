"""The Lightning callback, its history, and its logging."""
