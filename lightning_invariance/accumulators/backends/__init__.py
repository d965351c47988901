"""Sums over a block of rows in C, in Triton, and by PyTorch's operations."""
