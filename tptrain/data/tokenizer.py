"""From texts to token ids."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tptrain.config import UserError
from tptrain.config.schema import DataConfig
from tptrain.config.validate import vocabulary

Encode = Callable[[list[str]], list[NDArray[np.integer]]]


def tokenizer(config: DataConfig) -> tuple[Encode, int, str]:
    """The batch encoder, the end-of-document id and the integer type that holds every id."""
    size, eod = vocabulary(config)
    dtype = "uint16" if size <= 2**16 else "uint32"
    if config.tokenizer == "bytes":
        return lambda texts: [np.frombuffer(text.encode(errors="replace"), np.uint8) for text in texts], eod, dtype
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(config.tokenizer)
    except Exception as error:  # `tokenizers` raises bare Exceptions
        raise UserError(f"data.tokenizer={config.tokenizer}: `tokenizers` cannot read it: {error}") from error

    bos = [] if config.bos_token is None else [tokenizer.token_to_id(config.bos_token)]

    def encode(texts: list[str]) -> list[NDArray[np.integer]]:
        encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(bos + encoding.ids, dtype=np.int64) for encoding in encodings]

    return encode, eod, dtype
