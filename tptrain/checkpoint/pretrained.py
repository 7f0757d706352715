"""The weights of a Hugging Face directory, into a model of either engine, or into a checkpoint."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from tptrain.checkpoint.huggingface import Fill, Slices, load_pretrained
from tptrain.checkpoint.layout import Part, State
from tptrain.checkpoint.safetensors import Reader
from tptrain.config.schema import ModelConfig
from tptrain.models.safetensors import TensorFiles
from tptrain.nn.decoder import Decoder
from tptrain.nn.parameter import parameters

if TYPE_CHECKING:  # Transformers is imported where its models are trained
    from tptrain.hf.model import TransformersModel


def read_weights(
    config: ModelConfig,
    model: "Decoder | TransformersModel",
    fill: Fill,
    alive: Callable[[], None] = lambda: None,
) -> str:
    """Read this rank's slices into `fill`, and return a digest of all weights, which no topology changes.

    Every rank calls it. Raises UserError for a directory that has not what the model needs.
    """
    if isinstance(model, Decoder):
        return load_pretrained(config, model, fill, alive)
    from tptrain.checkpoint.transformers import load_converted

    return load_converted(_files(config).entries, model, fill, alive)


@contextmanager
def weights_to_write(config: ModelConfig, model: "Decoder | TransformersModel", dtype: torch.dtype) -> Iterator[State]:
    """This rank's slices as a state to be written while this lasts: each is read when its turn comes, and then takes
    the place of the one before it. `model` has no memory of its own.

    Raises UserError for a directory that has not what the model needs.
    """
    if isinstance(model, Decoder):
        slices = Slices(config, model)
    else:
        from tptrain.checkpoint.transformers import ConvertedSlices

        slices = ConvertedSlices(_files(config).entries, model)
    ours, whole, last = dict(parameters(model)), dict[str, Tensor](), list[Tensor]()
    dtypes = {name: torch.float32 if p.keeps_float32 else dtype for name, p in ours.items()}
    total = sum(p.sharding.size for p in ours.values())
    with (
        closing(Reader()) as reader,
        tqdm(desc="importing", total=total, unit=" weights", unit_scale=True, disable=model.mesh.disable_bar) as bar,
    ):

        def value(name: str) -> Tensor:
            if last:  # it has been written, and torch.distributed.checkpoint would keep it to the end
                last.pop().untyped_storage().resize_(0)
            if name not in whole:  # it may have come with another one
                for each, start, values in slices.read(name, reader):
                    if each not in whole:  # zeros: the vocabulary's padding
                        whole[each] = torch.zeros(ours[each].sharding.size, dtype=dtypes[each])
                    whole[each][start : start + values.numel()] = values.flatten()
            bar.update(whole[name].numel())
            last.append(whole.pop(name))
            return last[0].view(ours[name].sharding.local_shape)

        state: State = {}
        for name, p in ours.items():
            layout = p.sharding
            place = torch.empty(layout.local_shape, dtype=dtypes[name], device="meta")
            boxes = [(list(layout.offsets), place)]
            state[f"model/{name}"] = Part(layout.shape, boxes, dtypes[name], partial(value, name))
        yield state


def _files(config: ModelConfig) -> TensorFiles:
    assert config.directory is not None
    return TensorFiles(Path(config.directory), integers=True)
