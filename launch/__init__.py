"""Submission of runs: to processes on this machine or to Slurm, through submitit. Knows tptrain only by its config."""
