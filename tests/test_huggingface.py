"""Hugging Face directories in and out: the same bytes, whatever the topology, and nothing of them executed."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.run_dir import claim
from tests.directories import save_model, save_tokenizer, write_imported
from tests.distributed import mesh, run_ranks
from tests.families import FAMILIES
from tests.models import training
from tptrain.checkpoint.export import export
from tptrain.checkpoint.huggingface import load_pretrained
from tptrain.checkpoint.index import INDEX, PICKLED, Index
from tptrain.checkpoint.save import Saver
from tptrain.config import Config, UserError, load_config, validate, write_config
from tptrain.models.check import check_model
from tptrain.models.directory import adopt
from tptrain.models.settings import decoder_spec
from tptrain.records.run_dir import step_folder

ROUND_TRIPS = {name: case for name, case in FAMILIES.items() if "," not in name or "tied" in name}


def _config(source: Path, run_dir: Path) -> Config:
    dropout = ["model.dropout=0"] if "gpt2" in (source / "config.json").read_text() else []
    lines = ["model=hf", f"model.path={source}", f"run.dir={run_dir}", "train.device=cpu", "train.seq_len=16"]
    return load_config([*lines, *dropout])


# ----------------------------------------------------------------------------------------------------- in and out again


def _import_all(configs: dict[str, Config]) -> dict[str, str]:
    """On one of two ranks: make a checkpoint of each directory, one of them by way of a run that has read it; returns
    the digests.
    """
    digests = {}
    for name, config in configs.items():
        grid = mesh(2, decoder_spec(config.model).kv_heads)
        tiny = training(config.model, grid, zero=True)
        digests[name] = load_pretrained(config.model, tiny.model, tiny.optimizer.state.fill)
        if name == "qwen3":
            saver = Saver(Path(config.run.dir) / "checkpoints", tiny.optimizer, config, "data", grid)
            saver.save(1)
            saver.finish()
        else:
            write_imported(config, grid, 1, torch.bfloat16)
    return digests


@pytest.fixture(scope="module")
def round_trips(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, tuple[Path, Path]], list[dict[str, str]]]:
    """Source and exported directory of every family, in bf16 and in several files; and the digests by rank."""
    root = tmp_path_factory.mktemp("hf")
    configs, results = {}, {}
    save_tokenizer(root / "tokenizer")
    for number, (name, case) in enumerate(ROUND_TRIPS.items()):
        source, run_dir = root / f"source-{number}", root / f"run-{number}"
        save_model(case, source, torch.bfloat16, shard="100KB")
        shutil.copytree(root / "tokenizer", source, dirs_exist_ok=True)
        run_dir.mkdir()
        config = _config(source, run_dir)
        validate(config)
        check_model(config)
        adopt(config)
        configs[name] = config
    digests = run_ranks(2, _import_all, configs)
    for name, config in configs.items():
        run_dir = Path(config.run.dir)
        export(step_folder(run_dir / "checkpoints", 1), run_dir / "out")
        results[name] = Path(config.model.directory or ""), run_dir / "out"
    return results, digests


def _tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("family", ROUND_TRIPS)
def test_what_goes_in_comes_out(round_trips: Any, family: str) -> None:
    source, out = round_trips[0][family]
    before, after = _tensors(source), _tensors(out)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype == torch.bfloat16
        assert torch.equal(tensor.view(torch.int16), after[name].view(torch.int16)), name
    assert {file.name for file in source.iterdir()} == {file.name for file in out.iterdir()}
    for file in source.iterdir():
        if not file.name.startswith("model"):
            assert (out / file.name).read_bytes() == file.read_bytes(), file.name


def test_transformers_loads_what_comes_out(round_trips: Any) -> None:
    import transformers as hf

    source, out = round_trips[0]["gemma2"]
    tokens = torch.arange(20).view(1, -1)
    models = [hf.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval() for folder in (source, out)]
    with torch.no_grad():
        assert torch.equal(models[0](tokens).logits, models[1](tokens).logits)
    assert hf.AutoTokenizer.from_pretrained(out).encode("aba")[0] == 0


def _digest(source: str, run_dir: str, tp: int) -> str:
    config = _config(Path(source), Path(run_dir))
    tiny = training(config.model, mesh(tp, 2))
    return load_pretrained(config.model, tiny.model, tiny.optimizer.state.fill)


def test_the_digest_is_of_the_weights_and_not_of_the_topology(round_trips: Any, tmp_path: Path) -> None:
    (source, _), digests = round_trips[0]["qwen3"], [rank["qwen3"] for rank in round_trips[1]]
    assert len(set(digests)) == 1
    assert _digest(str(source), str(tmp_path), 1) == digests[0]
    other = shutil.copytree(source, tmp_path / "other")
    file = next(other.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] += 1.0
    save_file(tensors, file, metadata={"format": "pt"})
    assert _digest(str(other), str(tmp_path), 1) != digests[0]


def test_a_model_that_was_saved_without_its_prefix_is_read(round_trips: Any, tmp_path: Path) -> None:
    """As GPT-2 is on the hub: `wte.weight` for `transformer.wte.weight`, and with the masks that it once kept."""
    source, _ = round_trips[0]["gpt2"]
    other = tmp_path / "other"
    shutil.copytree(source, other, ignore=shutil.ignore_patterns("model*"))
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in _tensors(source).items()}
    save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}, other / "model.safetensors")
    assert _digest(str(other), str(tmp_path), 1) == round_trips[1][0]["gpt2"]


def test_nothing_is_written_over(round_trips: Any) -> None:
    _, out = round_trips[0]["llama"]
    before = sorted((file.name, file.stat().st_mtime_ns) for file in out.iterdir())
    with pytest.raises(UserError, match="exists already"):
        export(step_folder(out.parent / "checkpoints", 1), out)
    assert sorted((file.name, file.stat().st_mtime_ns) for file in out.iterdir()) == before


# -------------------------------------------------------------------------------------------------- damaged directories


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A sound directory of one file, to be damaged."""
    folder = tmp_path / "model"
    save_model(FAMILIES["llama"], folder)
    save_tokenizer(folder)
    return folder


