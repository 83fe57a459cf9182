"""The beginning of a training run: arguments, ranks, the model with its data, and where the last attempt stopped."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from kubetune_trainer.checkpoint import Checkpointer, check_steps_left, find_checkpoint, load_checkpoint
from kubetune_trainer.compiled import check_compiler, keep_kernels
from kubetune_trainer.config import FineTuneConfig, load_config
from kubetune_trainer.data.prepare import Local, Prepared, fetch, prepare
from kubetune_trainer.data.sampler import total_steps
from kubetune_trainer.distributed import StopSignal, World, broadcast_object, brought_to_node, join_world, made_by_first
from kubetune_trainer.errors import ConfigError, PreemptedError
from kubetune_trainer.fingerprint import fingerprint
from kubetune_trainer.logs import keep_log
from kubetune_trainer.lora import apply_lora, init_lora, set_lora
from kubetune_trainer.model.adapter import read_first_adapters
from kubetune_trainer.model.block_attention import why_not
from kubetune_trainer.model.config import ModelConfig, read_config
from kubetune_trainer.model.decoder import Decoder
from kubetune_trainer.model.offload import ActivationOffload
from kubetune_trainer.model.weights import build_model, load_weights
from kubetune_trainer.names import CHECKPOINTS_DIR
from kubetune_trainer.optim import BITS, StepInBackward, build_optimizer
from kubetune_trainer.parallel import build_mesh, compute_dtype, parallelize
from kubetune_trainer.push import outputs_to_push, push_again
from kubetune_trainer.report import attempt, end_with, open_log, report, serve_metrics
from kubetune_trainer.storage import open_store, scratch_dir
from kubetune_trainer.tokenizer import load_tokenizer
from kubetune_trainer.tracking import tracked
from kubetune_trainer.vocabulary import ids_of


@dataclass(frozen=True)
class Job:
    """What a loop works with."""

    config: FineTuneConfig
    world: World
    stop: StopSignal
    prepared: Prepared
    local: Local
    model: Decoder
    optimizer: torch.optim.Optimizer
    in_backward: StepInBackward | None
    """With training.optimizer_in_backward, who takes the optimizer's steps."""
    checkpointer: Checkpointer
    pad_id: int
    total_steps: int

    @property
    def weights(self) -> list[torch.nn.Parameter]:
        """What the optimizer changes."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]


@contextmanager
def begin(arguments: Sequence[str], *, description: str, recipes: Sequence[str]) -> Iterator[Job]:
    """Reads the config, meets the other ranks and sets the run up; when the block is left, its log is kept.

    Args:
        arguments: Those of the command line.
        description: What `--help` says of the script, in its first line.
        recipes: Which `recipe` of a config the script can do, beside Custom: it may be somebody's copy.

    Raises:
        ConfigError: The config is wrong, is for another script, or has a batch that the ranks cannot share; or an
            argument is none of these.
    """
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--config", required=True, help="a complete YAML file, as those in recipes/configs")
    parser.add_argument("overrides", nargs="*", help="field=value each, as in training.max_steps=10")
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise ConfigError(
            f"{Path(sys.argv[0]).name}: arguments must be --config and field=value, got {' '.join(unknown)}",
            hint="A script with arguments of its own reads them before it calls begin.",
        )
    config = load_config(options.config, overrides=options.overrides)
    if config.recipe not in {*recipes, "Custom"}:
        raise ConfigError(f"{config.title}: recipe must be {' or '.join(recipes)} for this script, got {config.recipe}")
    stop = StopSignal(leave=lambda: end_with(PreemptedError("stopped outside of training; no finished step is lost")))
    with join_world(tensor=config.training.parallelism.tensor) as world:
        config.accumulation_steps(world.size)  # refuses what the ranks cannot share
        if config.training.compile == "Blocks":
            check_compiler(config.title, device_type=world.device.type)
        serve_metrics()
        log = scratch_dir() / f"attempt-{attempt()}.jsonl"
        open_log(log)
        try:
            outputs = broadcast_object(outputs_to_push(config) if world.is_first else None)
            with tracked(config, is_first=world.is_first) as settle:
                if outputs is None:
                    yield set_up(config, world, stop, before_complete=settle)
                elif world.is_first:
                    push_again(config, outputs)
        finally:
            if world.is_first:
                keep_log(config, log)
    if outputs is not None:
        raise SystemExit(0)  # the block has nothing to do


def set_up(
    config: FineTuneConfig, world: World, stop: StopSignal, *, before_complete: Callable[[], object] = lambda: None
) -> Job:
    """Gets the model and the data to this node, and builds the model on all ranks."""
    report("phase", phase="Downloading")
    prepared = made_by_first(world, lambda: prepare(config, report=report))
    local = brought_to_node(world, lambda: fetch(prepared, config))

    report("phase", phase="Loading")
    training = config.training
    if training.cpu_offload and world.device.type == "cpu":
        report("warning", message="training.cpu_offload saves nothing on a CPU: host memory is all there is")
    model = build(config, local.model_dir, world, first_adapters=local.first_adapters_dir)
    _warn_of_stretched_positions(config, model.config)
    optimizer = build_optimizer(
        model,
        training,
        learning_rate_ratio=config.lora.learning_rate_ratio if config.lora else 1.0,
        bits=BITS[training.optimizer],
        rounding_seed=training.seed if training.stochastic_rounding else None,
    )
    return Job(
        config=config,
        world=world,
        stop=stop,
        prepared=prepared,
        local=local,
        model=model,
        optimizer=optimizer,
        in_backward=StepInBackward(optimizer) if training.optimizer_in_backward else None,
        checkpointer=Checkpointer(
            open_store(f"{config.run.directory}/{CHECKPOINTS_DIR}", s3=config.storage.s3),
            settings=config.checkpoint,
            world=world,
            scratch=scratch_dir() / f"rank-{world.rank}",
            record={"seed": training.seed, "configDigest": _digest(config), "worldSize": world.size},
            before_complete=before_complete,
        ),
        pad_id=load_tokenizer(local.model_dir).pad_id,
        total_steps=total_steps(
            len(local.train_data),
            global_batch_size=training.global_batch_size,
            epochs=training.epochs,
            max_steps=training.max_steps,
        ),
    )


def build(config: FineTuneConfig, model_dir: Path, world: World, *, first_adapters: Path | None = None) -> Decoder:
    """The model, sharded over all ranks; every rank reads only its own rows of the weights."""
    model, trained_ids = build_model(read_config(model_dir)), ()
    if config.lora is not None:
        trained_ids = ids_of(model_dir, config.lora.train_tokens)
        apply_lora(model, **config.adapter_settings(), trained_ids=trained_ids)
    if config.qat is not None:
        from kubetune_trainer.quantize.qat import prepare_qat  # noqa: PLC0415 (slow, and only where it is asked for)

        prepare_qat(model, scheme=config.qat.scheme, group_size=config.qat.group_size)
    parallelize(
        model,
        precision=config.training.precision,
        activation_checkpointing=config.training.activation_checkpointing,
        activation_offload=activation_offload(config, world),
        attends_by_blocks=attends_by_blocks(config, model.config, world),
        is_compiled=config.training.compile == "Blocks",
        cpu_offload=config.training.cpu_offload,
        mesh=mesh_of(config, world),
    )
    model.to_empty(device=home_of(config, world))
    load_weights(model, model_dir)
    init_lora(model, seed=config.training.seed)
    if first_adapters is not None:
        set_lora(model, read_first_adapters(first_adapters, config=config, shape=model.config, trained_ids=trained_ids))
    return model


def _warn_of_stretched_positions(config: FineTuneConfig, shape: ModelConfig) -> None:
    """Says where rows that share a micro batch do not compute what each would by itself."""
    length = config.dataset.max_sequence_length
    for rope in shape.ropes:
        if rope is not None and rope.kind in {"dynamic", "longrope"} and length > rope.original_max_positions:
            report(
                "warning",
                message=f"dataset.max_sequence_length is {length}, and this model's {rope.kind} positions change "
                f"beyond {rope.original_max_positions} tokens: as in transformers, the longest document of a micro "
                "batch decides for all of it, so that the loss depends on how rows are spread",
            )
            return


def activation_offload(config: FineTuneConfig, world: World) -> ActivationOffload | None:
    """Where activations wait for backward: with `training.activation_offload` not on the device."""
    if not config.training.activation_offload:
        return None
    if world.device.type == "cpu":
        report("warning", message="training.activation_offload has nothing to do on a CPU: host memory is all there is")
        return None
    return ActivationOffload(world.device)


def attends_by_blocks(config: FineTuneConfig, shape: ModelConfig, world: World) -> bool:
    """Whether attention passes over what no query sees: on CUDA, where a trial of it goes well.

    Not in blocks that are compiled whole, of which the trial would say nothing.
    """
    training = config.training
    if world.device.type == "cpu" or training.compile != "None":
        return False
    keep_kernels()
    dtype = torch.float32 if training.precision == "FP32" else compute_dtype(world.device)
    problem = why_not(shape, dtype=dtype, device=world.device, recompute=training.activation_checkpointing)
    if problem is not None:
        report("warning", message=f"attention uses a mask: flex_attention cannot be used here ({problem})")
    return problem is None


def home_of(config: FineTuneConfig, world: World) -> torch.device:
    """Where weights are between the moments at which they are used."""
    return torch.device("cpu") if config.training.cpu_offload else world.device


def mesh_of(config: FineTuneConfig, world: World) -> DeviceMesh:
    """The ranks, as `training.parallelism` arranges them."""
    wanted = config.training.parallelism
    return build_mesh(world.device.type, num_ranks=world.size, replicate=wanted.replicate, tensor=wanted.tensor)


def build_frozen(job: Job, model_dir: Path) -> Decoder:
    """A second model that is only asked and never trained, sharded as the first."""
    model = build_model(read_config(model_dir)).requires_grad_(requires_grad=False)
    training, mesh = job.config.training, mesh_of(job.config, job.world)
    by_blocks = attends_by_blocks(job.config, model.config, job.world)
    parallelize(
        model, precision=training.precision, attends_by_blocks=by_blocks, cpu_offload=training.cpu_offload, mesh=mesh
    )
    model.to_empty(device=home_of(job.config, job.world))
    load_weights(model, model_dir)
    return model.eval()


def resume(job: Job) -> int:
    """Loads the newest complete checkpoint, of this run or else of the run to begin with, and says how it begins.

    Returns:
        The step that is done already.

    Raises:
        ConfigError: The other run has no complete checkpoint, or one after which this run has no step left.
    """
    step, trained = _load_newest_checkpoint(job), sum(weight.numel() for weight in job.weights)
    if job.config.training.warmup_steps >= job.total_steps:
        report(
            "warning",
            message=f"training.warmup_steps is {job.config.training.warmup_steps} and the run has {job.total_steps} "
            "steps: the learning rate never gets to training.learning_rate",
        )
    report(
        "start",
        attempt=attempt(),
        step=step,
        total_steps=job.total_steps,
        world_size=job.world.size,
        device=job.world.device.type,
        parameters=job.prepared.parameters + (trained if job.config.lora is not None else 0),
        trainable_parameters=trained,
    )
    return step


def _load_newest_checkpoint(job: Job) -> int:
    config, scratch = job.config, scratch_dir() / f"rank-{job.world.rank}"
    own, first = f"{config.run.directory}/{CHECKPOINTS_DIR}", config.checkpoint.resume_from
    for place in [own, *([first.uri] if first else [])]:
        store = open_store(place, s3=config.storage.s3)
        folder = broadcast_object(find_checkpoint(store) if job.world.is_first else None)
        if folder is not None:
            resumed = load_checkpoint(store, folder, model=job.model, optimizer=job.optimizer, scratch=scratch)
            if place != own:
                check_steps_left(config, step=resumed.step, uri=resumed.uri, total_steps=job.total_steps)
                resumed = resumed.without_validation()
            if config.training.early_stopping is None:
                resumed = resumed.without_best()
            if resumed.record["configDigest"] != _digest(config):
                report(
                    "warning",
                    message=f"{resumed.uri} was saved under another config or script: training goes on after "
                    f"step {resumed.step}, with the rows that this run has from there; the loss may jump",
                )
            report("resume", step=resumed.step, uri=resumed.uri)
            job.checkpointer.start_from(resumed)
            return resumed.step
    if first is not None:
        raise ConfigError(
            f"{config.title}: checkpoint.resume_from.uri must hold a complete checkpoint, got {first.uri}"
        )
    return 0


def _digest(config: FineTuneConfig) -> str:
    """A digest of what decides the numbers of the run: its config, and the script where that is somebody's own."""
    if config.recipe != "Custom":
        return config.training_digest()
    return fingerprint([config.training_digest(), Path(sys.argv[0]).read_text(encoding="utf-8")], length=16)
