"""``tsqp doctor``."""


def doctor() -> None:
    """X"""
