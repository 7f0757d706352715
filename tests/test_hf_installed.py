"""The package Transformers is an extra: without it, or with an old one, a model that needs it is refused by name."""

import json
from pathlib import Path

import pytest

from tests.commands import TPTRAIN, run

ABSENT = "raise ModuleNotFoundError(\"No module named 'transformers'\")\n"


@pytest.mark.parametrize(
    ("package", "says"),
    [
        (ABSENT, "this Python has no Transformers (No module named 'transformers'). "),
        ('__version__ = "5.3.0"\n', "this Python has Transformers 5.3.0, and 5.5 is the oldest that will do. "),
    ],
)
def test_the_fix_is_named(tmp_path: Path, package: str, says: str) -> None:
    hidden = tmp_path / "hidden" / "transformers"  # stands before the real one
    hidden.mkdir(parents=True)
    (hidden / "__init__.py").write_text(package)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral", "vocab_size": 300}))
    overrides = ("model=hf", f"model.path={tmp_path}", "data.tokenizer=bytes", f"run.dir={tmp_path}/run")
    done = run(*TPTRAIN, "config", *overrides, PYTHONPATH=str(hidden.parent))
    assert done.returncode == 2, done.stdout
    assert done.stdout.splitlines()[-1] == f"error: model.engine=transformers: {says}Run `pip install 'tptrain[hf]'`."
