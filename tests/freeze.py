"""Write the frozen loss files anew: `python -m tests.freeze`. Say why in the commit and in tests/frozen/README.md."""

import json
import tempfile
from pathlib import Path

import torch

from tests.commands import losses
from tests.corpus import overrides
from tests.test_train import FROZEN, MODELS, run_here

if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for model, changes in MODELS.items():
            run_here([*overrides(Path(folder), model), *changes], tp=1)
            values = losses(Path(folder) / model)
            (FROZEN / f"{model}.json").write_text(json.dumps(values, indent=0) + "\n")
