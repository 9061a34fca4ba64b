"""``tsqp bench``."""


def bench() -> None:
    """X"""
