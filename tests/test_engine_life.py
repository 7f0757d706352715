"""engine=transformers without commands: a directory is read, trained, checkpointed, loaded elsewhere and exported at
several topologies, beside Transformers and torch.optim.AdamW; and mistakes are one message.

Four ranks run everything, as tp=1 x dp=4, tp=2 x dp=2 and tp=4, with ZeRO-1 where dp allows it.
"""

import contextlib
import filecmp
import io
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.corpus import write_corpus
from tests.directories import save_model, write_imported
from tests.distributed import mesh, run_ranks
from tests.families import FAMILIES
from tptrain.__main__ import main
from tptrain.checkpoint.export import export
from tptrain.checkpoint.load import load_newest, load_weights
from tptrain.checkpoint.pretrained import read_weights
from tptrain.checkpoint.save import Saver
from tptrain.config import Config, load_config
from tptrain.models import sizes
from tptrain.models.directory import adopt
from tptrain.nn.parameter import parameters
from tptrain.ops.table import REFERENCE
from tptrain.optim.adamw import Optimizer
from tptrain.optim.schedule import learning_rate
from tptrain.parallel.collectives import all_reduce_
from tptrain.parallel.mesh import Mesh
from tptrain.records.run_dir import step_folder
from tptrain.train.trainer import Trainer, build_model, cross_entropy

pytestmark = pytest.mark.filterwarnings("ignore::Warning:transformers")
# By family: bytes of a file. Mixtral's experts are one tensor each in the files, Qwen3-Next has linear attention,
# DeepSeek-V3 latent attention, and Sarvam's queries, keys and values are one tensor in the files.
SHARDS = {"mixtral": "450KB", "qwen3_next": "5GB", "deepseek_v3": "5GB", "sarvam_moe": "5GB"}
WORLD, VOCABULARY = 4, 300
STEPS, MORE = 3, 5  # to the checkpoint, and to the end
BATCH, LENGTH = 4, 24


# ---------------------------------------------------------------------------------------------------------- ingredients


@contextlib.contextmanager
def answered_here() -> Iterator[None]:
    """Questions about a model are answered in this process, which has imported Transformers already."""

    def answer(*_: Any, input: str, **__: Any) -> SimpleNamespace:
        from tptrain.hf import resolve

        out, errors = io.StringIO(), io.StringIO()
        with (
            patch.object(sys, "stdin", io.StringIO(input)),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(errors),
        ):
            code = resolve.main()
        logging.disable(logging.NOTSET)
        return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=errors.getvalue())

    with patch.object(sizes, "subprocess", SimpleNamespace(run=answer, TimeoutExpired=subprocess.TimeoutExpired)):
        yield


@pytest.fixture(params=SHARDS)
def family(request: pytest.FixtureRequest) -> str:
    from tests import zoo

    zoo.skip_where_missing(request.param)
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of each family that there is, and a text."""
    from tests import zoo

    folder = tmp_path_factory.mktemp("life")
    for family, shard in SHARDS.items():
        if not zoo.missing(family):
            zoo.model(family, vocab_size=VOCABULARY).save_pretrained(folder / family, max_shard_size=shard)
    write_corpus(folder, documents=20)
    return folder


def _config(folder: Path, family: str) -> Config:
    lines = ["model=hf", f"model.path={folder / family}", f"run.dir={folder / family}-run", "data.tokenizer=bytes"]
    lines += [f"train.seq_len={LENGTH}", f"train.global_batch_size={BATCH}", f"train.steps={MORE}", "train.device=cpu"]
    config = load_config([*lines, "train.micro_batch_size=1", "optim.lr=1e-3", "optim.warmup_steps=2"])
    with answered_here():
        sizes.settle_engine(config)
    return config


def _tokens() -> Tensor:
    """(MORE * BATCH, T + 1): the samples in their order."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, (MORE * BATCH, LENGTH + 1), generator=generator)


class Samples:
    """The data of a trainer, from memory."""

    def samples(self, start: int, count: int) -> np.ndarray:
        return _tokens()[start : start + count].numpy()

    def prefetch(self, start: int, count: int) -> None:
        pass


# ------------------------------------------------------------------------------------------------------------- on ranks


@dataclass
class Seen:
    """What ranks have seen of a family."""

    digests: dict[int, str] = field(default_factory=dict)  # by tp
    losses: dict[int, list[float]] = field(default_factory=dict)  # by tp, of steps from the directory on
    resumed: dict[int, list[float]] = field(default_factory=dict)  # by tp, of steps after the checkpoint
    cut: int = 0  # parameters of which a rank has a part, at tp=4


