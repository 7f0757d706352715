"""Text in, sequences of tokens out."""
