"""What decoders are made of, and how Hugging Face writes them down. Imports no torch."""
