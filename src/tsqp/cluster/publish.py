"""Tells who asks over HTTP where a pool's members are."""

from __future__ import annotations

import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tsqp.errors import SetupError

PATH = "/directory"
# For a request that does not come, or an answer that is not taken.
_PATIENCE_S = 5.0


class Publisher:
    """An HTTP server with one page, from now until ``close``.

    Args:
        host: the address to listen on.
        port: 0 takes a free one.

    Raises:
        SetupError: the address cannot be used.
    """

    def __init__(self, host: str, port: int) -> None:
        publisher = self

        class Handler(BaseHTTPRequestHandler):
            timeout = _PATIENCE_S

            def do_GET(self) -> None:
                found = self.path == PATH
                body = publisher.text if found else b""
                self.send_response(HTTPStatus.OK if found else HTTPStatus.NOT_FOUND)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:  # noqa: A002  http.server's name for it
                """Keep quiet: every enclave asks every few seconds."""

        self.text = b""
        try:
            self._server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise SetupError(
                f"the directory cannot be served on {host}:{port} ({error.strerror}): choose another port (--port)."
            ) from error
        self._server.daemon_threads = True
        self.url = f"http://{host}:{self._server.server_address[1]}{PATH}"
        threading.Thread(target=self._server.serve_forever, name="tsqp-directory", daemon=True).start()

    def close(self) -> None:
        """Serve no more."""
        self._server.shutdown()
        self._server.server_close()
