"""Coverage-guided fuzzing of everything that reads bytes from others: one module per target (docs/reliability.md)."""
