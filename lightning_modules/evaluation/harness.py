"""Tasks of lm-evaluation-harness on a model that is loaded here."""

import logging
from collections.abc import Sequence
from pathlib import Path

from lightning_modules.model_folder import LoadedModel

Results = dict[str, dict[str, float]]


def run_tasks(loaded: LoadedModel, tasks: Sequence[str], include_path: Path | None, few_shot: int | None) -> Results:
    """By task its metrics, each with its standard error where there is one. Raises ValueError with what lm-eval says of
    a task that is not there or whose data cannot be had.

    Args:
        include_path: A folder with tasks as YAML, such as of files on this machine; these alone, then.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    backend = "seq2seq" if loaded.kind == "encoder-decoder" else "causal"
    if loaded.kind == "masked":
        raise ValueError(f"{loaded.folder} is a masked model, which lm-eval does not score; take another --task")
    manager = TaskManager(
        include_path=None if include_path is None else str(include_path), include_defaults=include_path is None
    )
    model = HFLM(
        pretrained=loaded.model,
        tokenizer=loaded.tokenizer,
        backend=backend,
        batch_size=8,
        device=str(loaded.model.device),
    )
    try:
        found = simple_evaluate(model=model, tasks=list(tasks), task_manager=manager, num_fewshot=few_shot)
    except Exception as error:  # a task's name, its YAML, its data set
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"lm-eval: {reason}") from None
    return {task: metrics_of(values) for task, values in found["results"].items()}


def metrics_of(values: dict[str, object]) -> dict[str, float]:
    """acc,none and acc_stderr,none become acc and acc_stderr."""
    numbers = {name: value for name, value in values.items() if isinstance(value, int | float) and "," in name}
    return {name.removesuffix(",none").replace(",", " "): float(value) for name, value in numbers.items()}


def lines(results: Results) -> list[str]:
    found = []
    for task, metrics in results.items():
        found.append(task)
        for name, value in metrics.items():
            if "_stderr" not in name:
                metric, blank, filtered = name.partition(" ")
                error = metrics.get(f"{metric}_stderr{blank}{filtered}")
                found.append(f"  {name:<22}{value:>10.4f}" + ("" if error is None else f"  ± {error:.4f}"))
    return found
