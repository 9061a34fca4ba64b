"""Pools of workers and dealers on Ray: placed, watched, replaced, scaled, listed in a directory. Never an enclave."""

import os

# Ray's own defaults, made ours unless the environment says otherwise. It reads them once, when it is first imported, so
# they stand here, before any module of this package imports it. Whoever reaches a cluster without tokens runs code on
# its nodes. The times are those after which Ray gives an address up.
for _name, _value in {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_gcs_server_port_wait_time_s": "1",
    "RAY_py_gcs_connect_timeout_s": "10",
    "RAY_DEDUP_LOGS": "0",
}.items():
    os.environ.setdefault(_name, _value)
