"""The table of operations: every backend has every name, and every name a rule for the meta device."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.utils._pytree import tree_leaves, tree_map

from tptrain.config import UserError
from tptrain.ops.choose import choose
from tptrain.ops.meta import meta_table
from tptrain.ops.node_cache import node_cache
from tptrain.ops.table import REFERENCE, Operations

N, D, F, B, T, H, K, d, c, v = 6, 8, 4, 2, 3, 4, 2, 4, 5, 7


def _random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


def _rows(*shape: int) -> torch.Tensor:
    return _random(*shape, dtype=torch.float32).abs()


LOCAL = torch.tensor([0, 6, -1, 7, 3])  # two targets are another rank's
ARGUMENTS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "rms_norm": lambda: (_random(N, D), _random(D), 1e-5),
    "rms_norm_backward": lambda: (_random(N, D), _random(N, D), _random(D), _rows(N, 1), 1e-5),
    "add_rms_norm": lambda: (_random(N, D), _random(N, D), _random(D), 1e-5),
    "add_rms_norm_backward": lambda: (*(_random(N, D) for _ in range(3)), _random(D), _rows(N, 1), 1e-5),
    "gate_product": lambda: (_random(N, 2 * F), "silu"),
    "gate_product_backward": lambda: (_random(N, F), _random(N, 2 * F), "silu"),
    "rotate": lambda: (_random(B, T, H, d), _rows(T, 1, d // 2), _rows(T, 1, d // 2)),
    "rotate_qkv": lambda: (_random(B, T, H + 2 * K, d), _rows(T, 1, d // 2), _rows(T, 1, d // 2), [H, K, K]),
    "rotate_qkv_backward": lambda: (
        *(_random(B, T, heads, d) for heads in (H, K, K)),
        *(_rows(T, 1, d // 2) for _ in range(2)),
    ),
    "attention": lambda: tuple(_random(B, T, heads, d) for heads in (H, K, K)),
    "masked_attention": lambda: (*(_random(B, T, heads, d) for heads in (H, K, K)), 2, 0.3, 5.0),
    "statistics": lambda: (_random(c, v), LOCAL),
    "logit_gradient_": lambda: (_random(c, v), _rows(c), LOCAL, _rows(c), 0.5),
}


def test_every_operation_is_tried_here() -> None:
    assert ARGUMENTS.keys() == {item.name for item in fields(Operations)} - {"backend", "device"}


@pytest.mark.parametrize("backend", [("C kernels", "cpu"), ("torch.compile", "cuda"), (REFERENCE.backend, "cuda")])
@pytest.mark.parametrize("name", ARGUMENTS)
def test_rules_give_the_shapes_and_types_of_the_results(name: str, backend: tuple[str, str]) -> None:
    torch.manual_seed(0)
    arguments = ARGUMENTS[name]()
    on_meta = tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, arguments)
    rules = meta_table(Operations(*backend))
    results = tree_leaves(getattr(REFERENCE, name)(*arguments))
    planned = tree_leaves(getattr(rules, name)(*on_meta))
    assert [(x.shape, x.dtype) for x in planned] == [(x.shape, x.dtype) for x in results]
    assert all(x.device.type == "meta" for x in planned)


def test_the_logit_gradient_takes_the_place_of_the_logits() -> None:
    logits, *rest = ARGUMENTS["logit_gradient_"]()
    assert REFERENCE.logit_gradient_(logits, *rest) is logits


@pytest.mark.parametrize(
    ("device", "setting", "backend"),
    [("cpu", "none", "PyTorch"), ("cuda", "none", "PyTorch"), ("cuda", "auto", "torch.compile")],
)
def test_the_table_says_what_computes(tmp_path: Path, device: str, setting: str, backend: str) -> None:
    table = choose(device, setting, tmp_path)
    assert (table.backend, table.device) == (backend, device)


def test_a_node_without_a_compiler_goes_on_without_compiling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    table = choose("cuda", "auto", tmp_path)
    assert table.backend == "PyTorch: torch.compile finds no C compiler"
    assert table.rms_norm is REFERENCE.rms_norm
    with pytest.raises(UserError, match=r"train.compile=elementwise: .* has none of cc, gcc, clang"):
        choose("cuda", "elementwise", tmp_path)


def test_compiled_code_lies_on_the_node_where_nobody_else_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = node_cache()
    assert folder.parent == tmp_path
    assert Path(default_cache_dir()).parent == tmp_path, "torch.compile's, which torch chooses"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert node_cache() == folder
    folder.chmod(0o777)
    with pytest.raises(UserError, match="can be written by others"):
        node_cache()
