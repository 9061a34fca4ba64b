"""Measures TSQP against its baselines."""
