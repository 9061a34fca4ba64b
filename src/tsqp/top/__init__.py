"""A live view of what a worker, a dealer or a server does: ``tsqp top``."""
