"""A config.json read field by field, so that none is passed over: each is honoured, irrelevant or refused."""

from collections.abc import Mapping
from typing import Any

from tptrain.config import UserError

# What has no say in training, in any family, and why.
IRRELEVANT = {
    "_name_or_path": "where the model came from",
    "architectures": "the class in Transformers; model_type names the family",
    "auto_map": "code of the model's authors; the family is known here, and nothing is executed",
    "bos_token_id": "the tokenizer's business",
    "chunk_size_feed_forward": "a way to compute, not what is computed",
    "dtype": "train.precision decides",
    "eos_token_id": "the tokenizer's business",
    "id2label": "of classifiers",
    "is_decoder": "of encoders",
    "is_encoder_decoder": "of encoders",
    "label2id": "of classifiers",
    "model_type": "names the family",
    "output_attentions": "of Transformers' outputs",
    "output_hidden_states": "of Transformers' outputs",
    "pad_token_id": "sequences are packed, never padded",
    "problem_type": "of classifiers",
    "quantization_config": "null here: a model that is quantized was refused before",
    "return_dict": "of Transformers' outputs",
    "torch_dtype": "train.precision decides",
    "transformers_version": "who wrote the file",
    "use_cache": "of generation",
}
NUMBER = (int, float)


class Fields:
    """The fields of a config.json. What is never asked for must be irrelevant: see `finish`.

    Every error is a UserError that names the field.
    """

    def __init__(self, config: Mapping[str, Any], *, dropout: float | None = None, where: str = "config.json") -> None:
        """`dropout`: instead of what the file says; `where`: what the fields are of, for messages."""
        self.config, self.dropout, self.where = config, dropout, where
        self.honoured: set[str] = set()
        self.irrelevant = dict(IRRELEVANT)

    def get(self, name: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """A field's value, or the default where it is absent or null."""
        self.honoured.add(name)
        value = self.config.get(name)
        if value is None:
            return default
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            wanted = " or ".join(each.__name__ for each in kinds)
            raise UserError(f"model.path: {self.where} has {name}={value!r}, which is no {wanted}.")
        return value

    def nullable(self, name: str, kind: type | tuple[type, ...], default: Any) -> Any:
        """A field's value, which may be null; the default where it is absent."""
        return self.get(name, kind, None if name in self.config else default)

    def require(self, name: str, kind: type | tuple[type, ...]) -> Any:
        """A field's value, which must be there."""
        value = self.get(name, kind)
        if value is None:
            raise UserError(f"model.path: {self.where} lacks {name}. Complete it, or name another directory.")
        return value

    def count(self, name: str, default: int | None = None) -> int:
        """A whole number of at least one, which must be there unless there is a default."""
        value = self.require(name, int) if default is None else self.get(name, int, default)
        if value < 1:
            raise UserError(f"model.path: {self.where} has {name}={value}, and it must be at least 1.")
        return value

    def expect(self, name: str, *values: Any) -> None:
        """Refuse a field's value unless it is one of these, or absent."""
        self.honoured.add(name)
        value = self.config.get(name)
        if value is not None and value not in values:
            raise UserError(
                f"model.path: {self.where} has {name}={value!r}, which is not supported; "
                f"{' or '.join(map(repr, values))} would be."
            )

    def expect_no_dropout(self, *names: str) -> None:
        """Refuse dropout, unless the user has switched it off."""
        for name in names:
            rate = self.get(name, NUMBER, 0.0)
            if rate and self.dropout != 0:
                raise UserError(
                    f"model.path: {self.where} has {name}={rate}, and dropout is not supported. "
                    "Train without it: model.dropout=0."
                )

    def section(self, name: str) -> "Fields | None":
        """A field that holds fields of its own; its reader finishes it."""
        value = self.get(name, dict)
        if value is None:
            return None
        section = Fields(value, dropout=self.dropout, where=f"{name} of {self.where}")
        section.irrelevant = {}
        return section

    def ignore(self, **reasons: str) -> None:
        """Further fields that have no say, each with the reason."""
        self.irrelevant |= reasons

    def finish(self) -> None:
        """Refuse a field that is neither honoured nor irrelevant."""
        for name in self.config:
            if name not in self.honoured and name not in self.irrelevant:
                raise UserError(
                    f"model.path: {self.where} has the field {name}={self.config[name]!r}, which this version does not "
                    "know: it may change what the model computes."
                )
