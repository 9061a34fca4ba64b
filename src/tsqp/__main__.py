"""``python -m tsqp`` is ``tsqp``."""

from tsqp.cli import main

main()
