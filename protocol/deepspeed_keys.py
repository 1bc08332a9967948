"""What may stand in `learner.deepspeed`: anything DeepSpeed knows, but for what the recipe or the learner decides.

The table is handed on unread: its keys change with DeepSpeed's versions, and DeepSpeed checks them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from protocol.errors import SettingsError

ITS_OWN = "the learner, whose updates depend on it"
OWNED = {
    "train_batch_size": "learner.groups_per_step",
    "train_micro_batch_size_per_gpu": "learner.micro_batch_tokens",
    "gradient_accumulation_steps": "learner.micro_batch_tokens",
    "gradient_clipping": "learner.max_grad_norm",
    "optimizer": "learner.learning_rate, adam_betas, adam_epsilon and weight_decay",
    "scheduler": "learner.schedule and warmup_steps",
    "zero_optimization.stage": "learner.zero_stage",
    "bf16.enabled": "learner.precision",
    "fp16.enabled": "learner.precision",
    "data_types.grad_accum_dtype": ITS_OWN,
    "managed_gradient_accumulation": ITS_OWN,
    "zero_allow_untested_optimizer": ITS_OWN,
    "zero_force_ds_cpu_optimizer": ITS_OWN,
}
"""Keys of DeepSpeed's configuration that are refused, and what sets them instead."""


def check_deepspeed_table(table: Mapping[str, Any]) -> None:
    """Raise ValueError, naming the key, if the table sets what is not its own to set."""
    for key, owner in OWNED.items():
        value: Any = table
        for name in key.split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is not None:
            raise ValueError(f"DeepSpeed's {key} is set by {owner}; leave it out of learner.deepspeed")


def deepspeed_table(given: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """The table itself, or what the JSON file of that name holds.

    Raises:
        SettingsError: the file cannot be read, or sets what is not its own to set.
    """
    if not isinstance(given, str):
        return given
    try:
        table = json.loads(Path(given).read_text("utf-8"))
        if not isinstance(table, dict):
            raise ValueError("it holds no JSON object")
        check_deepspeed_table(table)
    except (OSError, ValueError) as error:
        raise SettingsError(f"learner.deepspeed = {given!r} cannot be used: {error}") from error
    return table
