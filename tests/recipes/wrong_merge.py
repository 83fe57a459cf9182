"""Plants a mistake: adapters are merged with three times their scale. Imported by a rank before its recipe."""

from kubetune_trainer.export import huggingface
from kubetune_trainer.training import outputs


def before() -> None:
    """Every merge of this process goes wrong from now on."""
    outputs.complete_weights = lambda weights, *, lora_scale, **others: huggingface.complete_weights(
        weights, lora_scale=3 * lora_scale, **others
    )
