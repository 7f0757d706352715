"""Submission of runs, to processes on this machine or to Slurm, through submitit. Imports no torch."""
