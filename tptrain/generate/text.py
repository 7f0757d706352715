"""From texts to token ids and back, as the model was trained with."""

import codecs
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from tptrain.config import Config, UserError
from tptrain.config.pretrained import CONFIG_BYTES, read_json
from tptrain.config.schema import DataConfig
from tptrain.data.tokenizer import tokenizer


class Text:
    """The tokenizer of a run or a directory."""

    def __init__(self, data: DataConfig, folder: Path | None) -> None:
        """`folder`: of the model's other files, where there is one. Raises UserError."""
        self.folder, self.inner = folder, None
        self._encode, self.eod, _ = tokenizer(data)
        if data.tokenizer != "bytes":
            from tokenizers import Tokenizer

            self.inner = Tokenizer.from_file(data.tokenizer)
        self.bos = data.bos_token
        self.ends = {self.eod, *_ends(folder)}  # ids that end an answer

    def encode(self, text: str) -> list[int]:
        """With what stands before a text, as in training."""
        return self._encode([text])[0].tolist()

    def plain(self, text: str) -> list[int]:
        """Without it: of a text that has all its special tokens."""
        return self.encode(text) if self.inner is None else self.inner.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int], special: bool = False) -> str:
        """Special tokens are left out, unless `special`."""
        if self.inner is None:
            return bytes(i for i in ids if i < 256).decode(errors="replace")
        return self.inner.decode(ids, skip_special_tokens=not special)

    def id_of(self, text: str) -> int | None:
        """The one token that is this text, where there is one."""
        return None if self.inner is None else self.inner.token_to_id(text)

    def pieces(self) -> Callable[[int], str]:
        """For one answer: from each id that comes to the text that it adds, empty while a character is not whole."""
        if self.inner is None:
            decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
            return lambda i: decoder.decode(bytes([i])) if i < 256 else ""
        from tokenizers.decoders import DecodeStream

        stream, inner = DecodeStream(skip_special_tokens=True), self.inner
        return lambda i: stream.step(inner, i) or ""

    @cached_property
    def _templates(self) -> Any:
        """Transformers' tokenizer, which fills chat templates. Raises UserError."""
        if self.folder is None:
            raise UserError("chat=true: this model has no chat template. Leave it out.")
        return transformers_tokenizer(self.folder, "chat=true", "hf")

    def chat(self, messages: list[dict[str, Any]]) -> list[int]:
        """The ids of a chat in the model's template, up to where its answer begins. Raises UserError."""
        try:
            text: Any = self._templates.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except UserError:
            raise
        except Exception as error:  # a template raises what it likes
            raise UserError(f"chat=true: {self.folder}: {str(error).splitlines()[0]}") from error
        return self.plain(text)


def of_config(config: Config, folder: Path | None) -> Text:
    """Raises UserError for a model whose tokenizer is not known."""
    if config.data.tokenizer == "auto":
        raise UserError("data.tokenizer: not set. Give the path of a tokenizer.json, or insist on bytes.")
    return Text(config.data, folder)


def transformers_tokenizer(folder: Path, key: str, extra: str) -> Any:
    """A model's. `key`: what asks for it; `extra`: of this package, which has Transformers. Raises UserError."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(
            f"{key}: Transformers' tokenizer of the model is wanted. Run `pip install 'tptrain[{extra}]'`."
        ) from error
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # of a tokenizer that is only a tokenizer.json, and whatever else it raises
        raise UserError(
            f"{key}: {folder}: Transformers cannot read its tokenizer: {str(error).splitlines()[0]}"
        ) from error


def _ends(folder: Path | None) -> set[int]:
    """By generation_config.json, else by config.json."""
    for name in ("generation_config.json", "config.json"):
        if folder is not None and (folder / name).exists():
            ids = read_json(folder / name, CONFIG_BYTES).get("eos_token_id")
            if ids is not None:
                return set(ids) if isinstance(ids, list) else {ids}
    return set()
