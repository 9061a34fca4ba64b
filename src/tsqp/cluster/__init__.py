"""Pools of workers and dealers on Ray: placed, watched, replaced, scaled, and told of in a directory. Never an enclave."""
