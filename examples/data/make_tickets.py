"""Write the demo's data: a customer's message in, one line of JSON with three keys out.

Messages are put together from parts written by hand: an opening, what happened, and a closing that says whether it is
urgent. The held-out part is half new combinations of known parts, half happenings that the training part has none of.
The same files come out every time.

    python examples/data/make_tickets.py
"""

import json
import random
from pathlib import Path

NUM_TRAINING = 320
NUM_HELD_OUT = 40
NEW_PER_TOPIC = 2
"""So many of each topic's happenings, the last ones, appear in the held-out part alone."""

SYSTEM = "Turn the message into one line of JSON with the keys topic, product and urgent."

PRODUCTS = (
    "headphones", "keyboard", "router", "printer", "monitor", "tablet", "webcam", "kettle", "toaster", "blender",
    "backpack", "desk lamp", "smart watch", "coffee maker", "power bank", "vacuum cleaner",
)  # fmt: skip

HAPPENINGS = {
    "billing": (
        "I was charged twice for the {product}.",
        "The invoice for my {product} shows the wrong amount.",
        "My card was debited for a {product} that I never ordered.",
        "The discount code was not applied to the {product}.",
        "I need an invoice with our company's tax number for the {product}.",
        "Why does the bill list two prices for the same {product}?",
        "The payment for the {product} failed, yet the money is gone.",
        "You took 20 euros more for the {product} than the shop had said.",
        "Can I pay for the {product} in three instalments?",
        "The receipt for the {product} has somebody else's name on it.",
        "I still see a pending charge for the {product} on my account.",
        "Please correct the VAT on the invoice of the {product}.",
        "My bank says that the {product} was billed again this month.",
        "The amount on the receipt of the {product} does not match what I paid.",
    ),
    "delivery": (
        "The {product} should have arrived last week.",
        "Tracking says that my {product} was delivered, but nothing is here.",
        "The courier left the {product} in the rain.",
        "Where is the {product} that I ordered ten days ago?",
        "Please send the {product} to my office instead of my home.",
        "The parcel with the {product} has been stuck in customs since Monday.",
        "I got a {product} that my neighbour had ordered.",
        "Half of the order is here, the {product} is missing.",
        "When will the {product} be shipped?",
        "The driver rang nobody's bell and took the {product} back.",
        "Can you deliver the {product} on a Saturday?",
        "The tracking number of my {product} does not work.",
        "The shipment with the {product} went to my old address.",
        "The parcel came, but the box for the {product} was empty.",
    ),
    "defect": (
        "The {product} does not turn on any more.",
        "The {product} makes a loud noise and gets very hot.",
        "One of the buttons on the {product} came off.",
        "After the update the {product} restarts every few minutes.",
        "There is a crack in the case of the {product}.",
        "The {product} smells of burnt plastic.",
        "My {product} stopped working after two days.",
        "The cable of the {product} is loose and sparks.",
        "The {product} loses its connection all the time.",
        "The display of the {product} flickers.",
        "The {product} only works when I hit it.",
        "The battery of the {product} is flat after ten minutes.",
        "Smoke came out of the {product} this morning.",
        "The {product} is broken, the light on it just blinks red.",
    ),
    "return": (
        "I would like to send the {product} back.",
        "The {product} is too big, can I exchange it?",
        "How do I get a return label for the {product}?",
        "I returned the {product} and have had no refund so far.",
        "The {product} is not what I expected and I want my money back.",
        "Please cancel my order of the {product}.",
        "Can I swap the {product} for the blue one?",
        "I changed my mind about the {product}.",
        "Until when can I return the {product} unopened?",
        "I bought two by mistake and want to give one {product} back.",
        "The shop refused to take the {product} back.",
        "The {product} was a gift and I already have one, so I want to return it.",
        "Which address do I send the {product} to for a refund?",
        "I want to exchange the {product} for a smaller one.",
    ),
    "question": (
        "Does the {product} come with a charger?",
        "Is the {product} also sold in white?",
        "How do I clean the {product}?",
        "How long is the warranty on the {product}?",
        "Does the {product} work with 110 volts?",
        "Where can I download the manual of the {product}?",
        "Which spare parts are there for the {product}?",
        "How heavy is the {product}?",
        "Is the new {product} better than last year's?",
        "Can I use the {product} outdoors?",
        "Will the {product} be in stock again before June?",
        "What is the {product} made of?",
        "How do I reset the {product} to its factory settings?",
        "Is there a student price for the {product}?",
    ),
}

OPENINGS = (
    "", "", "", "", "Hi,", "Hello,", "Good morning.", "Dear team,", "Hey there,", "Hi, it's me again.",
    "Hello support,", "Sorry to bother you.",
)  # fmt: skip

CLOSINGS = {
    True: (
        "I need an answer today!",
        "This is urgent.",
        "Please call me back at once.",
        "It has to be settled by tonight.",
        "We leave tomorrow, so please hurry.",
        "This cannot wait.",
        "ASAP please!",
        "I need it for a meeting in two hours.",
    ),
    False: (
        "No hurry.",
        "Thanks in advance!",
        "Whenever you find the time.",
        "Take your time.",
        "Best regards, Kim",
        "Thank you.",
        "Next week is early enough.",
        "",
    ),
}


def main() -> None:
    """Write both files beside this one."""
    lot = random.Random(7)  # noqa: S311 (no secret, the same every time)
    known = {topic: texts[:-NEW_PER_TOPIC] for topic, texts in HAPPENINGS.items()}
    new = {topic: texts[-NEW_PER_TOPIC:] for topic, texts in HAPPENINGS.items()}
    used: set[str] = set()
    training = [draw(lot, known, used, number) for number in range(NUM_TRAINING)]
    held_out = [draw(lot, new if number % 2 else known, used, number // 2) for number in range(NUM_HELD_OUT)]
    write("tickets-train.jsonl", training)
    write("tickets-heldout.jsonl", held_out)


def draw(lot: random.Random, happenings: dict[str, tuple[str, ...]], used: set[str], number: int) -> dict[str, object]:
    """Put one sample together whose message no other has; topics and urgency take turns."""
    topic = list(happenings)[number % len(happenings)]
    urgent = number // len(happenings) % 2 == 0
    while True:
        product = lot.choice(PRODUCTS)
        happening = lot.choice(happenings[topic]).format(product=product)
        message = " ".join(part for part in (lot.choice(OPENINGS), happening, lot.choice(CLOSINGS[urgent])) if part)
        message = message.lower() if lot.random() < 0.2 else message
        if message not in used:
            used.add(message)
            break
    answer = json.dumps({"topic": topic, "product": product, "urgent": urgent})
    return {
        "messages": [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": message},
            {"role": "assistant", "content": answer},
        ]
    }


def write(name: str, samples: list[dict[str, object]]) -> None:
    """Write one sample per line."""
    lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
    Path(__file__).with_name(name).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
