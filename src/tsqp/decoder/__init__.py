"""Any Hugging Face decoder, its linear layers multiplied by a worker (docs/any-decoder.md)."""
