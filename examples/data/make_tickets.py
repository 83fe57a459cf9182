"""Write tickets-train.jsonl and tickets-heldout.jsonl: customers' messages, and one line of JSON for each.

    python examples/data/make_tickets.py

The phrases are written by hand; a seed decides how they come together, so that the files are always the same. The
last phrases of each issue and urgency are kept for the held-out part: the model meets words there that it never saw.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Final

SEED: Final = 7
TRAIN_SAMPLES: Final = 320
HELDOUT_SAMPLES: Final = 40
KEPT_PHRASES: Final = 2
"""Phrases at the end of each list that only the held-out part uses."""
ORDER_LAST: Final = 0.7
"""How often the order's number stands behind the complaint."""
SYSTEM: Final = "Answer with one line of JSON."

PRODUCTS: Final = (
    "kettle", "toaster", "desk lamp", "speaker", "backpack", "office chair", "keyboard", "coffee grinder",
    "rain jacket", "bike light", "yoga mat", "water bottle", "blender", "phone case", "bookshelf", "hairdryer",
    "monitor", "wall clock", "tent", "suitcase",
)  # fmt: skip

ISSUES: Final = {
    "damaged": (
        "the {p} arrived with a crack down one side",
        "my {p} was broken when I opened the box",
        "there is a big dent in the {p} you sent",
        "the box was crushed and the {p} inside is in pieces",
        "one corner of the {p} is snapped off",
        "I unpacked the {p} and found it scratched all over",
        "something must have hit the {p} on its way, it is bent",
        "the {p} came out of the parcel torn",
        "the {p} turned up smashed",
        "the {p} has a hole in it, straight from the box",
    ),
    "late": (
        "my {p} should have been here last Friday",
        "I have been waiting three weeks for the {p}",
        "the {p} still has not shipped",
        "tracking for the {p} has not moved since Monday",
        "you promised the {p} within two days and nothing came",
        "where is my {p}? It was due a week ago",
        "the courier keeps putting off the delivery of the {p}",
        "the delivery date for the {p} has passed twice now",
        "there is no sign of the {p} and the date is long gone",
        "the {p} is ten days overdue",
    ),
    "wrong item": (
        "I ordered a blue {p} and got a red one",
        "you sent me somebody else's {p}",
        "the {p} in the parcel is not the model I chose",
        "this is a different {p} from the one in my order",
        "I asked for the large {p}, this one is small",
        "you mixed up my {p}, the label has another name on it",
        "the {p} I received is the old version, I paid for the new one",
        "I wanted the black {p} and a white one came",
        "this {p} is not what I picked on your site",
        "the colour of the {p} is not the one I ordered",
    ),
    "refund": (
        "I sent the {p} back and want my money",
        "please pay me back for the {p}",
        "when will I get the money for the {p} I returned?",
        "I returned the {p} two weeks ago and have no refund yet",
        "I would like my money back for the {p}",
        "the refund for the {p} has not reached my account",
        "I cancelled the {p} and you still owe me for it",
        "kindly return what I paid for the {p}",
        "I am still waiting to be reimbursed for the {p}",
        "give me a refund for the {p}",
    ),
    "invoice": (
        "I need a bill for the {p} with my company's name",
        "could you mail me the invoice for the {p}?",
        "the receipt for the {p} shows the wrong address",
        "our accountant asks for an invoice for the {p}",
        "there is no VAT number on the bill for the {p}",
        "please send a copy of the receipt for my {p}",
        "I cannot find the invoice of the {p} in my account",
        "the total on the invoice for the {p} is wrong",
        "I lost the receipt for the {p}, can I have another?",
        "how do I download the bill for the {p}?",
    ),
    "how to": (
        "how do I put the {p} together?",
        "what is the best way to clean the {p}?",
        "there is no manual with the {p}, how does it work?",
        "can you explain how to adjust the {p}?",
        "I do not understand the instructions of the {p}",
        "is there a video that shows how to use the {p}?",
        "how should I store the {p} in winter?",
        "which setting of the {p} is right for a beginner?",
        "could somebody tell me how to take care of the {p}?",
        "I need help to set up the {p}",
    ),
}  # fmt: skip

URGENCIES: Final = {
    "high": (
        "I need this solved today.", "This is urgent.", "Please answer as soon as possible.", "It cannot wait.",
        "I leave tomorrow morning, so hurry.", "We need it right now.", "Please treat this as an emergency.",
        "My boss wants it within the hour.", "Be quick, please.", "I must have an answer by tonight.",
    ),
    "normal": (
        "Thanks.", "Thank you for your help.", "Best regards, Ana", "Can you look into it?", "", "Cheers, Tom",
        "What can you do?", "Let me know.", "Regards, Mr Osei", "Many thanks in advance.",
    ),
    "low": (
        "No hurry.", "Take your time.", "It is not pressing.", "Whenever you find a moment.", "There is no rush.",
        "It can wait until next month.", "Any time this year is fine.", "I am in no hurry.", "Next week is fine too.",
        "This is not urgent.",
    ),
}  # fmt: skip

OPENERS: Final = ("Hi! ", "Hello. ", "", "", "", "Good morning. ", "Dear team: ", "Hey! ", "Hello there. ", "Hi all. ")
ORDERS: Final = (
    "Order {o}.",
    "My order is {o}.",
    "It is order {o}.",
    "Order number {o}.",
    "(order {o})",
    "See order {o}.",
)


def main() -> None:
    """Write both files beside this one."""
    samples = list(make(random.Random(SEED)))  # noqa: S311 (a fixed shuffle, no secret)
    here = Path(__file__).parent
    for name, part in (("train", samples[:TRAIN_SAMPLES]), ("heldout", samples[TRAIN_SAMPLES:])):
        lines = [json.dumps({"messages": messages}) for messages in part]
        (here / f"tickets-{name}.jsonl").write_text("\n".join(lines) + "\n")


def make(rng: random.Random) -> Iterator[list[dict[str, str]]]:
    """First the training samples, then the held-out ones; no message twice, products and issues evenly."""
    seen: set[str] = set()
    while len(seen) < TRAIN_SAMPLES + HELDOUT_SAMPLES:
        number = len(seen)
        held_out = number >= TRAIN_SAMPLES
        answer = {
            "product": PRODUCTS[number % len(PRODUCTS)],
            "issue": list(ISSUES)[number % len(ISSUES)],
            "order": str(rng.randint(1000, 9999)),
            "urgency": rng.choice(list(URGENCIES)),
        }
        message = write(answer, rng, held_out=held_out)
        if message not in seen:
            seen.add(message)
            yield [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": message},
                {"role": "assistant", "content": json.dumps(answer)},
            ]


def write(answer: dict[str, str], rng: random.Random, *, held_out: bool) -> str:
    """A message that says what the answer has."""

    def choose(phrases: tuple[str, ...]) -> str:
        return rng.choice(phrases if held_out else phrases[:-KEPT_PHRASES])

    complaint = choose(ISSUES[answer["issue"]]).format(p=answer["product"])
    complaint += "" if complaint.endswith("?") else "."
    order = rng.choice(ORDERS).format(o=answer["order"])
    parts = [complaint, order] if rng.random() < ORDER_LAST else [order, complaint]
    opener, end = rng.choice(OPENERS), choose(URGENCIES[answer["urgency"]])
    text = " ".join(part for part in (*(upper(part) for part in parts), end) if part)
    return f"{opener}{text}"


def upper(text: str) -> str:
    """The text with a capital letter at its beginning."""
    return text[0].upper() + text[1:]


if __name__ == "__main__":
    main()
