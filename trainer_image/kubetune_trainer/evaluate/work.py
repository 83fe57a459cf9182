"""Requests become batches, and whichever rank is free takes the next one: the same numbers on any number of ranks.

Which requests share a batch is decided once, on rank 0, before anything is left out that is answered already. So
neither the ranks nor an interruption changes a bit of any answer.
"""

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, cast

from kubetune_trainer.distributed import (
    SharedCounters,
    StopSignal,
    World,
    broadcast_object,
    gather_objects,
    gather_vector,
    patient_group,
)
from kubetune_trainer.errors import PreemptedError
from kubetune_trainer.evaluate.answers import Answer, Answers
from kubetune_trainer.evaluate.score import Score, score
from kubetune_trainer.evaluate.trees import Continuation, Tree, batches
from kubetune_trainer.generation import generate
from kubetune_trainer.model.decoder import Decoder
from kubetune_trainer.report import report
from kubetune_trainer.tokenizer import Tokenizer

PROGRESS_SECONDS: Final = 2.0


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """How answers are generated."""

    max_new_tokens: int
    """An answer is cut off after so many tokens."""
    until: tuple[str, ...]
    """Each of these texts ends an answer."""
    temperature: float
    """0 takes the likeliest token."""
    top_k: int | None
    """Only so many likeliest tokens are drawn from."""
    top_p: float | None
    """Only the likeliest tokens of this probability are drawn from."""
    repetition_penalty: float
    """Above 1, tokens that prompt or answer have become less likely."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a generated answer continues."""

    index: int
    """Which request it is."""
    tokens: tuple[int, ...]
    """The prompt."""
    seed: int
    """Of the draws, where there are any."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one rank computes at once: trees to score, or prompts to continue."""

    trees: list[Tree] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    drawing: Drawing | None = None

    @property
    def indexes(self) -> list[int]:
        """The requests in it."""
        return [path.index for tree in self.trees for path in tree.paths] + [prompt.index for prompt in self.prompts]

    @property
    def num_tokens(self) -> int:
        """Tokens of all requests as they were asked, those that share a place counted each time."""
        scored = (tree.positions[path.places[-1]] + 1 for tree in self.trees for path in tree.paths)
        return sum(scored) + sum(len(prompt.tokens) for prompt in self.prompts)


@dataclass(frozen=True, kw_only=True)
class Order:
    """What rank 0 tells the others to do."""

    name: str
    """Another one for each order."""
    batches: list[Batch]
    """What is to be done, all of it; each rank takes from it."""
    keys: dict[int, str]
    """Under which name each request's answer is stored."""


