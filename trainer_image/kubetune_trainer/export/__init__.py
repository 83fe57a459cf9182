"""What a run leaves behind, in the formats that others read."""

from kubetune_trainer.export.digest import folder_digest
from kubetune_trainer.export.huggingface import complete_weights, save_huggingface, trained_weights
from kubetune_trainer.export.peft import save_peft

__all__ = ["complete_weights", "folder_digest", "save_huggingface", "save_peft", "trained_weights"]
