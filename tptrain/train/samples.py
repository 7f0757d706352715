"""What the model adds to the prompts of `logging.samples` while it is trained."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tptrain.config import Config, UserError
from tptrain.config.generation import check_prompt
from tptrain.config.schema import MODEL_FILES, GenerateConfig
from tptrain.generate.answers import answers
from tptrain.generate.text import Text, of_config
from tptrain.models.sizes import sizes
from tptrain.nn.decoder import Decoder
from tptrain.nn.parameter import parameters
from tptrain.ops.compiled import eager
from tptrain.ops.table import Operations
from tptrain.train.trainer import Trainer

if TYPE_CHECKING:
    from tptrain.train.trainer import Model


def prompts_of(config: Config, text: Text | None = None) -> list[list[int]]:
    """Their token ids; `text`: the run's tokenizer, where it is there already.

    Raises UserError for a prompt that is empty or longer than the model's positions.
    """
    samples, positions = config.logging.samples, sizes(config.model).max_positions
    if not samples:
        return []
    text, prompts = text or of_config(config, None), []
    for number, prompt in enumerate(samples, 1):
        prompts.append(text.encode(prompt))
        check_prompt(f"logging.samples, prompt {number} of {len(samples)}", len(prompts[-1]), positions)
    return prompts


class Samples:
    """The prompts of a run, and what continues them with the weights as they are.

    No random number is drawn and nothing changes that a step reads: losses are the same bits with samples and without.
    """

    def __init__(self, trainer: Trainer) -> None:
        """Raises UserError as `prompts_of` does, and for a model of Transformers whose cache cannot be cut."""
        config, folder = trainer.config, Path(trainer.config.run.dir) / MODEL_FILES
        self.texts = config.logging.samples
        self.text = of_config(config, folder if folder.is_dir() else None)
        self.prompts = prompts_of(config, self.text)
        self.settings = GenerateConfig(max_new_tokens=config.logging.samples_tokens)
        self.model = _for_generation(trainer.model, trainer.loss.ops)
        if not isinstance(self.model, Decoder):
            self._try()

    def _try(self) -> None:
        """Two tokens, the second out of the cache, by whatever values the weights have: what fails, fails at once."""
        failure = ""
        try:
            list(answers(self.model, self.text, self.prompts, replace(self.settings, max_new_tokens=2), bar=False))
        except UserError as error:
            failure = f"{error}".removeprefix("generate: ").removesuffix(".")
        failures = self.model.mesh.control.gather(failure)  # a dp rank without a prompt has tried nothing
        if any(failures):
            raise UserError(f"logging.samples: {next(filter(None, failures))}, or leave it out.")

    def generate(self) -> list[dict[str, str]]:
        """Each prompt with the text that the model adds. Every rank calls it; the prompts are divided over dp."""
        mesh = self.model.mesh
        own = dict(answers(self.model, self.text, self.prompts, self.settings, bar=False))
        parts = mesh.control.gather({number: answer.text for number, answer in own.items()})
        together = {number: text for part in parts for number, text in part.items()}
        return [{"prompt": prompt, "text": together[number]} for number, prompt in enumerate(self.texts)]


def _for_generation(model: "Model", ops: Operations) -> "Model":
    """The same model over the same weights, with tokens whole on every rank, as a single next token must be, and with
    nothing compiled.
    """
    if not isinstance(model, Decoder):
        return model
    whole = Decoder(model.spec, replace(model.mesh, sequence_parallel=False), eager(ops))
    for (name, p), (same, trained) in zip(parameters(whole), parameters(model), strict=True):
        assert name == same, (name, same)
        p.data = trained.data  # its memory, which the optimizer writes to
        p.requires_grad_(False)
    return whole
