"""``tsqp bench``: measure the split on this machine."""

from tsqp.cli.bench.commands import bench as bench
