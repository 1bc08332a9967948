"""The model under training as transformers loads it, with the attention that the recipe and the model allow."""

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from learner.packing import UnpackableError, enable_packing
from protocol.settings import Settings

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(settings: Settings, model_dir: Path) -> tuple[Any, bool]:
    """The causal language model of `model_dir` on the CPU, and whether its rows may hold several sequences."""
    transformers_logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(
        model_dir,
        dtype=DTYPES[settings.learner.precision],
        attn_implementation="sdpa",
        trust_remote_code=settings.model.trust_remote_code,
        local_files_only=True,
    )
    packs = settings.learner.packing and _try_packing(model)
    if settings.learner.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model, packs


def _try_packing(model: Any) -> bool:
    try:
        enable_packing(model)
    except UnpackableError as reason:
        log.warning("%s is trained on padded rows instead of packed ones: %s", type(model).__name__, reason)
        return False
    return True


def attention_cost(config: Any) -> float:
    """What attending costs per token and token of the sequence, in passages of a token through the rest of the model.

    A layer without attention has about 12 · hidden² weights, each used twice; causal attention multiplies 2 · hidden
    numbers with half of the sequence, twice.
    """
    return 1 / (12 * int(config.get_text_config().hidden_size))
