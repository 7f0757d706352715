"""The verbs of the command line. Imports come late: a mistake in the command is answered at once."""
