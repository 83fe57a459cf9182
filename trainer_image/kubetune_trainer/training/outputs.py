"""The end of a training run: its outputs, where they come from, and the final message."""

import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kubetune_trainer.card import write_card
from kubetune_trainer.distributed import waiting_for_all
from kubetune_trainer.export import complete_weights, save_huggingface, save_peft, trained_weights
from kubetune_trainer.export.check import MergeCheck, rows_to_check
from kubetune_trainer.export.convert import convert
from kubetune_trainer.export.huggingface import OutputDtype
from kubetune_trainer.export.store import StoredOutput, store_output
from kubetune_trainer.lineage import lineage_sources, make_lineage, store_lineage
from kubetune_trainer.lora import lora_scale, lora_state_dict
from kubetune_trainer.names import OUTPUTS_DIR
from kubetune_trainer.push import push_output
from kubetune_trainer.report import last_step, report, set_last_step, write_termination_message
from kubetune_trainer.storage import scratch_dir
from kubetune_trainer.tokenizer import read_chat_template, write_chat_template
from kubetune_trainer.training.job import Job
from kubetune_trainer.training.step import check_weights


def finish(job: Job, outputs: list[dict[str, Any]]) -> None:
    """Pushes the output that is to be pushed, and says that the run is done and what it leaves behind."""
    pushed = push_output(job.config, outputs) if job.world.is_first else None
    report("done", step=last_step().get("step"))
    if job.world.is_first:
        write_termination_message("Complete", exit_code=0, outputs=outputs, pushed_to_hub=pushed, progress=last_step())


def export(job: Job) -> list[dict[str, Any]]:
    """Writes the outputs: all ranks gather the weights, rank 0 stores them; returns what it stored.

    Rank 0 may need hours for a large model, and the others wait for it as long.

    Raises:
        NonFiniteLossError: The weights are not finite.
    """
    report("phase", phase="Exporting")
    take_best(job)
    check_weights(job, job.total_steps)
    stored: list[StoredOutput] = []
    complete = scratch_dir() / "complete"
    with waiting_for_all():
        check = prepare_check(job)
    if any(output.type not in {"HuggingFace", "PEFT"} for output in job.config.outputs):
        with waiting_for_all():
            gather_model(job, complete)
            check_merged(check, complete, name="complete")
    for output in job.config.outputs:
        with waiting_for_all():
            folder, difference = scratch_dir() / OUTPUTS_DIR / output.name, None
            if output.type == "PEFT":
                gather_adapters(job, folder)
            elif output.type == "HuggingFace":
                gather_model(job, folder, dtype=output.dtype)
                difference = check_merged(check, folder, name=output.name)
            elif job.world.is_first:
                convert(output, complete, folder)
            if job.world.is_first:
                found = store_output(output, folder, config=job.config)
                stored.append(replace(found, merge_difference=difference))
                report("output", **stored[-1].told())
                shutil.rmtree(folder)
    with waiting_for_all():  # no rank is done before the outputs are stored
        if job.world.is_first:
            describe(job, stored)
    return [output.told() for output in stored]


def take_best(job: Job) -> None:
    """With training.early_stopping, goes back to the weights of the best validation: outputs are made of those."""
    told = last_step()
    best = told.get("bestValidationStep")
    if best not in {None, told.get("step")} and not job.checkpointer.restore(best, job.model, job.optimizer):
        report(
            "warning",
            message=f"the checkpoint of step {best}, the best by validation, is damaged or not complete: outputs have "
            f"the weights of step {told.get('step')}",
        )
        set_last_step({key: value for key, value in told.items() if not key.startswith("best")})


def prepare_check(job: Job) -> MergeCheck | None:
    """Makes what merged models are compared with, on rank 0; None where nothing is merged."""
    if job.config.lora is None or all(output.type == "PEFT" for output in job.config.outputs):
        return None
    adapters = lora_state_dict(job.model)
    if not job.world.is_first:
        return None
    return MergeCheck(
        job.local.model_dir,
        adapters,
        scale=lora_scale(job.model),
        packed=job.config.merges_packed,
        batches=rows_to_check(job.local.train_data, pad_id=job.pad_id),
    )


def check_merged(check: MergeCheck | None, folder: Path, *, name: str) -> str | None:
    """Compares a merged model with the adapters; returns and reports how far it is from them.

    Raises:
        DataError: It is too far.
    """
    if check is None:
        return None
    found = check.difference(folder)
    report("merge", output=name, difference=found.relative, bound=found.bound, largest_logit_difference=found.largest)
    return f"{found.relative:.3g}"


def describe(job: Job, outputs: Sequence[StoredOutput]) -> None:
    """Puts a card and the lineage beside each output, and the lineage into the run's folder last, as a mark of all."""
    config, local, prepared = job.config, job.local, job.prepared
    held_out = lineage_sources(config.dataset.held_out, prepared.held_out)
    lineage = make_lineage(
        config,
        model=prepared.model,
        model_dir=local.base_dir,
        adapter=prepared.adapter,
        adapter_dir=local.adapter_dir,
        first_adapters=(
            (prepared.first_adapters, local.first_adapters_dir)
            if prepared.first_adapters is not None and local.first_adapters_dir is not None
            else None
        ),
        script=Path(sys.argv[0]) if config.recipe == "Custom" else None,
        others={field: (found, local.others[field]) for field, found in prepared.others.items()},
        sources=[
            *lineage_sources(config.dataset.sources, prepared.sources),
            *({**told, "use": "validation"} for told in held_out),
        ],
        outputs=outputs,
    )
    data = prepared.data.model_dump()
    for output in outputs:
        write_card(output, config=config, lineage=lineage, base_dir=local.base_dir, measured=last_step(), data=data)
    store_lineage(lineage, outputs, config=config)


def gather_model(job: Job, folder: Path, *, dtype: OutputDtype = "Source") -> None:
    """Puts the complete model, with adapters merged, into a folder of rank 0; the other ranks only give their parts."""
    source_dir, weights = job.local.model_dir, trained_weights(job.model)
    if job.world.is_first:
        scale = lora_scale(job.model) if job.config.lora is not None else 1.0
        packed = job.config.merges_packed
        complete = complete_weights(weights, source_dir=source_dir, lora_scale=scale, packed=packed)
        save_huggingface(complete, source_dir=source_dir, target_dir=folder, dtype=dtype)
        keep_chat_template(job, folder)
    for _ in weights:
        pass


def gather_adapters(job: Job, folder: Path) -> None:
    """Puts the adapters into a folder of rank 0; the other ranks only give their parts."""
    adapters, model, lora = lora_state_dict(job.model), job.config.model, job.config.lora
    if job.world.is_first and lora is not None:
        base = model.hub.repo if model.hub else model.uri.location
        save_peft(
            adapters,
            target_dir=folder,
            lora=lora,
            base_model=base,
            revision=job.prepared.model.commit,
            packed=job.config.merges_packed,
            model_dir=job.local.model_dir,
        )
        keep_chat_template(job, folder)


def keep_chat_template(job: Job, folder: Path) -> None:
    """Puts the template that the data was written with beside the weights, where it was not the model's own."""
    template = job.config.dataset.chat_template
    if template is None and (brought := read_chat_template(job.local.model_dir)) != read_chat_template(
        job.local.base_dir
    ):
        template = brought  # by adapters
    if template is not None:
        write_chat_template(folder, template)
