"""DeepSpeed's configuration and optimizer, from the recipe."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from protocol.deepspeed_keys import deepspeed_table
from protocol.settings import LearnerSettings


def deepspeed_config(learner: LearnerSettings) -> dict[str, Any]:
    """What `deepspeed.initialize` takes, `learner.deepspeed` merged over the rest.

    Raises:
        SettingsError: `learner.deepspeed` cannot be read, or sets what is not its own to set.
    """
    on_cpu = {"device": "cpu", "pin_memory": True}
    zero: dict[str, Any] = {"stage": learner.zero_stage}
    if learner.offload != "none":
        zero["offload_optimizer"] = on_cpu
    if learner.offload == "parameters":
        zero["offload_param"] = on_cpu
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": learner.max_grad_norm if wraps_optimizer(learner) else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": learner.precision == "bfloat16"},
        # Every overflow lowers the scale: a step that is skipped is data thrown away.
        "fp16": {"enabled": learner.precision == "float16", "hysteresis": 1},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": None,
    }
    return merged(config, deepspeed_table(learner.deepspeed))


def wraps_optimizer(learner: LearnerSettings) -> bool:
    """Whether DeepSpeed has an optimizer of its own, which clips, skips and reports the norm; not at stage 0."""
    return learner.zero_stage > 0


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both tables, nested ones merged too; where they differ, `above` counts."""
    result = dict(below)
    for key, value in above.items():
        inner = result.get(key)
        result[key] = merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
    return result


def adamw(parameters: Iterable[torch.nn.Parameter], learner: LearnerSettings) -> torch.optim.Optimizer:
    """AdamW over all parameters; with its state on the CPU, the one that DeepSpeed wrote for CPUs."""
    options: dict[str, Any] = {
        "lr": learner.learning_rate,
        "betas": learner.adam_betas,
        "eps": learner.adam_epsilon,
        "weight_decay": learner.weight_decay,
    }
    if learner.offload == "none":
        return torch.optim.AdamW(parameters, **options)
    from deepspeed.ops.adam import DeepSpeedCPUAdam  # once the accelerator is chosen

    optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(parameters, adamw_mode=True, **options)
    return optimizer
