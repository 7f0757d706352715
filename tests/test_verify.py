"""`verify`: right models are found right, and each fault is found in its module, with its kind."""

import dataclasses
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.commands import tptrain
from tests.corpus import overrides
from tests.directories import save_model, save_tokenizer
from tests.distributed import mesh, run_ranks
from tests.families import FAMILIES
from tests.parity import MUTATIONS
from tptrain.config import Config, ModelConfig
from tptrain.config.schema import ParallelConfig
from tptrain.models.cut import BATCHES, SEQUENCES, Cut, cut
from tptrain.models.settings import decoder_spec
from tptrain.nn.context import Context
from tptrain.nn.decoder import Decoder
from tptrain.nn.parameter import Parameter, initial_values, parameter, parameters
from tptrain.ops.table import REFERENCE
from tptrain.optim.adamw import Optimizer
from tptrain.verify import step as module
from tptrain.verify.compare import Comparison
from tptrain.verify.prove import prove, write_reference
from tptrain.verify.reference import Reference
from tptrain.verify.step import Step, token_ids

TP = 2


def config_of(tied: bool = False) -> Config:
    """Everything that a fault can be in: biases, norms of queries and keys, one KV head for two ranks."""
    config = Config(parallel=ParallelConfig(tp=TP))
    config.model = ModelConfig(
        vocab_size=60,  # padded to 128: the second rank has no row of it
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        intermediate_size=96,
        attention_bias=True,
        mlp_bias=True,
        qk_norm=True,
        tie_word_embeddings=tied,
    )
    return config


# --------------------------------------------------------------------------------------------------------------- faults


def _changed(change: Callable[[Decoder], None]) -> AbstractContextManager:
    """A model that is changed before it gets its memory."""

    def build(*arguments: Any) -> Decoder:
        model = Decoder(*arguments)
        change(model)
        return model

    return patch.object(module, "Decoder", build)


def _summed(name: str, axes: tuple[str, ...]) -> AbstractContextManager:
    """A parameter whose gradient is said to be a sum over these axes."""

    def change(model: Decoder) -> None:
        p = dict(parameters(model))[name]
        p.sharding = dataclasses.replace(p.sharding, summed=axes)

    return _changed(change)


def _drawn(change: Callable[[str, Parameter, int], torch.Tensor | None]) -> AbstractContextManager:
    """Weights at the start that are, where `change` gives some, others."""

    def values(name: str, p: Parameter, seed: int) -> torch.Tensor:
        other = change(name, p, seed)
        return initial_values(name, p, seed) if other is None else other

    return patch.object(module, "initial_values", values)


def _off_by_one() -> AbstractContextManager:
    def change(name: str, p: Parameter, seed: int) -> torch.Tensor | None:
        if name != "layers.1.self_attn.o_proj.weight" or p.sharding.offsets[1] == 0:
            return None
        first, layout = p.sharding.offsets[1] - 1, p.sharding
        p.sharding = dataclasses.replace(layout, offsets=(0, first))
        values = initial_values(name, p, seed)
        p.sharding = layout
        return values

    return _drawn(change)


def _packed_cut_as_one() -> AbstractContextManager:
    """gate|up as one tensor, of which each rank takes its rows: on the first the gate's, on the second the up's."""

    def change(name: str, p: Parameter, seed: int) -> torch.Tensor | None:
        if not name.startswith("layers.0.mlp.") or not name.endswith(("gate_proj.weight", "up_proj.weight")):
            return None
        layout, half = p.sharding, p.sharding.local_shape[0]
        source = "gate_proj" if layout.offsets[0] == 0 else "up_proj"
        p.sharding = dataclasses.replace(layout, offsets=(0 if "gate_proj" in name else half, 0))
        values = initial_values(f"layers.0.mlp.{source}.weight", p, seed)
        p.sharding = layout
        return values

    return _drawn(change)


def _lost_rope() -> AbstractContextManager:
    right = Context.rotation

    def rotation(self: Context, *arguments: Any) -> Any:
        return torch.zeros_like(right(self, *arguments))

    return patch.object(Context, "rotation", rotation)


def _untied() -> AbstractContextManager:
    def change(model: Decoder) -> None:
        model.lm_head.weight = parameter(model.mesh, model.embed_tokens.weight.sharding)

    return _changed(change)


def _stale() -> AbstractContextManager:
    right = Optimizer.step

    def step(self: Optimizer, *arguments: Any) -> None:
        p = dict(parameters(self.state.store.model))["layers.1.mlp.up_proj.weight"]
        before = p.detach().clone()
        right(self, *arguments)
        p.data.copy_(before)

    return patch.object(Optimizer, "step", step)


def _absent() -> AbstractContextManager:
    right = Parameter.add_grad

    def add_grad(self: Parameter, grad: torch.Tensor) -> None:
        right(self, grad * 0 if self.sharding.shape == (64,) and self.init_std == module.NEAR else grad)

    return patch.object(Parameter, "add_grad", add_grad)


