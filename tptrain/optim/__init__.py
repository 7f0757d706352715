"""Gradients, masters and moments, and the update of the weights."""
