"""The page that shows what training will see: statistics, lengths of samples, and two of them with what is trained."""

import html
from itertools import groupby

import numpy as np
from pydantic import BaseModel, ConfigDict

from kubetune_trainer.data.store import DataStore
from kubetune_trainer.names import IGNORE_LABEL
from kubetune_trainer.tokenizer import Tokenizer

NUM_EXAMPLES = 2
EXAMPLE_TOKENS = 2048
"""How much of a sample is shown."""
NUM_BINS = 16

STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em; color: #222 }
td, th { text-align: left; padding: .1em 1em .1em 0; vertical-align: top }
td.bar { width: 30em } td.bar div { background: #6b9bd1; height: 1em }
pre { white-space: pre-wrap; background: #f6f6f6; padding: 1em } mark { background: #bfe8c0 }
"""


class Part(BaseModel):
    """Text of a sample that is trained or not, in one piece."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    text: str
    """As the tokenizer decodes it, special tokens written out."""
    trained: bool
    """Whether the loss counts it."""


class Preview(BaseModel):
    """What the page shows of tokenized data."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bins: tuple[tuple[int, int, int], ...]
    """Lengths of samples: from so many tokens to so many, both included, and how many samples."""
    examples: tuple[tuple[Part, ...], ...]
    """The first samples, rendered."""


def preview(samples: DataStore, chosen: np.ndarray, tokenizer: Tokenizer) -> Preview:
    """Returns what is shown of the samples of an epoch.

    Args:
        samples: All samples.
        chosen: Those of the epoch, at least one.
        tokenizer: Turns tokens back to text.
    """
    lengths = samples.lengths(chosen)
    width = -(-int(lengths.max()) // NUM_BINS)
    counts = np.bincount((lengths - 1) // width)
    bins = tuple((number * width + 1, (number + 1) * width, int(count)) for number, count in enumerate(counts))
    shown = dict.fromkeys(chosen[: 16 * NUM_EXAMPLES].tolist())  # a sample may come more than once
    examples = tuple(_parts(samples, index, tokenizer) for index in list(shown)[:NUM_EXAMPLES])
    return Preview(bins=bins, examples=examples)


def _parts(samples: DataStore, index: int, tokenizer: Tokenizer) -> tuple[Part, ...]:
    """A label belongs to the position before its token; the first token is nobody's label."""
    row = samples[index]
    tokens = row.tokens[:EXAMPLE_TOKENS].tolist()
    trained = [False, *(row.labels[: len(tokens) - 1] != IGNORE_LABEL).tolist()]
    for at in np.flatnonzero(np.diff(row.documents[: len(tokens)])).tolist():
        trained[at + 1] = False  # the other side of a pair begins: the label before is of what was cut off
    return tuple(
        Part(text=tokenizer.decode([token for token, _ in pairs], skip_special_tokens=False), trained=is_trained)
        for is_trained, pairs in groupby(zip(tokens, trained, strict=True), key=lambda pair: pair[1])
    )


def render_page(title: str, statistics: dict[str, object], shown: Preview | None) -> bytes:
    """Returns the page, complete in one file.

    Args:
        title: Of the run.
        statistics: Names and values.
        shown: What there is to see; None where an earlier version tokenized the data.
    """
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(of))}</td></tr>" for name, of in statistics.items()
    )
    body = f"<h1>{html.escape(title)}</h1><h2>Data</h2><table>{rows}</table>"
    if shown is not None:
        body += f"<h2>Tokens per sample</h2><table>{_bars(shown)}</table><h2>Samples; <mark>trained</mark></h2>"
        body += "".join(f"<pre>{''.join(map(_marked, parts))}</pre>" for parts in shown.examples)
    page = f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title><style>{STYLE}</style>{body}\n"
    return page.encode("utf-8", "replace")


def _bars(shown: Preview) -> str:
    most = max(count for _, _, count in shown.bins)
    return "".join(
        f"<tr><td>{begin} to {end}</td><td>{count}</td>"
        f"<td class='bar'><div style='width: {100 * count / most:.1f}%'></div></td></tr>"
        for begin, end, count in shown.bins
    )


def _marked(part: Part) -> str:
    text = html.escape(part.text)
    return f"<mark>{text}</mark>" if part.trained else text
