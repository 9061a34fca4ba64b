"""The command line. One module per command; each imports torch only after the OpenMP policy is set."""

from __future__ import annotations

import typer

from tsqp.cli.audit import audit
from tsqp.cli.bench import bench
from tsqp.cli.cluster import cluster
from tsqp.cli.dealer import dealer
from tsqp.cli.demo import demo
from tsqp.cli.doctor import doctor
from tsqp.cli.export import export
from tsqp.cli.generate import generate
from tsqp.cli.keys import keys
from tsqp.cli.pack import pack
from tsqp.cli.plan import plan
from tsqp.cli.prefill import prefill
from tsqp.cli.serve import serve
from tsqp.cli.size import size
from tsqp.cli.top import top
from tsqp.cli.verify import verify
from tsqp.cli.worker import worker

app = typer.Typer(
    name="tsqp",
    help="Confidential inference for LLaMA-family models: a trusted enclave, an untrusted worker.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for command in (worker, dealer, prefill, generate, serve, verify, demo, top, pack, export, size, plan, audit, doctor):
    app.command()(command)
for group in (keys, cluster, bench):
    app.add_typer(group)


def main() -> None:
    """Run the command line."""
    app()
