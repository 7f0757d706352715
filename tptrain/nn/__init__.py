"""The modules of a decoder, sharded."""
