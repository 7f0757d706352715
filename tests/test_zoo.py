"""Small models of Transformers' families: each builds, is random all over, and runs a step in one process."""

import pytest

from tests import zoo
from tests.zoo_table import ABSENT, NO_GRADIENT, OVERRIDES, PLANLESS

# A family for each style of Transformers' plans.
STYLES = {
    "all_reduce": "inkling_text",
    "colwise": "llama",
    "colwise_gather_output": "olmo2",
    "embedding_colwise": "qwen4_exp_text",
    "embedding_rowwise": "gpt_oss",
    "local_params": "mimo_v2_flash",
    "mla_kv_a_proj": "deepseek_v2",
    "moe_identity_expert": "longcat_flash",
    "moe_tp_experts": "mixtral",
    "packed_colwise": "mixtral",
    "packed_rowwise": "llama4_text",
    "replicate": "inkling2_text",
    "replicated_with_grad_allreduce": "qwen3",
    "rowwise": "llama",
    "rowwise_split_input": "olmo2",
}


@pytest.mark.parametrize("style", STYLES)
def test_a_family_has_the_style(style: str) -> None:
    zoo.skip_where_missing(STYLES[style])
    assert style in zoo.plan(zoo.config_classes()[STYLES[style]]).values()


@pytest.mark.filterwarnings("ignore::Warning:transformers")
@pytest.mark.parametrize("family", [*zoo.families(), *PLANLESS])
def test_step(family: str) -> None:
    model = zoo.model(family)
    for name, p in model.named_parameters():
        assert p.dtype.is_floating_point
        assert p.isfinite().all(), name
        assert p.numel() == 1 or p.unique().numel() > p.numel() / 2, f"{name} is not drawn"
        assert not ((p == 0) | (p == 1)).any(), f"{name} has an element at 0 or 1"
    loss, logits = zoo.loss_and_logits(model, zoo.tokens())
    assert logits.shape[:2] == (zoo.BATCH, zoo.SEQ_LEN)
    loss.backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    known = {name for name, _ in model.named_parameters() if any(part in name for part in NO_GRADIENT)}
    assert idle <= known, idle - known


def test_every_kind_of_layer() -> None:
    """As many layers as kinds, at least: local and global attention, linear attention, dense and experts."""
    for family in zoo.families():
        kinds, text = zoo.config_classes()[family]().get_text_config(), zoo.config(family).get_text_config()
        for name in zoo.PER_LAYER:
            default = set(getattr(kinds, name, None) or ())
            assert default <= set(getattr(text, name, None) or ()), family


@pytest.mark.skipif(zoo.OLDER, reason="an older Transformers has not all families of the table")
def test_the_table_has_no_strangers() -> None:
    known = set(zoo.config_classes())
    subs = [sub for each in zoo.config_classes().values() for sub in zoo.sub_configs(each).values()]
    known |= {getattr(sub, "model_type", "") for sub in subs}
    assert OVERRIDES.keys() <= known | zoo.planless().keys()
    assert zoo.planless().keys() == set(PLANLESS)
    assert ABSENT.keys() <= known
