"""The mesh of ranks, and what travels between them."""