# fault: what makes it, and the module and the beginning of the kind that are to be named
FAULTS: dict[str, tuple[Callable[[], AbstractContextManager], str, str]] = {
    "q_norm's gradient not summed": (
        lambda: _summed("layers.1.self_attn.q_norm.weight", ()),
        "layers.1.self_attn.q_norm.weight",
        "a sum over tp is missing",
    ),
    "KV replica counted twice": (
        lambda: _summed("layers.1.self_attn.k_proj.weight", ("kv", "kv")),
        "layers.1.self_attn.k_proj.weight",
        "2 times too large",
    ),
    "bias added on every rank": (
        MUTATIONS["add the row-parallel bias on every rank"],
        "layers.0.self_attn",
        "off by the same vector at every token: a bias",
    ),
    "forward sum dropped": (MUTATIONS["drop the forward sum"], "layers.0.self_attn", "a sum over tp is missing"),
    "mean instead of sum": (MUTATIONS["average instead of sum"], "layers.0.self_attn", "1/2 of it: a mean"),
    "packed gate|up cut as one": (
        _packed_cut_as_one,
        "layers.0.mlp.gate_proj.weight",
        "a wrong slice: these are rows of layers.0.mlp.up_proj",
    ),
    "row slice off by one": (_off_by_one, "layers.1.self_attn.o_proj.weight", "a wrong slice: column 31 of the whole"),
    "rope lost": (_lost_rope, "layers.0.self_attn", ""),
    "stale weight": (_stale, "layers.1.mlp.up_proj.weight", "stale: unchanged by the step"),
    "norm counted on every rank": (
        MUTATIONS["count replicated norms on every rank"],
        "gradient norm",
        "the gradients are right: those that several ranks hold alike are counted more than once",
    ),
    "backward all-reduce dropped": (
        MUTATIONS["drop the backward all-reduce"],
        "layers.1.post_attention_layernorm.weight",
        "a sum over tp is missing",
    ),
    "no gradient": (_absent, "norm.weight", "absent"),
}


# ---------------------------------------------------------------------------------------------------------------- proof


def _smaller(config: Config) -> Cut:
    return cut(decoder_spec(config.model), TP)


def _reference(config: Config, folder: Path, dp: int = 1) -> Reference:
    small = _smaller(config)
    alone = dataclasses.replace(config, parallel=ParallelConfig(zero=0))
    step = Step(small, alone, mesh(1, small.spec.kv_heads), REFERENCE)
    step.draw()
    reference = Reference(folder)
    write_reference(step, token_ids(small, SEQUENCES * BATCHES * dp, 0), reference)
    return reference


def _prove(config: Config, folder: Path) -> list[Comparison]:
    small = _smaller(config)
    grid = mesh(TP, small.spec.kv_heads, shared=True, sequence_parallel=config.parallel.sequence_parallel)
    step = Step(small, config, grid, REFERENCE)
    step.draw()
    tokens = token_ids(small, SEQUENCES * BATCHES * grid.size("dp"), 0)
    return prove(step, tokens, Reference(folder), grid, torch.float32)


def _with_faults(config: Config, folder: Path, faults: list[str]) -> dict[str, list[Comparison]]:
    results = {}
    for fault in faults:
        with FAULTS[fault][0]() if fault in FAULTS else nullcontext():
            results[fault] = _prove(config, folder)
    return results


@pytest.fixture(scope="module")
def proofs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Comparison]]:
    """Of a right model and of every fault, on two ranks."""
    config, folder = config_of(), tmp_path_factory.mktemp("reference")
    _reference(config, folder)
    return run_ranks(TP, _with_faults, config, folder, ["none", *FAULTS])[0]


def test_a_right_model_is_right(proofs: dict[str, list[Comparison]]) -> None:
    items = proofs["none"]
    assert all(each.right for each in items)
    named = {each.module for each in items}
    assert {"embed_tokens", "layers.0.self_attn", "layers.1.mlp", "norm", "lm_head", "gradient norm"} <= named
    assert {each.what for each in items if each.module == "layers.1.self_attn.q_norm.weight"} == {
        "at the start",
        "gradient",
        "after the step",
    }


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(proofs: dict[str, list[Comparison]], fault: str) -> None:
    first = next(each for each in proofs[fault] if not each.right)
    _, name, kind = FAULTS[fault]
    assert (first.module, first.kind[: len(kind)]) == (name, kind), first


def test_tied_weights_that_come_apart_are_named(tmp_path: Path) -> None:
    config = config_of(tied=True)
    _reference(config, tmp_path)
    right, wrong = run_ranks(TP, _tied, config, tmp_path)[0]
    assert all(each.right for each in right)
    first = next(each for each in wrong if not each.right)
    assert (first.module, first.kind) == (
        "lm_head.weight",
        "one rank has no such parameter: tied weights that have come apart",
    )


