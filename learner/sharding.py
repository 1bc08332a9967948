"""How the policy is spread over processes: the process group, and the DeepSpeed engine that does the sharding."""

import logging
import os
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from learner.deepspeed_config import adamw, deepspeed_config
from protocol.errors import SettingsError
from protocol.settings import LearnerSettings


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


def initialize(policy: nn.Module, learner: LearnerSettings, device: torch.device) -> Any:
    """A DeepSpeed engine in training mode with AdamW; the caller decides where a step ends.

    Raises:
        SettingsError: the device does not have what the recipe asks for, or `learner.deepspeed` cannot be used.
    """
    # Imported here: the accelerator is chosen from the environment when deepspeed is first imported.
    import deepspeed

    _check_device(learner, device)
    if kinds := separate_experts(policy):
        if learner.zero_stage == 2 and torch.distributed.get_world_size() > 1:
            raise SettingsError(
                f"learner.zero_stage = 2 reduces gradients in the order they come in, which {kinds[0].__name__} makes "
                "another on every rank, for its experts are modules of their own; take zero_stage = 1 or 3"
            )
        if learner.zero_stage == 3:
            deepspeed.utils.set_z3_leaf_modules(policy, kinds)
    if device.type == "cpu":
        # The shared-memory collective is compiled on first use: a minute, and a compiler. gloo needs neither.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    buffers = {name: buffer.clone() for name, buffer in policy.named_buffers()}
    engine, *_ = deepspeed.initialize(
        model=policy,
        optimizer=adamw([p for p in policy.parameters() if p.requires_grad], learner),
        config=deepspeed_config(learner),
        dist_init_required=False,
    )
    if learner.precision == "float16":
        # At the smallest scale DeepSpeed would end the process; how many steps may be skipped is decided elsewhere.
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False
    # DeepSpeed casts buffers along with the weights; with rotary frequencies in bfloat16 it would be another model.
    for name, buffer in policy.named_buffers():
        buffer.data = buffers[name].to(buffer.device)
    engine.train()
    return engine


def separate_experts(policy: nn.Module) -> list[type[nn.Module]]:
    """Kinds of modules whose experts are modules of their own, of which a forward pass may leave out some.

    Ranks that leave out different ones would wait for each other's parameters for ever, so ZeRO-3 must fetch all of
    such a module at once. Models in transformers hold the weights of all experts in one tensor.
    """
    return list(
        {type(module) for module in policy.modules() if isinstance(getattr(module, "experts", None), nn.ModuleList)}
    )


def _check_device(learner: LearnerSettings, device: torch.device) -> None:
    from deepspeed.accelerator import get_accelerator

    if learner.offload != "none" and device.type == "cpu":
        raise SettingsError(
            f'learner.offload = "{learner.offload}" moves what a GPU holds to the CPU, but the learner computes on the '
            'CPU; set it to "none"'
        )
    if learner.precision == "float16" and not get_accelerator().is_fp16_supported():
        raise SettingsError('learner.precision = "float16" is not supported by this device; take "bfloat16"')
