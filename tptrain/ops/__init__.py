"""Fused operations: one table of functions, and what computes them."""
