"""The loss over a large vocabulary: memory and time beside plain cross entropy."""

from typing import Any

from harness import Measures, Ratio, Row, Settings, Side, Table, forget_peak, now, peak_bytes, resident_bytes, run_table


def inputs(settings: Settings) -> tuple[Any, Any, Any]:
    """Returns hidden states, the output head and labels, the same for both."""
    import torch

    torch.manual_seed(0)
    tokens, vocabulary = settings["tokens"], settings["vocabulary"]
    hidden = torch.randn(1, tokens, settings["width"]).requires_grad_()
    head = (torch.randn(vocabulary, settings["width"]) * 0.02).requires_grad_()
    labels = torch.randint(0, vocabulary, (1, tokens))
    labels[:, round(settings["share"] * tokens) :] = -100
    return hidden, head, labels


def measure(inputs_: tuple[Any, Any, Any], loss_of: Any) -> Measures:
    """Takes one forward and backward pass; the inputs are not part of the memory, the gradients are."""
    forget_peak()
    baseline, began = resident_bytes(), now()
    loss = loss_of(*inputs_)
    loss.backward()
    return {"peakBytes": peak_bytes() - baseline, "seconds": now() - began, "loss": loss.item()}


def ours(settings: Settings) -> Measures:
    """Our chunked loss over trained positions."""
    from kubetune_trainer.loss import sum_cross_entropy

    return measure(inputs(settings), sum_cross_entropy)


def plain(settings: Settings) -> Measures:
    """All logits, then torch's cross entropy."""
    from torch.nn import functional

    def loss_of(hidden: Any, head: Any, labels: Any) -> Any:
        logits = functional.linear(hidden, head).flatten(0, 1).float()
        return functional.cross_entropy(logits, labels.flatten(), reduction="sum")

    return measure(inputs(settings), loss_of)


FIXED = {"tokens": 2048, "vocabulary": 128256, "width": 512}
TABLE = Table(
    name="loss",
    file=__file__,
    title="Cross entropy over a vocabulary of 128,256 beside torch's own.",
    notes=(
        "2048 positions of width 512 in fp32, forward and backward, with gradients for the hidden states and for the "
        "output head, whose 250 MiB both sides need. Memory is the peak above the inputs."
    ),
    sides={"ours": Side(run=ours), "plain": Side(run=plain)},
    rows=[
        Row(name="all positions trained", settings={**FIXED, "share": 1.0}, sides=("ours", "plain")),
        Row(name="a third of the positions trained", settings={**FIXED, "share": 0.33}, sides=("ours", "plain")),
    ],
    ratios=[
        Ratio(name="memory ÷ plain", row=0, measure="peakBytes", peer="plain", target="<= 0.20"),
        Ratio(name="memory ÷ plain, a third trained", row=1, measure="peakBytes", peer="plain", target="<= 0.20"),
        Ratio(name="seconds ÷ plain", row=0, measure="seconds", peer="plain", target="<= 1.1"),
    ],
    rounds=2,
    same_without_bf16=True,
)

if __name__ == "__main__":
    run_table(TABLE)
