"""What watches a rank from outside: black box, supervisor, verdict. Imports no torch, and nothing of `launch`."""
