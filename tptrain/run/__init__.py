"""A process as one rank of a run."""
