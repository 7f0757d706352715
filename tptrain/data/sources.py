"""The texts of a data set: the standard library's, files, or a data set of the hub."""

import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

from tptrain.config import UserError
from tptrain.config.schema import DataConfig
from tptrain.config.validate import FORMATS, data_files


def documents(config: DataConfig) -> Iterator[str]:
    """The texts of the data set. Raises UserError where they cannot be read or are not texts."""
    if config.source == "stdlib":
        yield from _stdlib_texts()
        return
    column = config.text_column
    try:
        for row in _hub_rows(config) if config.source == "hub" else _file_rows(config):
            if column not in row:
                raise UserError(f"data.text_column={column}: no such column. The data has {', '.join(sorted(row))}.")
            text = row[column]
            if text is not None and not isinstance(text, str):
                raise UserError(f"data.text_column={column}: holds {type(text).__name__}, not text.")
            yield text or ""
    except UserError:
        raise
    except Exception as error:  # `datasets` raises a dozen kinds for a name, a split or a file that it cannot read
        what = f"data.name={config.name}" if config.source == "hub" else f"data.files={','.join(config.files)}"
        raise UserError(
            f"{what}: `datasets` cannot read it: {str(error.__cause__ or error).splitlines()[0]}"
        ) from error


def _stdlib_texts() -> Iterator[str]:
    """Sources and texts of the running Python's standard library, in the order of their paths."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib-dynload"}
    files = [
        file
        for kind in ("*.py", "*.txt", "*.rst")
        for file in root.rglob(kind)
        if not skipped.intersection(file.relative_to(root).parts) and file.is_file()
    ]
    for file in sorted(files):
        yield file.read_text(encoding="utf-8", errors="ignore")


def _file_rows(config: DataConfig) -> Iterable[dict]:
    import datasets

    files = data_files(config)
    kind = FORMATS[files[0].suffix]
    if kind == "text":  # a file is a document
        return ({config.text_column: _utf8(file)} for file in files)
    names = [str(file) for file in files if file.stat().st_size]
    return datasets.load_dataset(kind, data_files=names, split="train", streaming=True)


def _utf8(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"data.files={file}: not UTF-8 at byte {error.start}. Convert it, e.g. with iconv.") from error


def _hub_rows(config: DataConfig) -> Iterable[dict]:
    import datasets

    assert config.name is not None
    return cast(Iterable[dict], datasets.load_dataset(config.name, config.subset, split=config.split))
