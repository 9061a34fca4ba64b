"""Generation for many requests at once: scheduling, the cache of keys and values, sampling, and the loop over steps."""
