"""The trusted side: prompt, tokens, KV cache and secrets stay in this process."""