class Crew:
    """All ranks with the model on each; rank 0 gives orders, the others `work`.

    Args:
        model: In evaluation mode.
        tokenizer: The model's.
        batch_size: Rows of one forward pass.
        answers: Where answers are kept.
        world: This rank among the others.
        stop: When the run is to end.
        repetition_penalty: What generated answers take where a task does not say.
    """

    def __init__(
        self,
        model: Decoder,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        answers: Answers,
        world: World,
        stop: StopSignal,
        repetition_penalty: float = 1.0,
    ) -> None:
        self.model, self.tokenizer, self.repetition_penalty = model, tokenizer, repetition_penalty
        self.answers, self.world = answers, world
        self._batch_size, self._stop = batch_size, stop
        # One batch, or rank 0's metrics, may take longer than a collective may.
        self._group = patient_group()
        self.progress = Progress()

    def score(self, requests: Sequence[tuple[Sequence[int], int]], *, num_requests: int | None = None) -> list[Score]:
        """Score continuations, on all ranks; called on rank 0.

        Args:
            requests: The tokens of each, and how many of them at the end are scored.
            num_requests: How many requests of lm_eval these are, for the progress; unset means each is one.
        """
        keys = [self.answers.key(["score", list(tokens), scored]) for tokens, scored in requests]
        continuations = [
            Continuation(index=index, tokens=tuple(requests[index][0]), num_scored=requests[index][1])
            for index in _first_of_each(keys)
        ]
        work = [Batch(trees=few) for few in batches(continuations, shape=self.model.config, rows=self._batch_size)]
        found = self._answer(work, keys, num_requests=len(keys) if num_requests is None else num_requests)
        return cast("list[Score]", found)

    def generate(self, requests: Sequence[tuple[Sequence[int], Drawing]], *, seed: int) -> list[str]:
        """Continue prompts, on all ranks; called on rank 0.

        Args:
            requests: The tokens of each prompt, and how its answer is generated.
            seed: Of the draws, where there are any; a prompt that comes several times is drawn for each time anew.
        """
        keys, seeds, seen = [], [], dict[str, int]()
        for tokens, drawing in requests:
            asked = ["generate", list(tokens), vars(drawing) | {"until": list(drawing.until)}]
            if drawing.temperature > 0:
                times = seen[str(asked)] = seen.get(str(asked), -1) + 1
                asked += [seed, times]
            keys.append(self.answers.key(asked))
            seeds.append(int(keys[-1][:15], 16))
        prompts: dict[Drawing, list[Prompt]] = {}
        for index in _first_of_each(keys):
            tokens, drawing = requests[index]
            prompts.setdefault(drawing, []).append(Prompt(index=index, tokens=tuple(tokens), seed=seeds[index]))
        work = [
            Batch(prompts=few, drawing=drawing)
            for drawing, of_drawing in prompts.items()
            for few in self._batches(of_drawing, drawing)
        ]
        return cast("list[str]", self._answer(work, keys, num_requests=len(keys)))

    def work(self) -> None:
        """Do what rank 0 orders until it says that nothing is left; called on the other ranks."""
        while (order := broadcast_object(None, group=self._group)) is not None:
            self._do(order)

    def release(self) -> None:
        """Let the other ranks go; called on rank 0."""
        broadcast_object(None, group=self._group)

    def _batches(self, prompts: list[Prompt], drawing: Drawing) -> Iterator[list[Prompt]]:
        """Put prompts of like length together; one that is drawn for stays alone, so that nothing else decides it."""
        rows = self._batch_size if drawing.temperature == 0.0 else 1
        ordered = sorted(prompts, key=lambda prompt: (-len(prompt.tokens), prompt.tokens))
        for start in range(0, len(ordered), rows):
            yield ordered[start : start + rows]

    def _answer(self, work: list[Batch], keys: Sequence[str], *, num_requests: int) -> list[Answer]:
        """Have the ranks do what is not answered yet; return the answer of every request."""
        left = [batch for batch in work if any(self.answers.get(keys[index]) is None for index in batch.indexes)]
        open_requests = {index: keys[index] for batch in left for index in batch.indexes}
        still_open = set(open_requests.values())
        self.progress.begin(
            asked=num_requests,
            answered=num_requests * sum(key not in still_open for key in keys) // max(1, len(keys)),
            open_requests=len(open_requests),
        )
        order = Order(name=uuid.uuid4().hex, batches=left, keys=open_requests)
        found = self._do(broadcast_object(order, group=self._group))
        by_key = {open_requests[index]: answer for index, answer in found.items()}
        return [by_key[key] if key in by_key else cast("Answer", self.answers.get(key)) for key in keys]

    def _do(self, order: Order) -> dict[int, Answer]:
        """Take batches until none is left or somebody is asked to stop; return, on rank 0, everybody's answers."""
        counters = SharedCounters(order.name)
        mine: dict[int, Answer] = {}
        stopped = False
        try:
            with self._stop.deferred():
                while not stopped and (number := counters.add("taken", 1) - 1) < len(order.batches):
                    batch = order.batches[number]
                    answers, num_tokens = self._compute(batch)
                    mine |= answers
                    self.answers.add({order.keys[index]: answer for index, answer in answers.items()})
                    self.progress.report(
                        done=counters.add("done", len(answers)), num_tokens=counters.add("tokens", num_tokens)
                    )
                    stopped = counters.add("stop", int(self._stop.requested)) > 0
                self.answers.flush()
                stopped = bool(gather_vector([float(stopped)], group=self._group).any())
                if stopped:
                    raise PreemptedError("stopped; what is answered is stored")
        finally:
            self.answers.flush()
        everyone = gather_objects(mine, group=self._group)
        if order.batches:
            self.progress.report(done=counters.add("done", 0), num_tokens=counters.add("tokens", 0), at_end=True)
        return {index: answer for theirs in everyone for index, answer in theirs.items()}

    def _compute(self, batch: Batch) -> tuple[dict[int, Answer], int]:
        """Answer one batch; return the answers and how many tokens that took."""
        if batch.drawing is None:
            return dict(score(self.model, batch.trees)), batch.num_tokens
        answers = self._continue(batch.prompts, batch.drawing)
        texts = {prompt.index: self.tokenizer.decode(ids) for prompt, ids in zip(batch.prompts, answers, strict=True)}
        return dict(texts), batch.num_tokens + sum(map(len, answers))

    def _continue(self, prompts: Sequence[Prompt], drawing: Drawing) -> list[list[int]]:
        # A token has at least one byte, so that a text of n bytes cannot lie in more than the last n tokens.
        reach = max([len(text.encode()) for text in drawing.until], default=0) + 1

        def is_over(answer: list[int]) -> bool:
            # A task may name a special token as the end, which is not part of the text that it gets.
            text = self.tokenizer.decode(answer[-reach:], skip_special_tokens=False)
            return any(end in text for end in drawing.until)

        return generate(
            self.model,
            [prompt.tokens for prompt in prompts],
            max_new_tokens=drawing.max_new_tokens,
            stop_ids=self.tokenizer.stop_ids,
            stop=is_over if drawing.until else None,
            temperature=drawing.temperature,
            top_k=drawing.top_k,
            top_p=drawing.top_p,
            repetition_penalty=drawing.repetition_penalty,
            seed=prompts[0].seed,
        )


