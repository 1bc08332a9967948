"""How the policy is spread over processes: the process group, and the DeepSpeed engine that does the sharding."""

import logging
import os
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from protocol.settings import LearnerSettings

ADAM_EPSILON = 1e-8


def join_process_group(device: str, timeout_seconds: float) -> torch.device:
    """Choose the device and join the process group, alone unless a launcher's environment says otherwise.

    Args:
        device: "auto", "cpu" or "cuda".
        timeout_seconds: after which a collective that not all ranks have entered fails.

    Raises:
        ValueError: CUDA was asked for and is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError('model.device = "cuda", but torch sees no CUDA device; set it to "cpu" or "auto"')
    kind = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
    os.environ.setdefault("DS_ACCELERATOR", kind)
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    if kind == "cuda":
        torch.cuda.set_device(local_rank)
    if not torch.distributed.is_initialized():
        backend = "nccl" if kind == "cuda" else "gloo"
        if "WORLD_SIZE" in os.environ:
            torch.distributed.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
        else:
            store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # in memory: no port is needed
            torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    return torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")


def wraps_optimizer(learner: LearnerSettings) -> bool:
    """Whether DeepSpeed has an optimizer of its own, which clips, skips and reports the norm; not at stage 0."""
    return learner.zero_stage > 0


def initialize(policy: nn.Module, learner: LearnerSettings, device: torch.device) -> Any:
    """A DeepSpeed engine in training mode with AdamW; the caller decides where a step ends."""
    # Imported here: the accelerator is chosen from the environment when deepspeed is first imported.
    import deepspeed

    if device.type == "cpu":
        # The shared-memory collective is compiled on first use: a minute, and a compiler. gloo needs neither.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    optimizer = torch.optim.AdamW(
        policy.parameters(),
        lr=learner.learning_rate,
        betas=learner.adam_betas,
        eps=ADAM_EPSILON,
        weight_decay=learner.weight_decay,
    )
    buffers = {name: buffer.clone() for name, buffer in policy.named_buffers()}
    engine, *_ = deepspeed.initialize(
        model=policy, optimizer=optimizer, config=_config(learner), dist_init_required=False
    )
    # DeepSpeed casts buffers along with the weights; with rotary frequencies in bfloat16 it would be another model.
    for name, buffer in policy.named_buffers():
        buffer.data = buffers[name].to(buffer.device)
    engine.train()
    return engine


def _config(learner: LearnerSettings) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": learner.max_grad_norm if wraps_optimizer(learner) else 0.0,
        "zero_optimization": {"stage": learner.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": learner.precision == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": None,
    }
