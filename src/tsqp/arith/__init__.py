"""Exact arithmetic, the same on both sides of the boundary."""
