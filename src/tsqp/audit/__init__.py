"""What a worker or a dealer could learn: records what they receive, and attacks it. No part of the enclave."""
