"""What a learner process and an actor process do from start to end, whoever starts them: Ray, or a person by hand.

Imports of torch, deepspeed and vllm happen inside, after the process has its environment.
"""

import logging
import os
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import protocol.errors
from actors.tasks import load_task
from deploy.connect import open_run
from deploy.rundir import RunDirectory
from protocol.errors import FencedError, TaskError, VespoError
from protocol.settings import Settings

NUM_PROBES = 4
PROBE_TOKENS = 48
PROBE_PROMPTS = 64

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a process ended, in a form that crosses process borders. `error` is a class name, empty if all went well."""

    error: str = ""
    message: str = ""
    details: str = ""

    @classmethod
    def of(cls, error: BaseException) -> "Outcome":
        """Describe an exception; an unexpected one keeps its traceback."""
        details = "" if isinstance(error, VespoError) else "".join(traceback.format_exception(error))
        return cls(type(error).__name__, str(error), details)

    @property
    def typed(self) -> type[VespoError] | None:
        """The `VespoError` class that was raised, None if nothing or something unexpected was."""
        found = getattr(protocol.errors, self.error, None)
        return found if isinstance(found, type) and issubclass(found, VespoError) else None


def prepare_process(settings: Settings) -> None:
    """Set what libraries read from the environment, and plain logging to standard error."""
    os.environ.update(process_environment(settings))
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr, force=True
    )
    for noisy in ("DeepSpeed", "httpx", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def process_environment(settings: Settings) -> dict[str, str]:
    """Environment of every process that computes: quiet, offline, no more threads than asked for."""
    environment = {
        "OMP_NUM_THREADS": str(settings.learner.cpu_threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    if settings.model.device == "cpu" or (settings.model.device == "auto" and not Path("/dev/nvidiactl").exists()):
        environment["DS_ACCELERATOR"] = "cpu"
    return environment


def run_learner_role(settings: Settings, directory: RunDirectory) -> None:
    """Build the toy model if the recipe asks for one, then train until the run is complete or drained.

    The run's state becomes "failed" when the learner gives up.

    Raises:
        VespoError: the learner gave up.
    """
    connected = open_run(settings)
    try:
        from learner.loop import run_learner
        from learner.ranks import meet

        _join_ranks(settings)
        model_dir = _model_directory(settings, directory)
        meet()
        run_learner(
            settings,
            run_dir=directory.path,
            model_dir=model_dir,
            buffer=connected.buffer,
            store=connected.store,
            probe_tokens=probe_tokens(settings, model_dir),
        )
    except FencedError:
        raise  # a newer learner owns the run's state
    except VespoError as error:
        connected.buffer.control.set_state("failed", f"{type(error).__name__}: {error}")
        raise


def learner_rank() -> int:
    """Number of this process among those of the learner, as a launcher such as torchrun sets it; 0 without one."""
    return int(os.environ.get("RANK", "0"))


def run_follower_role(settings: Settings, directory: RunDirectory) -> None:
    """Train along as a rank other than 0, which needs the run directory and the model but neither server nor store.

    Raises:
        RankError: another rank failed, or went away.
    """
    from learner.loop import follow_learner
    from learner.ranks import meet

    _join_ranks(settings)
    meet()  # rank 0 may have to build the model
    follow_learner(settings, model_dir=_model_directory(settings, directory))


def _join_ranks(settings: Settings) -> None:
    """Connect before anything can fail: the others notice that a process ended only if they are connected to it."""
    from learner.sharding import join_process_group

    join_process_group(settings.model.device, settings.learner.rank_timeout_seconds)


def run_actor_role(settings: Settings, name: str, directory: RunDirectory, stop: threading.Event | None = None) -> None:
    """Generate until the run ends or is drained, or `stop` is set.

    Raises:
        VespoError: the actor gave up.
    """
    from actors.actor import run_actor

    connected = open_run(settings)
    run_actor(
        settings,
        name=name,
        run_dir=directory.path,
        buffer=connected.buffer,
        store=connected.store,
        stop=stop or threading.Event(),
    )


def _model_directory(settings: Settings, directory: RunDirectory) -> Path:
    if settings.model.path is not None:
        return Path(settings.model.path)
    from deploy.toy.build import ensure_toy

    return ensure_toy(settings, directory.toy_model)


def probe_tokens(settings: Settings, model_dir: Path) -> list[list[int]]:
    """Token sequences on which actors prove that they compute what the learner computes: the task's own prompts.

    Short prompts are strung together; a sequence leaves room for the token that an engine must sample after it.

    Raises:
        TaskError: a prompt cannot be had.
    """
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir, trust_remote_code=settings.model.trust_remote_code)
    task = load_task(settings.task.name, settings.task.options)
    limit = min(PROBE_TOKENS, settings.task.max_prompt_tokens + settings.task.max_completion_tokens - 1)
    stream: list[int] = []
    for number in range(PROBE_PROMPTS):
        index = number * 37 % task.num_prompts  # a stride, so that neighbours do not look alike
        try:
            stream += _encode(tokenizer, task.prompt(index))
        except Exception as error:  # whatever a user's task raises
            raise TaskError(f"prompt {index}: {type(error).__name__}: {error}") from error
        if len(stream) >= NUM_PROBES * limit:
            break
    length = min(limit, len(stream) // NUM_PROBES)
    if length < 2:
        raise TaskError(f"the task's first {PROBE_PROMPTS} prompts have only {len(stream)} tokens together")
    return [stream[start : start + length] for start in range(0, NUM_PROBES * length, length)]


def _encode(tokenizer: Any, prompt: str | list[dict[str, str]]) -> list[int]:
    if isinstance(prompt, str):
        return list(tokenizer.encode(prompt))
    return list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"])
