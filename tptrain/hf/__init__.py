"""Transformers' own models, sharded by their tensor-parallel plans, with our linears, embedding and collectives."""
