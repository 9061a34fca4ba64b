"""Plans a deployment: what a model costs per token, and how many machines serve so many users (docs/planning.md)."""
