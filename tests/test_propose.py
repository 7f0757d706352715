"""Plans proposed from names and shapes (tptrain/hf/propose.py): their entries, and that ranks compute what one process
does.
"""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from tests import zoo
from tests.distributed import mesh, run_ranks
from tptrain.config import UserError
from tptrain.hf import propose
from tptrain.hf.model import TransformersModel, build
from tptrain.hf.plan import Plan
from tptrain.parallel.mesh import tp_grid

pytestmark = pytest.mark.filterwarnings("ignore::Warning:transformers")
HEADS = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "colwise")
ALL_HEADS = dict.fromkeys(HEADS, "colwise_gather_output")


def _at(prefix: str, styles: Plan) -> dict[str, str]:
    return {f"{prefix}.{name}": style for name, style in styles.items()}


def _proposal(family: str, plan: Plan | None = None, tp: int = 4, prefix: str = "model", **changes: Any) -> Plan:
    model = build(zoo.config(family, **changes))
    return propose.proposal(model, model.tp_plan if plan is None else plan, tp_grid(tp, tp, 2), prefix)


def test_a_head_has_its_sink() -> None:
    attention = HEADS | {"o_proj": "rowwise", "sinks": "colwise"}
    assert _proposal("gpt_oss") == _at("model.layers.*.self_attn", attention)  # the experts' bias would be added twice


def test_a_gate_of_heads_is_known_by_its_size() -> None:
    attention = HEADS | {"g_proj": "colwise", "o_proj": "rowwise"}
    ffn = _at("model.layers.*.feed_forward", {"w1": "colwise", "w3": "colwise", "w2": "rowwise"})
    assert _proposal("lfm3", head_dim=16) == _at("model.layers.*.self_attn", attention) | ffn
    attention = ALL_HEADS | {"o_proj": "rowwise_split_input"}  # of 8 heads of 8 features
    assert _proposal("lfm3") == _at("model.layers.*.self_attn", attention) | ffn


def test_a_module_that_counts_all_heads_has_them_all() -> None:
    layer = _at("self_attn", ALL_HEADS | {"out_proj": "rowwise_split_input"}) | {"fc1": "colwise", "fc2": "rowwise"}
    assert _proposal("opt", prefix="model.decoder") == _at("model.decoder.layers.*", layer)


def test_the_plan_wins() -> None:
    """Of experts in Jamba's plan, and of a module that a user wants whole. Mamba's mixers stay whole."""
    ffn = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
    attention = _at("model.layers.*.self_attn", HEADS | {"o_proj": "rowwise"})
    assert _proposal("jamba") == attention | _at("model.layers.*.feed_forward", ffn)
    whole = build(zoo.config("jamba")).tp_plan | {"model.layers.*.self_attn.o_proj": "replicate"}
    assert _proposal("jamba", whole) == _at("model.layers.*.feed_forward", ffn)


@pytest.mark.parametrize("family", ["mixtral", "llama", "olmo2", "phi3"])
def test_what_transformers_plans_is_proposed(family: str) -> None:
    model = build(zoo.config(family))
    if any(hasattr(each, "has_gate") and not hasattr(each, "has_post_expert_norm") for each in model.modules()):
        pytest.skip("this Transformers does not say of experts all that propose.EXPERTS asks: they stay whole")
    plan = {name: style for name, style in model.tp_plan.items() if ".layers." in name}
    assert _proposal(family, {}, tp=2) == plan


def test_layers_that_differ_go_by_number() -> None:
    ffn = {"gate_proj": "colwise", "up_proj": "colwise", "down_proj": "rowwise"}
    proposed = _proposal("emu3", {"model.layers.1.mlp.up_proj": "replicate"})
    assert {name: style for name, style in proposed.items() if "mlp" in name} == _at("model.layers.0.mlp", ffn)


def test_what_is_not_known_stays_whole() -> None:
    """Linear attention beside latent attention, and features that the ranks do not divide."""
    assert not any("self_attn" in name for name in _proposal("kimi_linear", {}))
    assert not any("mlp" in name for name in _proposal("emu3", intermediate_size=90))


@pytest.mark.parametrize(
    ("family", "asked", "proposes"),
    [
        ("emu3", None, True),
        ("llama", None, False),
        ("jamba", None, False),
        ("jamba", True, True),
        ("emu3", False, False),
    ],
)
def test_a_model_says_what_is_proposed(family: str, asked: bool | None, proposes: bool) -> None:
    assert bool(TransformersModel(zoo.config(family), mesh(1), propose=asked).proposed) is proposes


# ------------------------------------------------------------------------------------------------------- on real ranks


def _differences(folder: Path) -> dict[str, str]:
    """By family, and for broken proposals: what of a step over these ranks is not as in one process; or the error."""
    from tests import zoo_step  # seconds of import, which the tests above do without

    def without_sinks(*arguments: Any) -> Plan:
        return {name: style for name, style in propose.proposal(*arguments).items() if "sinks" not in name}

    breaks = {
        "gpt_oss": patch("tptrain.hf.model.proposal", without_sinks),
        "diffllama": patch.object(propose, "_is_known_attention", lambda *_: True),  # it mixes distant heads
    }
    differences = {}
    for family in ("bamba", *breaks):
        if dist.get_rank() == 0:
            (folder / family).mkdir()
            zoo_step.alone(family, folder / family, kv_heads=4)
        dist.barrier()
        distance = zoo_step.engine(folder / family)
        differences[family] = zoo_step.difference(distance) if distance.cut[0] else "nothing is cut"
        if family in breaks:
            with breaks[family]:
                try:
                    differences[f"{family}, broken"] = zoo_step.difference(zoo_step.engine(folder / family))
                except (RuntimeError, UserError) as error:
                    differences[f"{family}, broken"] = str(error)
    return differences


def test_two_ranks_compute_what_one_process_does(tmp_path: Path) -> None:
    families = ("bamba", "gpt_oss", "diffllama")
    zoo.skip_where_missing(*families)
    for differences in run_ranks(2, _differences, tmp_path):
        for family in families:
            assert not differences[family], differences
        assert "size" in differences["gpt_oss, broken"]  # of sinks for all heads, beside scores of a rank's
        assert "gradient" in differences["diffllama, broken"]
