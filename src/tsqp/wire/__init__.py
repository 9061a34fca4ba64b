"""What crosses the trust boundary: message types, their encoding, and the first published protocol."""
