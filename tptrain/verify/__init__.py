"""Proof that a model trains right: one step on many ranks against the same step on one rank, item by item."""
