"""Tensor-parallel training of transformer language models on Slurm clusters."""
