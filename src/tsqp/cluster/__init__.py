"""Pools of workers and dealers on Ray: placed, watched, replaced, scaled, listed in a directory. Never an enclave."""
