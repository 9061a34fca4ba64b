"""TSQP: confidential inference for LLaMA-family models across a trust boundary."""

__version__ = "3.0.0a1"
