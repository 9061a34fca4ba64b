"""Tensor parallelism: several processes, ranks, hold a worker's weights, each some rows of every group.

Rank 0, the leader, is the worker that clients see. It broadcasts what is to be multiplied; each of the others, the
followers, multiplies by its rows; the leader gathers columns (docs/decisions/0020).
"""
