"""What a run leaves in its directory, for the trainer and the launcher to read. Imports no torch."""
