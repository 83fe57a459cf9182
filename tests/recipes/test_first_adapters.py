"""A run that begins with adapters trains these, and refuses settings that are not theirs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from kubetune_trainer import load_model, load_tokenizer
from tests.recipes.gang import Gang, Zygote
from tests.recipes.tiny import write_config, write_messages, write_model

TOLERANCE = 1e-4
OUTPUTS = [{"name": "merged", "type": "HuggingFace"}, {"name": "adapter", "type": "PEFT"}]
TRAINING = {
    "max_steps": 4, "global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-2, "precision": "FP32",
}  # fmt: skip


def run(zygote: Zygote, place: Path, name: str, *overrides: str, **blocks: Any) -> Gang:
    config = write_config(place / f"{name}.yaml", **{"outputs": OUTPUTS, "training": TRAINING} | blocks)
    return Gang.start(zygote, place / name, config, *overrides)


def output(place: Path, run_name: str, name: str) -> Path:
    return place / "runs" / run_name / "outputs" / name


def begun_with(place: Path, run_name: str, **lora: Any) -> dict[str, Any]:
    source = {"uri": {"location": f"file://{output(place, run_name, 'adapter')}"}}
    return {"lora": {"rank": 4, "alpha": 8, "adapter": source} | lora}


@pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning"
)  # peft 0.21 asks transformers 5 by an old name
@pytest.mark.parametrize("tuning", ["LoRA", "DoRA"])
def test_adapters_are_trained_on_from_where_they_are(zygote: Zygote, tiny: Path, tuning: str) -> None:
    first, second, merged = (f"{tuning}-{part}".lower() for part in ("first", "second", "merged"))
    run(zygote, tiny, first, tuning=tuning).succeed()
    gang = run(zygote, tiny, second, tuning=tuning, **begun_with(tiny, first)).succeed()
    model = {"uri": {"location": f"file://{output(tiny, first, 'merged')}"}}
    from_merged = run(zygote, tiny, merged, model=model).succeed()
    assert gang.losses()[1] == pytest.approx(from_merged.losses()[1], rel=TOLERANCE), "it begins where the first ended"
    assert gang.losses()[4] < gang.losses()[1]

    tokens = torch.tensor([[5, 6, 7, 8, 9, 10]])
    ours = load_model(output(tiny, second, "merged"), dtype=torch.float32)
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32), output(tiny, second, "adapter")
    )
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, ours(tokens), atol=TOLERANCE, rtol=TOLERANCE)


def test_adapters_of_packed_weights_are_gone_on_with_beside_others_only_with_a_warning(
    zygote: Zygote, tmp_path: Path
) -> None:
    write_model(tmp_path / "model", intermediate_size=128)
    write_messages(tmp_path / "pairs.jsonl", samples=8, seed=1)
    run(zygote, tmp_path, "packed", "training.max_steps=1", tuning="QLoRA", outputs=OUTPUTS[1:]).succeed()
    for tuning, warned in (("QLoRA", False), ("LoRA", True)):
        gang = run(
            zygote, tmp_path, tuning.lower(), "training.max_steps=1", tuning=tuning, **begun_with(tmp_path, "packed")
        ).succeed()
        told = [event["message"] for event in gang.events("warning")]
        assert any("lora.adapter was trained beside weights in NF4" in message for message in told) == warned


def test_settings_have_to_be_those_of_the_adapters(zygote: Zygote, tiny: Path) -> None:
    run(zygote, tiny, "theirs", "training.max_steps=1").succeed()
    for number, (blocks, says) in enumerate(
        [
            (begun_with(tiny, "theirs", rank=8), "lora.rank must be that of lora.adapter, 4, got 8"),
            (begun_with(tiny, "theirs", alpha=4), "lora.alpha must be that of lora.adapter, 8.0, got 4.0"),
            (
                begun_with(tiny, "theirs", rank_stabilized=True),
                "lora.rank_stabilized must be that of lora.adapter, False, got True",
            ),
            (
                {"tuning": "DoRA"} | begun_with(tiny, "theirs"),
                "tuning must be that of lora.adapter, LoRA, got DoRA",
            ),
            (
                begun_with(tiny, "theirs", target_modules=["q_proj"]),
                "lora.target_modules must be the layers of lora.adapter, got q_proj: it also has model.layers.0.mlp.",
            ),
        ]
    ):
        gang = run(zygote, tiny, f"other-{number}", **blocks)
        assert gang.wait() == [64], gang.stderr()
        assert says in gang.message()["message"]


def test_the_template_that_adapters_were_trained_with_goes_on_with_them(zygote: Zygote, tiny: Path) -> None:
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    step = "training.max_steps=1"
    run(zygote, tiny, "without-template", step).succeed()
    run(zygote, tiny, "with-template", step, f"dataset.chat_template='{template}'").succeed()
    after = run(zygote, tiny, "after-template", step, **begun_with(tiny, "with-template")).succeed()
    assert load_tokenizer(output(tiny, "after-template", "merged")).chat_template == template
    assert (output(tiny, "after-template", "adapter") / "chat_template.jinja").read_text() == template
    by_hand = run(
        zygote,
        tiny,
        "template-by-hand",
        step,
        f"dataset.chat_template='{template}'",
        **begun_with(tiny, "with-template"),
    )
    assert after.losses() == by_hand.succeed().losses(), "the rows are written by it as well"
    assert not (output(tiny, "without-template", "adapter") / "chat_template.jinja").exists()
