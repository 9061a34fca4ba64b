"""The LLaMA model: architecture, weights and the forward pass, written against ``LinearOps``."""
