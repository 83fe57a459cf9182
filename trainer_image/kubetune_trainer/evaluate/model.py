"""What lm_eval sees: a language model that scores and continues texts, on our own decoder.

It treats texts as lm_eval's backend for transformers does (beginning-of-text tokens, what is cut off where a text is
too long, where a generated answer ends), so that the numbers can be compared.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from kubetune_trainer.chat import ChatTemplate, TemplateError
from kubetune_trainer.errors import ConfigError, DataError
from kubetune_trainer.evaluate.work import Crew, Drawing

DEFAULT_NEW_TOKENS = 256
"""What lm_eval's backends generate where a task does not say."""


class EvalModel(TemplateLM):
    """A model for `lm_eval.evaluate`.

    Args:
        crew: Does the work.
        tasks: What it will be asked; lm_eval has turned all of them into requests before it asks the first.
        max_length: Longest context in tokens.
        name: What the model is called in lm_eval's records.
        seed: Of drawn answers.
    """

    def __init__(self, crew: Crew, tasks: Iterable[Task], *, max_length: int, name: str, seed: int) -> None:
        super().__init__()
        self._crew = crew
        self._tasks = tasks
        self._tokenizer = crew.tokenizer
        self._name = name
        self._seed = seed
        self.max_length = max_length
        prefix = self._tokenizer.bos_id if self._tokenizer.bos_id is not None else self._tokenizer.eos_id
        self._prefix_id = prefix
        self._prefix_text = self._tokenizer.decode([prefix], skip_special_tokens=False)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text that nothing else stands before."""
        return self._prefix_id

    @property
    def tokenizer_name(self) -> str:
        """The model's name, which stands for its tokenizer too."""
        return self._name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the token ids of a text; its own beginning-of-text token is not doubled."""
        if add_special_tokens is None:
            add_special_tokens = not string.startswith(self._prefix_text)
        return self._tokenizer.encode(string, add_special_tokens=add_special_tokens)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Score the continuation of each context."""
        self._count()
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)  # type: ignore[no-any-return]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        asked = []
        for texts, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise DataError(
                    f"a continuation must have 1 to {self.max_length} tokens, got {len(continuation)}: {texts!r:.200}",
                    hint="Correct the task's doc_to_choice or doc_to_target, or raise maxSequenceLength.",
                )
            # A context of nothing but whitespace, which lm_eval counts to the continuation, has no tokens of its own.
            before = context or [self.prefix_token_id]
            asked.append(((before + continuation)[-(self.max_length + 1) :], len(continuation)))
        return self._crew.score(asked)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:  # noqa: ARG002
        """Score whole texts: every token is predicted once, from as many before it as the windows allow."""
        self._count()
        windows = [list(self._windows(request.args[0])) for request in requests]
        scores = iter(
            self._crew.score([window for of_text in windows for window in of_text], num_requests=len(windows))
        )
        return [sum(next(scores)[0] for _ in of_text) for of_text in windows]

    def _windows(self, text: str) -> list[tuple[list[int], int]]:
        parts = utils.get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        disjoint = [utils.make_disjoint_window(part) for part in parts]
        return [(context + continuation, len(continuation)) for context, continuation in disjoint]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:  # noqa: ARG002
        """Continue each text until one of the task's stop texts, the end of the text, or the allowed length."""
        self._count()
        drawings = [self._drawing(request.args[1]) for request in requests]
        prompts = [
            self.tok_encode(request.args[0])[-(self.max_length - drawing.max_new_tokens) :] or [self.prefix_token_id]
            for request, drawing in zip(requests, drawings, strict=True)
        ]
        texts = self._crew.generate(list(zip(prompts, drawings, strict=True)), seed=self._seed)
        return [
            postprocess_generated_text(text, list(drawing.until), None)
            for text, drawing in zip(texts, drawings, strict=True)
        ]

    def _count(self) -> None:
        """Tell the crew how many requests there are in all."""
        self._crew.progress.total = sum(request.repeats for task in self._tasks for request in task.instances)

    def _drawing(self, settings: dict[str, Any]) -> Drawing:
        given: Any = normalize_gen_kwargs(settings, DEFAULT_NEW_TOKENS)
        if given["max_gen_toks"] >= self.max_length:
            raise ConfigError(
                f"a task's generation_kwargs.max_gen_toks must be less than the longest context of {self.max_length} "
                f"tokens, got {given['max_gen_toks']}"
            )
        if given.get("num_beams", 1) != 1:
            raise ConfigError(f"a task asks for generation_kwargs.num_beams, which must be 1, got {given['num_beams']}")
        end = self._tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        draws = bool(given.get("do_sample"))
        return Drawing(
            max_new_tokens=given["max_gen_toks"],
            until=tuple(text for text in handle_stop_sequences(given["until"], end) if text),
            temperature=float(given.get("temperature") or 0.0) if draws else 0.0,
            top_k=(given.get("top_k") or None) if draws else None,
            top_p=given.get("top_p") if draws else None,
            # As transformers has it, which lm_eval's backend asks: the model's own, drawn or not.
            repetition_penalty=float(given.get("repetition_penalty") or self._crew.repetition_penalty),
        )

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Write a conversation out by the model's template; without the header of an answer its last message goes on.

        A template that refuses system messages gets the conversation without them.
        """
        source = self._tokenizer.chat_template
        if source is None:
            raise ConfigError(
                f"applyChatTemplate needs a model with a chat template, and {self._name} has none",
                hint="Set applyChatTemplate to false, or add chat_template.jinja to the model's folder.",
            )
        template = ChatTemplate(source, self._tokenizer.special_tokens)
        try:
            return _render(template, chat_history, add_generation_prompt=add_generation_prompt)
        except TemplateError as error:
            without_system = [message for message in chat_history if message["role"] != "system"]
            try:
                return _render(template, without_system, add_generation_prompt=add_generation_prompt)
            except TemplateError:
                raise DataError(f"{self._name}: {error}") from error


def _render(template: ChatTemplate, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool) -> str:
    text = template.render(messages, add_generation_prompt=add_generation_prompt)
    if add_generation_prompt:
        return text
    last = messages[-1]["content"]
    begin = text.rfind(last.strip())
    if begin < 0:
        raise TemplateError(f"the chat template does not write the last message as it is: {last!r:.200}")
    whole = last.lstrip()
    kept = whole if text.startswith(whole, begin) else last.strip()
    return text[: begin + len(kept)]