def _trainer(config: Config, tp: int) -> tuple[Trainer, Mesh]:
    grid = mesh(tp, sizes.sizes(config.model).kv_heads)  # type: ignore[union-attr]
    config = replace(config, parallel=replace(config.parallel, tp=tp, zero=1))
    model, store = build_model(config, grid, REFERENCE)
    optimizer = Optimizer(store, config.optim, grid, zero=True)
    trainer = Trainer(config, grid, cast(Any, Samples()), model, optimizer, cross_entropy(model, REFERENCE))
    return trainer, grid


def _losses(trainer: Trainer, grid: Mesh, steps: range) -> list[float]:
    values = []
    for step in steps:
        loss, _ = trainer.step(step)
        all_reduce_(loss, grid.group("dp")).wait()
        values.append(loss.item())
    return values


def _save(trainer: Trainer, grid: Mesh, step: int) -> None:
    saver = Saver(Path(trainer.config.run.dir) / "checkpoints", trainer.optimizer, trainer.config, "data", grid)
    saver.save(step)
    saver.finish()


def _on_ranks(configs: dict[str, Config]) -> dict[str, Seen]:
    seen = {family: Seen() for family in configs}
    for family, config in configs.items():
        for tp in (1, 2, 4):
            trainer, grid = _trainer(config, tp)
            fill = trainer.optimizer.state.fill
            seen[family].digests[tp] = read_weights(config.model, trainer.model, fill)
            trainer.optimizer.publish()
            if tp == 2:
                write_imported(config, grid, 0, torch.float32)
            seen[family].losses[tp] = _losses(trainer, grid, range(1, STEPS + 1))
            if tp == 2:
                _save(trainer, grid, STEPS)
            seen[family].losses[tp] += _losses(trainer, grid, range(STEPS + 1, MORE + 1))
        for tp in (1, 4):
            trainer, grid = _trainer(config, tp)
            lines: list[str] = []
            commit = load_newest(Path(config.run.dir) / "checkpoints", trainer.optimizer, grid, lines.append)
            assert commit is not None, lines
            assert (commit.step, commit.tp) == (STEPS, 2)
            evaluated, store = build_model(trainer.config, grid, REFERENCE)
            load_weights(step_folder(Path(config.run.dir) / "checkpoints", STEPS), store)
            pairs = zip(parameters(evaluated), parameters(trainer.model), strict=True)  # type: ignore[arg-type]
            assert all(torch.equal(p, own) for (_, p), (_, own) in pairs)
            seen[family].resumed[tp] = _losses(trainer, grid, range(STEPS + 1, MORE + 1))
            layouts = [p.sharding for p in trainer.model.parameters()]  # type: ignore[attr-defined]
            seen[family].cut = sum(each.local_shape != each.shape for each in layouts)
    return seen


@pytest.fixture(scope="module")
def configs(folder: Path) -> dict[str, Config]:
    configs = {family: _config(folder, family) for family in SHARDS if (folder / family).exists()}
    for config in configs.values():
        Path(config.run.dir).mkdir()
        adopt(config)
    return configs


@pytest.fixture(scope="module")
def seen(configs: dict[str, Config]) -> dict[str, Seen]:
    return run_ranks(WORLD, _on_ranks, configs)[0]


# ------------------------------------------------------------------------------------------------------------ one life


def _alone(config: Config) -> list[float]:
    """The losses of Transformers' model, trained by PyTorch's AdamW in this process."""
    import transformers as hf

    model = hf.AutoModelForCausalLM.from_pretrained(config.model.directory or "", dtype=torch.float32).train()
    named = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = ([p for p in named if (p.dim() > 1) == wanted] for wanted in (True, False))
    optim = config.optim
    groups = [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, betas=(optim.beta1, optim.beta2), eps=optim.eps)
    losses = []
    for step, batch in enumerate(_tokens().split(BATCH), 1):
        loss = _loss(model, batch)
        losses.append(loss.item())
        adamw.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(named, optim.grad_clip)
        for group in adamw.param_groups:
            group["lr"] = learning_rate(optim, step, config.train.steps)
        adamw.step()
    return losses


def _loss(model: Any, batch: Tensor) -> Tensor:
    """Nats a token of (B, T + 1) ids, a scalar."""
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits.float()  # (B, T, V)
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def test_the_digest_is_the_same_at_every_tp(seen: dict[str, Seen], family: str) -> None:
    assert len(set(seen[family].digests.values())) == 1
    assert seen[family].cut > 4  # embedding and head, and of each layer something


def test_training_is_that_of_transformers_at_every_tp(
    seen: dict[str, Seen], configs: dict[str, Config], family: str
) -> None:
    expected = _alone(configs[family])
    assert expected[-1] != pytest.approx(expected[0], rel=1e-3)
    for tp, losses in seen[family].losses.items():
        assert losses == pytest.approx(expected, rel=1e-5), f"tp={tp}"


