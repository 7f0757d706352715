"""What `scripts/bench` measures: tptrain and other tensor-parallel frameworks, on the same weights and batches."""
