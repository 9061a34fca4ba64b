"""The untrusted side: holds the large weights, multiplies what it is sent, keeps nothing."""
