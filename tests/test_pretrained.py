"""From a Hugging Face directory through training to Transformers again, by the commands that a user types."""

import filecmp
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from launch.verify import prepare
from tests import zoo
from tests.commands import TPTRAIN, losses, run, tptrain
from tests.corpus import write_corpus
from tests.directories import save_model, save_tokenizer
from tests.families import FAMILIES
from tests.hub import COMMIT, hub
from tests.test_slurm import submit, wait_for_end
from tptrain.__main__ import main
from tptrain.checkpoint.export import export
from tptrain.config import load_config
from tptrain.models.sizes import settle_engine

STEPS, MORE_STEPS = 6, 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its tokenizer and a text."""
    folder = tmp_path_factory.mktemp("pretrained")
    save_model(FAMILIES["gemma2"], folder / "model", shard="200KB")
    save_tokenizer(folder / "model")
    write_corpus(folder, documents=20)
    return folder


def _overrides(folder: Path, steps: int, tp: int, name: str = "run") -> list[str]:
    return [
        "model=hf",
        f"model.path={folder}/model",
        "data=files",
        f"data.files=[{folder}/corpus.jsonl]",
        f"data.cache_dir={folder}/data",
        f"run.dir={folder}/{name}",
        f"parallel.tp={tp}",
        f"train.steps={steps}",
        "train.seq_len=32",
        "train.global_batch_size=4",
        "train.micro_batch_size=4",
        "train.eval_every=0",
        "train.eval_sequences=4",
        "train.device=cpu",
        "checkpoint.every=3",
        "logging.every=1",
        "wandb.mode=disabled",
    ]


@pytest.fixture(scope="module")
def run_dir(folder: Path) -> Path:
    """A run at tp=2, gone on with at tp=1 after its model and its newest checkpoint's marker have gone."""
    run_dir = folder / "run"
    first = tptrain("launch", *_overrides(folder, STEPS, 2))
    assert first.returncode == 0, first.stdout
    (run_dir / "checkpoints" / "step-00000006" / "commit.json").unlink()  # as where it was killed while it saved
    (folder / "model").rename(folder / "away")
    again = tptrain("launch", *_overrides(folder, MORE_STEPS, 1))
    (folder / "away").rename(folder / "model")
    assert again.returncode == 0, again.stdout
    assert "resuming from step-00000003 (saved by 2 ranks, tp=2)" in again.stdout
    return run_dir


def windows(folder: Path) -> list[list[int]]:
    """The corpus as Transformers' tokenizer has it, every document with its BOS and EOS, in windows of 32 tokens."""
    import transformers as hf

    tokenizer = hf.AutoTokenizer.from_pretrained(folder / "model")
    ids: list[int] = []
    for line in (folder / "corpus.jsonl").read_text().splitlines():
        ids += [*tokenizer.encode(json.loads(line)["text"]), tokenizer.eos_token_id]
    return [ids[start : start + 32] for start in range(0, len(ids), 32)]


def loss_of_transformers(model: torch.nn.Module, windows: list[list[int]]) -> float:
    """Nats a token by Transformers: every token but each window's first is scored."""
    *equal, last = windows  # the last one may be shorter
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in [equal[start : start + 64] for start in range(0, len(equal), 64)] + [[last]] * (len(last) > 1):
            ids = torch.tensor(batch)
            logits = model(ids[:, :-1]).logits
            total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
            count += ids[:, 1:].numel()
    return total / count


def test_the_learning_rate_and_the_tokenizer_are_the_model_s(run_dir: Path) -> None:
    config = tptrain("config", *_overrides(run_dir.parent, MORE_STEPS, 1)).stdout
    assert "lr: 1.0e-05" in config
    assert f"tokenizer: {run_dir}/model/tokenizer.json" in config
    assert "bos_token: <s>" in config
    assert "eod_token: </s>" in config


@pytest.mark.parametrize(
    ("lines", "shown"),
    [
        ([], True),
        (["train.precision=bf16"], True),
        (["train=default"], False),
        (["train.seq_len=64"], False),
        (["++train.global_batch_size=4"], False),
    ],
)
def test_a_default_length_and_batch_are_no_silent_choice(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lines: list[str],
    shown: bool,
) -> None:
    monkeypatch.setattr("tptrain.commands.runs._launch_here", lambda configs: 0)
    shutil.copytree(folder / "model", tmp_path / "model")
    settings = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 256}))
    model = ["model=hf", f"model.path={tmp_path}/model", f"run.dir={tmp_path}/run", "data=stdlib"]
    warning = (
        "warning: model=hf has no length or batch of its own: train.seq_len=256 (tokens) and train.global_batch_size=8 "
        "(sequences) are tptrain's defaults. Set both.\n"
    )
    for verb in ("launch", "config"):
        assert main([verb, *model, *lines]) == 0
        engine = "model.engine=native: all of its config.json is known\n"
        assert capsys.readouterr().err == engine + (warning if shown else "")


def test_evaluation_is_that_of_transformers(folder: Path, run_dir: Path) -> None:
    import transformers as hf

    texts = windows(folder)
    expected = loss_of_transformers(hf.AutoModelForCausalLM.from_pretrained(folder / "model"), texts)
    result = json.loads(tptrain("eval", *_overrides(folder, STEPS, 1)).stdout.splitlines()[-1])
    assert result["tokens"] == sum(len(window) - 1 for window in texts)
    assert result["loss"] == pytest.approx(expected, rel=1e-5)
    assert losses(run_dir)[0] == pytest.approx(expected, rel=0.05)  # of one batch, and not of another model