def _header(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def _rewrite(file: Path, header: dict[str, Any] | str, data: bytes) -> None:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def _change_entry(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        header, data = _header(folder / "model.safetensors")
        header["model.norm.weight"] |= changes
        _rewrite(folder / "model.safetensors", header, data)

    return damage


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _lengthen(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"more")


def _huge_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes((2**60).to_bytes(8, "little") + file.read_bytes()[8:])


def _double(folder: Path) -> None:
    header, data = _header(folder / "model.safetensors")
    text = json.dumps(header)
    entry = json.dumps({"model.norm.weight": header["model.norm.weight"]})
    _rewrite(folder / "model.safetensors", text[:-1] + ", " + entry[1:], data)


def _without(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        save_file({key: tensor for key, tensor in tensors.items() if key != name}, folder / "model.safetensors")

    return damage


def _extra(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.layers.0.mlp.router.weight": torch.ones(2)}, folder / "model.safetensors")


def _wrong_shape(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.norm.weight": torch.ones(65)}, folder / "model.safetensors")


def _index_that_leaves(folder: Path) -> None:
    names = {name: "../model/model.safetensors" for name in load_file(folder / "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def _pickles_only(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


def _large_config(folder: Path) -> None:
    with (folder / "config.json").open("wb") as file:
        file.truncate(2**30)


def _edit_config(**changes: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (_truncate, "truncated"),
    "something behind": (_lengthen, "something behind it"),
    "huge header": (_huge_header, "truncated or no safetensors file"),
    "doubled": (_double, "comes twice"),
    "missing": (_without("model.norm.weight"), "lacks the tensor model.norm.weight"),
    "extra": (_extra, "has the tensor model.layers.0.mlp.router.weight"),
    "wrong type": (_change_entry(dtype="I8"), "in I8"),
    "overlap": (_change_entry(data_offsets=[0, 256]), "overlap"),
    "wrong length": (_change_entry(shape=[63]), "bytes for model.norm.weight"),
    "negative": (_change_entry(shape=[-64]), "damaged entry"),
    "index that leaves": (_index_that_leaves, "which is not in the directory"),
    "pickles only": (_pickles_only, "pickles are not read"),
    "large config": (_large_config, "config.json has 1,073,741,824 bytes"),
    "unknown field": (_edit_config(clip_qkv=8.0), "has the field clip_qkv=8.0"),
    "unknown family": (_edit_config(model_type="mamba"), "has model_type='mamba'"),
    "images": (_edit_config(model_type="gemma3", text_config={"model_type": "gemma3_text"}), "of images and text"),
    "quantized": (_edit_config(quantization_config={"quant_method": "gptq"}), r"quantized \(gptq\)"),
    "no number": (_edit_config(rms_norm_eps="small"), "rms_norm_eps='small', which is no int or float"),
    "unknown rope": (_edit_config(rope_parameters={"rope_type": "spiral"}), "rope_type='spiral'"),
    "small vocabulary": (_edit_config(vocab_size=100), "has 250 tokens, more than model.vocab_size=100"),
    "dropout": (_edit_config(attention_dropout=0.1), "model.dropout=0"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_directory_is_refused_before_anything_runs(model: Path, tmp_path: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    damage(model)
    with pytest.raises(UserError, match=message):
        check_model(_config(model, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_tensor_of_another_shape_is_refused(model: Path, tmp_path: Path) -> None:
    _wrong_shape(model)
    with pytest.raises(UserError, match=r"model.norm.weight of \[65\], where config.json asks for \[64\]"):
        _digest(str(model), str(tmp_path), 1)


def test_dropout_can_be_switched_off(model: Path, tmp_path: Path) -> None:
    _edit_config(attention_dropout=0.1)(model)
    config = _config(model, tmp_path / "run")
    config.model.dropout = 0.0
    check_model(config)


def test_a_field_that_says_nothing_is_no_quantization(model: Path, tmp_path: Path) -> None:
    _edit_config(quantization_config=None)(model)
    check_model(_config(model, tmp_path / "run"))


def test_a_full_disk_leaves_no_half_of_a_copy(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy, full = shutil.copyfile, [True]

    def copyfile(source: Path, target: Path) -> None:
        copy(source, target)
        if full:
            raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    with pytest.raises(UserError, match="No space left on device"):
        claim(_config(model, tmp_path / "run"))
    full.clear()
    (tmp_path / "run" / ".model").mkdir()  # as where a launch was killed within the copy
    claim(_config(model, tmp_path / "run"))
    assert sorted(entry.name for entry in (tmp_path / "run").iterdir()) == [".secret", "config.yaml", "logs", "model"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["model=hf"], "model.path: not set"),
        (["model=hf", "model.path=/nowhere"], "no such directory"),
        (["model=hf", "model.path=MODEL", "model.hidden_size=8"], "config.json decides on it"),
        (["model.path=MODEL"], "only model=hf reads it"),
        (["model=hf", "model.path=MODEL", "model.source.vocab_size=3"], "unknown key"),
        (["model=hf", "model.path=MODEL", "model.directory=/tmp"], "follows from model.path"),
        (["model=hf", "model.path=MODEL/.."], "has no config.json"),
        (["data.tokenizer=model"], "only model=hf has one"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(model: Path, lines: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config([line.replace("MODEL", str(model)) for line in lines])


# -------------------------------------------------------------------------------------------- what is in a checkpoint


class Trap:
    """A pickle that leaves a file where it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    config = load_config([f"run.dir={tmp_path / 'run'}"])
    tiny = training(config.model, mesh(1))
    saver = Saver(tmp_path / "run" / "checkpoints", tiny.optimizer, config, "data", mesh(1))
    saver.save(1)
    saver.finish()
    write_config(config, tmp_path / "run" / "config.yaml")
    return step_folder(tmp_path / "run" / "checkpoints", 1)


def test_a_pickle_in_the_metadata_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / INDEX).unlink()
    (checkpoint / PICKLED).write_bytes(pickle.dumps(Trap(tmp_path / "trapped")))
    with pytest.raises(Exception, match="index is damaged"):
        Index(checkpoint)
    assert not (tmp_path / "trapped").exists()


def test_a_pickle_in_place_of_a_tensor_is_not_run(checkpoint: Path, tmp_path: Path) -> None:
    index = Index(checkpoint)
    chunk = index.tensors["model/norm.weight"].chunks[0]
    trap = pickle.dumps(Trap(tmp_path / "trapped"))
    with (checkpoint / chunk.file).open("r+b") as file:
        file.seek(chunk.start)
        file.write(trap)
    with pytest.raises(Exception, match="is no tensor"):
        index.load({"model/norm.weight": torch.empty(index.tensors["model/norm.weight"].shape)})
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("change", [{"file": "../../elsewhere.distcp"}, {"offsets": [5]}, {"start": -1}])
def test_an_index_that_leaves_the_checkpoint_is_refused(checkpoint: Path, change: dict[str, Any]) -> None:
    content = json.loads((checkpoint / INDEX).read_text())
    content["model/norm.weight"]["chunks"][0] |= change
    (checkpoint / INDEX).write_text(json.dumps(content))
    with pytest.raises(Exception, match="index is damaged"):
        Index(checkpoint)
