"""Texts to ids and back as evaluations want them: what a tokenizer puts before a text is there only once."""

from pathlib import Path
from typing import Any

from tptrain.config import Config, UserError
from tptrain.generate.text import of_config, transformers_tokenizer


class Codec:
    """By Transformers' tokenizer where the model is a Hugging Face directory with its own, as lm-evaluation-harness has
    it; else as the model was trained.
    """

    def __init__(self, config: Config, folder: Path | None) -> None:
        """`folder`: of the model's files beside its weights, where there is one. Raises UserError."""
        self.folder, self.text = folder, of_config(config, folder)
        self.tokenizer: Any = None
        name = config.data.tokenizer
        if folder is not None and name != "bytes" and _same(folder / "tokenizer.json", Path(name)):
            self.tokenizer = transformers_tokenizer(folder, "tasks", "eval")
        eos: int | None = None if self.tokenizer is None else self.tokenizer.eos_token_id
        self.eos = self.text.eod if eos is None else eos
        if self.tokenizer is not None:
            bos: int | None = self.tokenizer.bos_token_id
        else:
            bos = None if self.text.bos is None else self.text.id_of(self.text.bos)
        self.prefix = self.eos if bos is None else bos  # what stands before a text that has no context
        self.ends = self.text.ends | {self.eos}  # ids that end a text
        self.prefix_text = self.decode([self.prefix], special=True)

    def check_template(self) -> None:
        """Raises UserError for a model without a chat template."""
        if self.tokenizer is None:
            raise UserError(
                "apply_chat_template=true: this model's tokenizer is not that of a Hugging Face directory, and has no "
                "chat template. Leave it out."
            )
        template: Any = self.tokenizer.chat_template
        if template is None or (isinstance(template, dict) and "default" not in template):
            raise UserError(
                f"apply_chat_template=true: {self.folder} has no chat template. Add its chat_template.jinja there, or "
                "leave it out."
            )

    def encode(self, text: str, special: bool | None = None) -> list[int]:
        """`special`: with what the tokenizer puts before a text; None: unless the text has it already."""
        if special is None:
            special = not (self.prefix_text and text.startswith(self.prefix_text))
        if self.tokenizer is not None:
            return self.tokenizer.encode(text, add_special_tokens=special)
        return self.text.encode(text) if special else self.text.plain(text)

    def decode(self, ids: list[int], special: bool = False) -> str:
        """`special`: special tokens are shown."""
        if self.tokenizer is not None:
            return self.tokenizer.decode(ids, skip_special_tokens=not special)
        return self.text.decode(ids, special)


def _same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)
