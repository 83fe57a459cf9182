"""The config file of a run: one complete YAML, checked as a whole before anything is loaded.

The operator renders it from a FineTuneJob and `kubetune run` writes the same; a person clones one of `recipes/configs`.
Its keys are the job's own words in snake_case. Nothing here imports torch: a wrong config is refused at once.
"""

from kubetune_trainer.config.blocks import (
    CaBundle,
    ConfigMapKey,
    Dataset,
    HubModel,
    HubSource,
    JobConfig,
    Model,
    Parent,
    Run,
    S3Storage,
    SecretKey,
    SecretName,
    Source,
    Storage,
    UriSource,
    Validation,
    Workspace,
)
from kubetune_trainer.config.evaluate import ComparedTo, ConfigMapName, EvalConfig, Gate, Task, TaskFiles
from kubetune_trainer.config.finetune import (
    Checkpoint,
    FineTuneConfig,
    FirstAdapters,
    Lora,
    Output,
    Profile,
    PushToHub,
    ResumeFrom,
    Training,
)
from kubetune_trainer.config.load import (
    load_config,
)
from kubetune_trainer.config.outputs import ExecuTorch, Gguf, OutputBase
from kubetune_trainer.config.quantize import Calibration, QuantizeConfig, QuantizedOutput, QuantizeGate, Verification
from kubetune_trainer.config.recipes import Custom, Distillation, Dpo, Kto, Orpo, Qat, Script, Simpo
from kubetune_trainer.config.tracking import Mlflow, TensorBoard, Tracking, Wandb

__all__ = [
    "CaBundle",
    "Calibration",
    "Checkpoint",
    "ComparedTo",
    "ConfigMapKey",
    "ConfigMapName",
    "Custom",
    "Dataset",
    "Distillation",
    "Dpo",
    "EvalConfig",
    "ExecuTorch",
    "FineTuneConfig",
    "FirstAdapters",
    "Gate",
    "Gguf",
    "HubModel",
    "HubSource",
    "JobConfig",
    "Kto",
    "Lora",
    "Mlflow",
    "Model",
    "Orpo",
    "Output",
    "OutputBase",
    "Parent",
    "Profile",
    "PushToHub",
    "Qat",
    "QuantizeConfig",
    "QuantizeGate",
    "QuantizedOutput",
    "ResumeFrom",
    "Run",
    "S3Storage",
    "Script",
    "SecretKey",
    "SecretName",
    "Simpo",
    "Source",
    "Storage",
    "Task",
    "TaskFiles",
    "TensorBoard",
    "Tracking",
    "Training",
    "UriSource",
    "Validation",
    "Verification",
    "Wandb",
    "Workspace",
    "load_config",
]
