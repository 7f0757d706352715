"""Tensor-parallel training of transformer language models on Slurm clusters."""

__version__ = "0.1.0"