def _tied(config: Config, folder: Path) -> tuple[list[Comparison], list[Comparison]]:
    right = _prove(config, folder)
    with _untied():
        return right, _prove(config, folder)


# -------------------------------------------------------------------------------------------------------------- command


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Phi-3: q, k, v are one tensor of its files, gate and up another."""
    folder = tmp_path_factory.mktemp("packed") / "phi"
    save_model(FAMILIES["phi3"], folder)
    save_tokenizer(folder)
    (folder / "README.md").write_text("# Phi\n")
    return folder


def test_a_directory_is_verified_then_trained_then_exported_with_its_card(packed: Path) -> None:
    run = packed.parent / "run"
    model = ["model=hf", f"model.path={packed}", "parallel.tp=2", f"run.dir={run}"]
    done = tptrain("verify", *model, "cluster.tasks_per_node=4", "train.recompute=full")
    assert done.returncode == 0, done.stdout
    assert "memory: about" in done.stdout
    assert "right: tp=2 dp=2 zero=1 recompute=full gives what one rank gives" in done.stdout
    seen = json.loads((run / "verification.json").read_text())
    assert (seen["verdict"], seen["weights"], seen["device"]) == ("right", "the model's own", "CPU")
    named = {item["module"] for item in seen["items"]}
    assert {"layers.0", "layers.1.mlp.gate_proj.weight", "gradient norm"} <= named
    assert all(item["distance"] <= item["allowed"] for item in seen["items"])
    assert not (run / ".verify").exists()

    lines = [each for each in overrides(packed.parent, "run") if not each.startswith(("model", "run.", "train.seq"))]
    trained = tptrain("launch", *lines, *model, "train.steps=2", "train.seq_len=24")
    assert trained.returncode == 0, trained.stdout
    assert tptrain("export", str(run), f"{packed}-out").returncode == 0
    readme = Path(f"{packed}-out/README.md").read_text()
    assert readme.startswith("# Phi\n\n## Verification of training\n")
    assert "**right: tp=2 dp=2" in readme

    checked = tptrain("verify", str(run))
    assert checked.returncode == 0, checked.stdout
    assert "step-00000002: whole: " in checked.stdout
    (file,) = (run / "checkpoints" / "step-00000002").glob("__1_0.distcp")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    checked = tptrain("verify", str(run / "checkpoints" / "step-00000002"))
    assert checked.returncode == 1
    assert "step-00000002: damaged: __1_0.distcp: checksum " in checked.stdout


def test_a_wrong_model_is_exit_code_1(tmp_path: Path) -> None:
    """Ranks whose Python, from its start, drops the sum of every row-parallel linear."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('WORLD_SIZE') == '2':\n"
        "    from tptrain.parallel import collectives\n"
        "    collectives.sum_partial = lambda x, group, sequence_parallel: (x.clone(), collectives.NOTHING)\n"
    )
    lines = ["model=llama3_8b", "verify.width=64", "verify.vocab=300", f"run.dir={tmp_path}/run", "parallel.tp=2"]
    done = tptrain("verify", *lines, PYTHONPATH=f"{tmp_path}:{Path(__file__).parent.parent}")
    assert done.returncode == 1, done.stdout
    assert "width 64 for 4096, vocabulary 300 for 128256" in done.stdout
    assert "wrong: embed_tokens: its output is" in done.stdout
    assert "a sum over tp is missing" in done.stdout
    assert "**wrong: embed_tokens" in (tmp_path / "run" / "verification.md").read_text()


def test_it_starts_its_ranks_by_itself() -> None:
    done = tptrain("verify", "parallel.tp=2", WORLD_SIZE="2")
    assert done.returncode == 2
    assert done.stdout.startswith("error: verify: starts its ranks by itself")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["parallel.tp=3"], "error: parallel.tp=3: does not divide model.num_attention_heads=8."),
        (
            ["verify.weights=model"],
            "verify.weights=model: only model=hf has weights. Use verify.weights=random.",
        ),
        (["verify.width=4096"], "error: verify.width=4096: more than the model's 192. Leave it out."),
        (["verify.witdh=64"], "error: verify.witdh: unknown key. Did you mean verify.width?"),
        (["parallel.tp=2", "cluster.tasks_per_node=3"], "error: parallel.tp=2: does not divide the 3 ranks."),
        (["model=llama3_70b", "train.device=cpu", "model.hidden_size=65536"], "Shrink the model with verify.width=512"),
        (["nowhere"], "error: nowhere: no run of that name or directory"),
    ],
)
def test_a_mistake_is_one_message(tmp_path: Path, lines: list[str], message: str) -> None:
    done = tptrain("verify", *lines, *([] if "nowhere" in lines else [f"run.dir={tmp_path}/run"]))
    assert done.returncode == 2, done.stdout
    errors = [line for line in done.stdout.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not list(tmp_path.rglob("*.npy"))
