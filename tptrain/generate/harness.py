"""A model as lm-evaluation-harness takes one: its requests become token ids, and what the ranks answer its results.

What is cut off, what stands before a text, and where an answer ends are as in the harness's own model of Transformers
(lm_eval/models/huggingface.py). Imported where the harness is installed.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import TemplateError
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from tptrain.config import UserError
from tptrain.generate.codec import Codec
from tptrain.generate.continuations import Continue
from tptrain.generate.sample import Sampling
from tptrain.generate.score import Request, Score

MAX_GEN_TOKS = 256  # tokens of an answer where the task does not say
KNOWN = ("until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k", "num_beams")


class Harness(TemplateLM):
    """`score` and `go_on` have all ranks compute."""

    def __init__(
        self,
        codec: Codec,
        max_length: int,
        score: Callable[[list[Request]], list[Score]],
        go_on: Callable[[Continue], list[list[int]]],
        say: Callable[[str], None],
    ) -> None:
        super().__init__()
        self.codec, self.max_length, self.score, self.go_on, self.say = codec, max_length, score, go_on, say
        self.tokenizer = codec.tokenizer
        self.without_system = False  # whether a chat has gone without its system message

    @property
    def eot_token_id(self) -> int:
        return self.codec.eos

    @property
    def prefix_token_id(self) -> int:
        return self.codec.prefix

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.codec.encode(string, add_special_tokens)

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a chat; where the template refuses it, without its system message. Raises UserError."""
        try:
            return self._chat(chat_history, add_generation_prompt)
        except TemplateError as error:
            reason = error
        try:
            text = self._chat([each for each in chat_history if each["role"] != "system"], add_generation_prompt)
        except TemplateError as error:
            raise UserError(
                f"apply_chat_template=true: the template refuses a chat: {error}. Mend the model's "
                "chat_template.jinja, or leave the key out."
            ) from error
        if not self.without_system:
            self.say(f"warning: the chat template refuses system messages, which are left out: {reason}")
        self.without_system = True
        return text

    def _chat(self, messages: list[dict[str, str]], answers: bool) -> str:
        """`answers`: an answer follows; else the last message goes on."""
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answers, continue_final_message=not answers
        )

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        everything = [self._fitting(context, continuation) for _, context, continuation in requests]
        pairs = zip(everything, requests, strict=True)
        self._say_cut(sum(len(context) < len(whole) for (context, _), (_, whole, _) in pairs))
        return [(score.log_likelihood, score.greedy) for score in self.score(everything)]

    def _say_cut(self, count: int) -> None:
        if count:
            self.say(f"warning: {count:,} contexts are cut at their beginning, for max_length={self.max_length}")

    def _fitting(self, context: list[int], continuation: list[int]) -> Request:
        """The end of the context that the model has positions for. Raises UserError where there is none."""
        if not continuation or len(continuation) > self.max_length:
            raise UserError(
                f"tasks: a continuation has {len(continuation):,} tokens, and 1 to {self.max_length:,} can be scored "
                "(max_length). Choose another task."
            )
        room = self.max_length + 1 - len(continuation)  # the last token is no input
        return context[-room:], continuation

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        windows, owners = list[tuple[None, list[int], list[int]]](), list[int]()
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for pair in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1):
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (log_likelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += log_likelihood
        return sums

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        kinds: dict[str, list[int]] = {}  # the numbers of the requests that are answered alike
        for number, request in enumerate(requests):
            kinds.setdefault(repr(request.args[1]), []).append(number)
        answers = [""] * len(requests)
        for numbers in kinds.values():
            sampling, until, new = generation(requests[numbers[0]].args[1])
            room = self.max_length - new
            if room < 1:
                raise UserError(
                    f"max_gen_toks={new}: of the {self.max_length:,} tokens of max_length none is left for a prompt. "
                    "Shorten the task's answers."
                )
            prompts, cut = [], 0
            for number in tqdm(numbers, desc="tokenizing", disable=None, leave=False):
                ids = self.tok_encode(requests[number].args[0]) or [self.prefix_token_id]
                prompts.append((number, ids[-room:]))
                cut += len(ids) > room
            self._say_cut(cut)
            for number, ids in zip(numbers, self.go_on(Continue(prompts, sampling, until, new)), strict=True):
                stops = [*until, self.codec.decode([self.codec.eos], special=True)]
                answers[number] = postprocess_generated_text(self.codec.decode(ids), stops, None)
        return answers


def generation(kwargs: dict[str, Any]) -> tuple[Sampling, list[str], int]:
    """How tokens are chosen, the texts that end an answer, and its longest length, out of a task's generation_kwargs.

    Raises UserError for what is not known here.
    """
    settings: dict[str, Any] = dict(normalize_gen_kwargs(kwargs, MAX_GEN_TOKS))
    for key, value in settings.items():
        if key not in KNOWN or (key == "num_beams" and value != 1):
            raise UserError(f"generation_kwargs.{key}={value}: not known here. Known: {', '.join(KNOWN[:-1])}.")
    temperature = float(settings.get("temperature") or 0.0) if settings["do_sample"] else 0.0
    if settings["do_sample"] and temperature <= 0:
        raise UserError("generation_kwargs.do_sample=true: draws tokens, and temperature is not above 0. Give one.")
    top_k, top_p = settings.get("top_k") or None, settings.get("top_p")
    sampling = Sampling(temperature, top_k, 1.0 if top_p is None else float(top_p))
    return sampling, [text for text in settings["until"] if text], settings["max_gen_toks"]
