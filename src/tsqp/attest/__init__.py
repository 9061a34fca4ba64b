"""Remote attestation: an enclave proves what it is, and a client checks that before it sends anything."""
