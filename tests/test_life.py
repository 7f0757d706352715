"""engine=transformers by the commands that a user types: a model without a native map is launched, killed, gone on with
at another tp after its directory has gone, exported, and loaded by Transformers.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.commands import finish, losses, ranks_of, start_launch, tptrain, trainer_of, wait_until
from tests.corpus import write_corpus
from tests.directories import save_tokenizer
from tests.test_pretrained import loss_of_transformers, windows
from tptrain.records.rows import read_rows
from tptrain.records.run_dir import COMMIT, committed, step_of

pytestmark = pytest.mark.filterwarnings("ignore::Warning:transformers")
# The tp that a family goes on at, after 2. The second half runs with --life.
FAMILIES = {"mixtral": 1, "qwen3_next": 4, "deepseek_v3": 4, "gemma4_text": 1, "lfm2": 4}
BY_DEFAULT = ("mixtral",)
PROPOSED = ("lfm2",)  # its plan cuts no layer
EVERY, STEPS = 3, 60  # of checkpoints; and all of them, of which the first launch does some


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    if request.param not in BY_DEFAULT and not request.config.getoption("--life"):
        pytest.skip("with --life")
    return request.param


@pytest.fixture
def folder(family: str, tmp_path: Path) -> Iterator[Path]:
    """A model of the family, its tokenizer and a text."""
    from tests import zoo

    zoo.model(family, vocab_size=300).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    write_corpus(tmp_path, documents=10)
    yield tmp_path
    shutil.rmtree(tmp_path)


def _lines(folder: Path, tp: int) -> list[str]:
    return [
        *_data(folder),
        "model=hf",
        f"model.path={folder}/model",
        f"run.dir={folder}/run",
        f"parallel.tp={tp}",
        f"train.steps={STEPS}",
        "train.seq_len=32",
        "train.global_batch_size=4",
        "train.eval_every=0",
        "optim.lr=1e-3",
        "optim.warmup_steps=2",
        f"checkpoint.every={EVERY}",
        "logging.every=1",
        "wandb.mode=disabled",
    ]


def _data(folder: Path) -> list[str]:
    return ["data=files", f"data.files=[{folder}/corpus.jsonl]", f"data.cache_dir={folder}/data", "train.device=cpu"]


def test_the_whole_life(family: str, folder: Path) -> None:
    import transformers as hf

    run, out = folder / "run", folder / "out"
    launch = start_launch(*_lines(folder, 2))
    wait_until(lambda: len(committed(run / "checkpoints")) > 1, "two checkpoints", launch)
    trainer_of(ranks_of(launch)[1]).kill()
    output = finish(launch)
    assert launch.returncode == 1, output
    assert "plan: " in output
    assert "was killed by SIGKILL" in output
    assert ("One step of it is verified" in output) == (family in PROPOSED), output
    *_, saved, last = committed(run / "checkpoints")
    (last / COMMIT).unlink()  # as where it was killed while it saved: some steps are done twice
    before = read_rows(run / "metrics.jsonl")
    assert step_of(saved) + EVERY <= len(before) < STEPS

    (folder / "model").rename(folder / "away")  # what a run has begun with is not looked at again
    again = tptrain("launch", *_lines(folder, FAMILIES[family]))
    assert again.returncode == 0, again.stdout
    assert f"resuming from {saved.name} (saved by 2 ranks, tp=2)" in again.stdout
    after = losses(run)
    assert len(after) == STEPS
    assert [row["loss"] for row in before] == pytest.approx(after[: len(before)], rel=1e-5)

    exported = tptrain("export", str(run), str(out))
    assert exported.returncode == 0, exported.stdout
    loaded: Any = hf.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    model, report = loaded
    assert not any(report[each] for each in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    of_run = json.loads(tptrain("eval", str(run), *_data(folder)).stdout.splitlines()[-1])
    (folder / "away").rename(folder / "model")
    of_transformers = loss_of_transformers(model.eval(), windows(folder))
    print(f"\n{family}: {len(before)} steps at tp=2 of {STEPS}, loss {after[0]} to {after[-1]}")
    farthest = max(abs(row["loss"] / loss - 1) for row, loss in zip(before, after, strict=False))
    print(f"{len(before) - step_of(saved)} steps done twice, the farthest by {farthest:.0e}")
    print(f"eval {of_run['loss']}, Transformers {of_transformers}")
    assert of_run["loss"] == pytest.approx(of_transformers, rel=1e-5)
    assert of_run["loss"] < after[0]
