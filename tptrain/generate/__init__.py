"""Text out of a model: a cache of keys and values, the choice of tokens, and the loop around them."""
