"""One call of lm_eval: tasks become requests, the ranks answer them, and the answers become metrics."""

import os

from lm_eval.evaluator import evaluate

from kubetune_trainer.config import EvalConfig
from kubetune_trainer.evaluate.model import EvalModel
from kubetune_trainer.evaluate.results import Evaluation, settings_of
from kubetune_trainer.evaluate.tasks import LoadedTasks, seed_lm_eval
from kubetune_trainer.evaluate.work import Crew

BOOTSTRAP_DRAWS = 1000
"""For the standard error of metrics that are no mean; lm_eval's own default takes a minute for each of them."""


def ask(config: EvalConfig, crew: Crew, loaded: LoadedTasks, *, name: str) -> Evaluation:
    """Evaluate the crew's model; called on rank 0 while the others work.

    Args:
        config: The job.
        crew: All ranks.
        loaded: The job's tasks.
        name: What the model is called in the record.
    """
    max_length = config.max_sequence_length or crew.model.config.max_positions
    model = EvalModel(crew, loaded.tasks.values(), max_length=max_length, name=name, seed=config.seed)
    seed_lm_eval(config.seed)
    # Else lm_eval would draw, the same numbers, in a pool of forks. They inherit the handler of SIGTERM, with which the
    # pool ends them, so that it could wait for one without end.
    os.environ["DISABLE_MULTIPROC"] = "1"
    record = evaluate(
        model,
        loaded.for_lm_eval(),
        samples=dict(loaded.samples),
        bootstrap_iters=BOOTSTRAP_DRAWS,
        system_instruction=config.system_instruction,
        apply_chat_template=config.apply_chat_template,
        fewshot_as_multiturn=config.apply_chat_template,
    )
    samples = record.pop("samples")
    dtype = str(crew.model.model.embed_tokens.weight.dtype).removeprefix("torch.")
    record["config"] = {"model": "kubetune", "model_args": name, "batch_size": config.batch_size}
    record["kubetune"] = settings_of(config, dtype=dtype, max_length=max_length)
    return Evaluation(record=record, samples=samples)
