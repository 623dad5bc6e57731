"""Tasks of EleutherAI's lm-eval, by the library itself (https://github.com/EleutherAI/lm-evaluation-harness)."""

import difflib
from typing import Any

from dstrain.errors import UserError
from dstrain.generate.model import LoadedModel


def run_tasks(
    loaded: LoadedModel, names: list[str], *, batch_size: int, limit: int | None, include_path: str | None
) -> dict[str, Any]:
    """Task -> its figures, as lm-eval names them. include_path: a folder with tasks of one's own. Raises UserError."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    tasks = TaskManager(include_path=include_path)
    for name in names:
        if name not in tasks.all_tasks:
            close = difflib.get_close_matches(name, tasks.all_tasks, n=1)
            raise UserError(
                f"lm-eval has no task {name}: " + (f"did you mean {close[0]}?" if close else "see its list")
            )
    model = HFLM(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=batch_size)
    try:
        found = lm_eval.simple_evaluate(model=model, tasks=names, limit=limit, task_manager=tasks)
    except OSError as error:  # its data sets come from the hub
        raise UserError(
            f"the data of {', '.join(names)} cannot be loaded: {' '.join(str(error).split())[:300]}"
        ) from None
    assert found is not None, "None is for ranks other than the first"
    return found["results"]
