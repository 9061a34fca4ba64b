"""An OpenAI-compatible HTTP server before an engine. It runs in the enclave: it sees every prompt."""
