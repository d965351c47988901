"""The callback: when to evaluate while a network trains, and what to log."""