def _first_of_each(keys: Sequence[str]) -> list[int]:
    """Return the place of each different key's first appearance."""
    return list({key: index for index, key in reversed(list(enumerate(keys)))}.values())


class Progress:
    """Requests done of all, and how fast, for rank 0 to report.

    `total` is set by whoever knows all requests; orders come one after the other and do not know of the next.
    """

    def __init__(self) -> None:
        self.total = 0
        self._finished = 0  # in earlier orders
        self._asked = self._answered = self._open = 0
        self._began = time.monotonic()
        self._reported = 0.0

    def begin(self, *, asked: int, answered: int, open_requests: int) -> None:
        """Begin an order.

        Args:
            asked: Its requests.
            answered: So many of them are answered already.
            open_requests: So many different ones remain.
        """
        self._finished += self._asked
        self._asked, self._answered, self._open = asked, answered, open_requests
        self._began = time.monotonic()

    def report(self, *, done: int, num_tokens: int, at_end: bool = False) -> None:
        """Report, now and then and at an order's end, what all ranks have done of it.

        Args:
            done: Different requests.
            num_tokens: The tokens of these.
            at_end: Whether that is all of the order.
        """
        now = time.monotonic()
        if now - self._reported < PROGRESS_SECONDS and not at_end:
            return
        self._reported, seconds = now, max(now - self._began, 1e-6)
        here = self._answered + (self._asked - self._answered) * done // max(1, self._open)
        all_done, computed = self._finished + here, max(1, here - self._answered)
        report(
            "progress",
            done=all_done,
            total=self.total,
            tokens_per_second=round(num_tokens / seconds, 1),
            eta_seconds=round(seconds / computed * (self.total - all_done)),
        )