def test_a_checkpoint_goes_on_at_another_tp(seen: dict[str, Seen], family: str) -> None:
    for tp, losses in seen[family].resumed.items():
        assert losses == pytest.approx(seen[family].losses[2][STEPS:], rel=1e-5), f"tp={tp}"


def _tensors(of: Path) -> dict[str, Tensor]:
    return {name: tensor for file in of.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.usefixtures("seen")
def test_an_untrained_export_is_the_directory(configs: dict[str, Config], family: str) -> None:
    source, run = Path(configs[family].model.directory or ""), Path(configs[family].run.dir)
    export(step_folder(run / "checkpoints", 0), run / "same")
    assert {file.name for file in source.iterdir()} == {file.name for file in (run / "same").iterdir()}
    assert len(list(source.glob("*.safetensors"))) == (2 if family == "mixtral" else 1)
    for file in source.iterdir():
        if file.name != "model.safetensors.index.json":
            assert filecmp.cmp(file, run / "same" / file.name, shallow=False), file.name


def test_a_trained_export_is_what_transformers_loads(
    seen: dict[str, Seen], configs: dict[str, Config], family: str
) -> None:
    import transformers as hf

    source, run = Path(configs[family].model.directory or ""), Path(configs[family].run.dir)
    export(step_folder(run / "checkpoints", STEPS), run / "out")
    before, after = _tensors(source), _tensors(run / "out")
    assert before.keys() == after.keys()
    assert all((x.shape, x.dtype) == (after[name].shape, after[name].dtype) for name, x in before.items())
    assert any(not torch.equal(x, after[name]) for name, x in before.items())
    assert (source / "config.json").read_bytes() == (run / "out" / "config.json").read_bytes()
    loaded: Any = hf.AutoModelForCausalLM.from_pretrained(run / "out", output_loading_info=True)
    model, report = loaded
    assert not any(report[each] for each in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    with torch.no_grad():
        loss = _loss(model.train(), _tokens().split(BATCH)[STEPS]).item()
    assert loss == pytest.approx(seen[family].losses[2][STEPS], rel=1e-5)


def test_a_mask_that_a_model_has_changed_is_no_window() -> None:
    """Gemma 4 makes another mask out of one with a window: what that is, SDPA is to know."""
    from tptrain.hf.attention import WindowMask, attention

    window = torch.ones(6, 6, dtype=torch.bool).tril().triu(-2)[None, None].as_subclass(WindowMask)
    window.window = 3
    other = window & torch.ones(6, 6, dtype=torch.bool).triu(-1)  # (1, 1, T, T)
    q, k, v = torch.randn(3, 1, 2, 6, 8, generator=torch.Generator().manual_seed(0))
    module: Any = torch.nn.Identity()
    module.operations = REFERENCE
    for mask in (window, other):
        expected = F.scaled_dot_product_attention(q, k, v, mask.as_subclass(Tensor)).transpose(1, 2)
        torch.testing.assert_close(attention(module, q, k, v, mask)[0], expected)


# ------------------------------------------------------------------------------------------------------------- mistakes


def _change_tensors(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(of: Path) -> None:
        file = of / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return damage


def _edit(**changes: Any) -> Callable[[Path], None]:
    def damage(of: Path) -> None:
        settings = json.loads((of / "config.json").read_text()) | changes
        (of / "config.json").write_text(json.dumps(settings))

    return damage


EXPERT = "model.layers.1.mlp.experts.2.down_proj.weight"  # of those that Transformers stacks
# What is wrong: what is done to a directory of DeepSeek-V3, what the command line has beside it, and the message.
MISTAKES: dict[str, tuple[Callable[[Path], None], list[str], str]] = {
    "missing": (
        _change_tensors(lambda tensors: tensors.pop("model.norm.weight")),
        [],
        "lacks the tensor model.norm.weight",
    ),
    "missing expert": (
        _change_tensors(lambda tensors: tensors.pop(EXPERT)),
        [],
        "tensors that make model.layers.1.mlp.experts.down_proj",
    ),
    "extra": (
        _change_tensors(lambda tensors: tensors.update({"model.layers.0.mlp.router.weight": torch.ones(2)})),
        [],
        "has the tensor model.layers.0.mlp.router.weight",
    ),
    "wrong shape": (
        _change_tensors(lambda tensors: tensors.update({"model.norm.weight": torch.ones(65)})),
        [],
        "has model.norm.weight of [65], where config.json asks for [64]",
    ),
    "wrong shape of an expert": (
        _change_tensors(lambda tensors: tensors.update({EXPERT: torch.ones(64, 3)})),
        [],
        f"has {EXPERT} of [64, 3], where others like it have [64, ",
    ),
    "unknown family": (_edit(model_type="perceptron"), [], "model_type='perceptron'"),
    "quantized": (_edit(quantization_config={"quant_method": "fp8"}), [], "its weights are quantized"),
    "dropout": (_edit(attention_dropout=0.1), [], "Add model.dropout=0."),
    "sequence parallel": (_edit(), ["parallel.sequence_parallel=true"], "parallel.sequence_parallel: only tptrain's"),
    "overlap": (_edit(), ["parallel.overlap=true"], "parallel.overlap: only tptrain's own"),
    "selective": (_edit(), ["train.recompute=selective"], "Use train.recompute=full."),
    "unknown module": (
        _edit(),
        ["+model.tp_plan={layers.*.mlp.sideways_proj: colwise}"],
        "no module or parameter layers.*.mlp.sideways_proj",
    ),
    "unknown style": (
        _edit(),
        ["+model.tp_plan={layers.*.self_attn.o_proj: diagonal}"],
        "model.layers.*.self_attn.o_proj is to be diagonal, which is none of colwise",
    ),
    "tp": (_edit(), ["parallel.tp=3"], "parallel.tp=3: does not divide"),
    "native": (_edit(), ["model.engine=native"], "model_type='deepseek_v3', which is none of"),
}


def _refused(lines: list[str], run: Path, capsys: pytest.CaptureFixture[str], message: str) -> None:
    """`launch` with these lines is exit code 2 and one message, and leaves nothing."""
    corpus = run.parent / "corpus.jsonl"
    corpus.write_text('{"text": "some words"}\n')
    lines = [*lines, f"run.dir={run}", "data.tokenizer=bytes", "data=files", f"data.files=[{corpus}]"]
    capsys.readouterr()  # a bar of Transformers
    with answered_here():
        code = main(["launch", *lines, "train.seq_len=16", "train.global_batch_size=4"])
    errors = capsys.readouterr().err
    assert code == 2, errors
    (line,) = (line for line in errors.splitlines() if not line.startswith("model.engine="))
    assert line.startswith("error: ")
    assert message in line
    assert not run.exists()


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_one_message(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    damage, lines, message = MISTAKES[kind]
    shutil.copytree(folder / "deepseek_v3", tmp_path / "model")
    damage(tmp_path / "model")
    _refused(["model=hf", f"model.path={tmp_path}/model", *lines], tmp_path / "run", capsys, message)


def test_a_missing_tensor_is_missed_where_another_is_taken_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sarvam's queries, keys and values are one tensor in the files and three in the model."""
    from tests import zoo

    zoo.model("sarvam_moe", vocab_size=VOCABULARY).save_pretrained(tmp_path / "model")
    lines = ["model=hf", f"model.path={tmp_path}/model", "data.tokenizer=bytes", f"run.dir={tmp_path}/run"]
    with answered_here():
        assert main(["config", *lines, "train.seq_len=16"]) == 0, capsys.readouterr().err
    _change_tensors(lambda tensors: tensors.pop("model.norm.weight"))(tmp_path / "model")
    sizes._ask.cache_clear()  # of the same directory as it was
    _refused(lines[:2], tmp_path / "run", capsys, "lacks the tensor model.norm.weight")


def test_an_engine_is_of_its_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _refused(["model.engine=transformers"], tmp_path / "run", capsys, "model.engine: only model=hf reads it.")
    save_model(FAMILIES["llama"], tmp_path / "llama")
    lines = ["model=hf", f"model.path={tmp_path}/llama", "+model.tp_plan={layers.*.mlp.up_proj: colwise}"]
    _refused(lines, tmp_path / "run", capsys, "model.tp_plan: tptrain's own models need none.")


def test_dropout_can_be_switched_off(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(folder / "deepseek_v3", tmp_path / "model")
    _edit(attention_dropout=0.1)(tmp_path / "model")
    lines = ["model=hf", f"model.path={tmp_path}/model", "model.dropout=0", "data.tokenizer=bytes"]
    with answered_here():
        assert main(["config", *lines, f"run.dir={tmp_path}/run", "train.seq_len=16"]) == 0, capsys.readouterr().err


def test_the_engine_and_its_reason_are_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests import zoo

    zoo.model("llama", vocab_size=VOCABULARY).save_pretrained(tmp_path / "llama")
    reasons = {
        folder / "mixtral": "model.engine=transformers: config.json has model_type='mixtral', which is none of gemma2,",
        tmp_path / "llama": "model.engine=native: all of its config.json is known",
    }
    for path, reason in reasons.items():
        lines = ["model=hf", f"model.path={path}", f"run.dir={tmp_path}/run", "data.tokenizer=bytes", "data=stdlib"]
        capsys.readouterr()
        with answered_here():
            assert main(["config", *lines, "train.seq_len=16", "train.global_batch_size=4"]) == 0
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(reason)
