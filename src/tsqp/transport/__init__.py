"""How bytes move between processes, chosen by URL."""