def test_the_exported_model_is_the_trained_one(folder: Path, run_dir: Path) -> None:
    import transformers as hf

    exported = tptrain("export", str(run_dir), str(folder / "out"))
    assert exported.returncode == 0, exported.stdout
    assert f"exported {run_dir}/checkpoints/step-00000009 to {folder}/out" in exported.stdout
    model = hf.AutoModelForCausalLM.from_pretrained(folder / "out")
    data = [line for line in _overrides(folder, STEPS, 1) if line.startswith(("data", "train.device"))]
    of_run = json.loads(tptrain("eval", str(run_dir), *data).stdout.splitlines()[-1])
    assert of_run["loss"] == pytest.approx(loss_of_transformers(model, windows(folder)), rel=1e-5)
    tokenizer = hf.AutoTokenizer.from_pretrained(folder / "out")
    assert tokenizer.chat_template == hf.AutoTokenizer.from_pretrained(folder / "model").chat_template
    prompt = tokenizer("the", return_tensors="pt")
    text = model.generate(**prompt, max_new_tokens=5, do_sample=False)  # pyright: ignore[reportAttributeAccessIssue]
    assert text.shape[1] == prompt["input_ids"].shape[1] + 5


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_plan_needs_config_json_alone(family: str, tmp_path: Path, capsys: Any) -> None:
    zoo.config(family).save_pretrained(tmp_path)
    model = ["model=hf", f"model.path={tmp_path}", f"run.dir={tmp_path}/run"]
    assert main(["plan", *model, "parallel.tp=2", "train.seq_len=32"]) == 0
    assert "memory of a rank" in capsys.readouterr().out
    config = load_config([*model, "parallel.tp=2", "data.tokenizer=bytes", "verify.weights=random"])
    settle_engine(config, weights=config.verify.reads_weights)
    assert prepare(config)[2] == 2  # ranks of verify


def test_a_name_of_the_hub_is_fetched_once(folder: Path, tmp_path: Path) -> None:
    lines = ["model=hf", "model.path=someone/small", "model.revision=v1", "train.seq_len=32"]
    cache = {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    with hub("someone/small", folder / "model", "v1") as address:
        for line in ("parallel.tp=3", "train.seq_len=100000"):  # a mistake comes before the weights, which are large
            assert tptrain("config", *lines, line, timeout_s=150, HF_ENDPOINT=address, **cache).returncode == 2
        planned = tptrain("plan", *lines, timeout_s=150, HF_ENDPOINT=address, **cache)
        assert planned.returncode == 0, planned.stdout
        assert not list(tmp_path.rglob("*.safetensors"))
        fetched = tptrain("config", *lines, timeout_s=150, HF_ENDPOINT=address, **cache)
        unknown = tptrain("config", *lines[:1], "model.path=someone/else", timeout_s=150, HF_ENDPOINT=address, **cache)
    assert fetched.returncode == 0, fetched.stdout
    assert list(tmp_path.rglob("*.safetensors"))
    assert f"snapshots/{COMMIT}" in fetched.stdout
    assert unknown.returncode == 2
    assert "error: model.path=someone/else: " in unknown.stdout
    assert tptrain("config", *lines, timeout_s=150, **(cache | {"HF_HUB_OFFLINE": "1"})).returncode == 0


def test_an_imported_model_is_exported_as_it_was_and_gone_on_with(folder: Path) -> None:
    imported = folder / "imported"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "tptrain"]
    first = run(*torchrun, "import", str(folder / "model"), str(imported), "parallel.tp=2", "train.device=cpu")
    assert first.returncode == 0, first.stdout
    export(imported / "checkpoints" / "step-00000000", folder / "same")
    for file in (folder / "model").iterdir():
        if file.suffix != ".json":
            assert filecmp.cmp(file, folder / "same" / file.name, shallow=False), file.name
    launched = tptrain("launch", *_overrides(folder, 1, 1, "imported"), "checkpoint.export=last")
    assert launched.returncode == 0, launched.stdout
    assert "resuming from step-00000000 (saved by 2 ranks, tp=2)" in launched.stdout
    assert (imported / "exports" / "step-00000001" / "model.safetensors.index.json").exists()
    again = tptrain("import", str(folder / "model"), str(imported))
    assert again.returncode == 2
    assert "exists already" in again.stdout


@pytest.mark.slurm
@pytest.mark.usefixtures("slurm")
def test_on_slurm_it_is_the_same_run(folder: Path, run_dir: Path) -> None:
    """At tp=2, gone on with at tp=1, evaluated by two ranks under srun, exported."""
    for steps, tp in ((3, 2), (5, 1)):
        lines = [*_overrides(folder, steps, tp, "slurm"), "cluster=slurm", f"cluster.tasks_per_node={tp}"]
        assert wait_for_end(submit(*lines)) == "COMPLETED"
    slurm = folder / "slurm"
    assert losses(slurm)[:3] == losses(run_dir)[:3]
    assert losses(slurm)[3:] == pytest.approx(losses(run_dir)[3:5], rel=1e-5)
    data = [line for line in _overrides(folder, 5, 1) if line.startswith(("data", "train.device"))]
    evaluated = run("srun", "-n2", *TPTRAIN, "eval", str(slurm), "parallel.tp=2", *data)
    (line,) = (line for line in evaluated.stdout.splitlines() if line.startswith("{"))
    assert tptrain("export", str(slurm), str(folder / "slurm-out")).returncode == 0
    alone = tptrain("eval", "model=hf", f"model.path={folder}/slurm-out", "train.seq_len=32", *data)
    assert json.loads(line)["loss"] == pytest.approx(json.loads(alone.stdout.splitlines()[-1])["loss"], rel=1e-5)
