"""The weights of a Hugging Face directory, into a model of either engine."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tptrain.checkpoint.huggingface import Fill, load_pretrained
from tptrain.config.schema import ModelConfig
from tptrain.models.safetensors import TensorFiles
from tptrain.nn.decoder import Decoder

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

    assert config.directory is not None
    return load_converted(TensorFiles(Path(config.directory), integers=True).entries, model, fill, alive)
