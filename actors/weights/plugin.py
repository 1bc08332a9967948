"""vLLM weight-transfer engine that loads a staged policy version into the model, in place and completely.

vLLM loads it through its plugin entry point in whichever process its worker lives. Two repairs are needed on CPU, where
vLLM repacks weights for its kernels: a mixture-of-experts layer keeps its old kernel and then skips repacking, and a
tied output head keeps a handle on the old embedding. Both would go on serving stale weights without a word; the parity
probe is what proves that they do not.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, UnquantizedEmbeddingMethod
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from buffer.store import RawTensor

BACKEND = "vespo"

_TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def register() -> None:
    """Entry point `vllm.general_plugins`; vLLM may call it more than once in a process."""
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, StagedWeightEngine)


def as_torch(tensor: RawTensor) -> torch.Tensor:
    """A torch tensor on CPU with a copy of the raw tensor's bytes."""
    flat = torch.from_numpy(np.frombuffer(tensor.data, np.uint8).copy())
    return flat.view(_TORCH_DTYPES[tensor.dtype]).reshape(tensor.shape)


@dataclass
class StagedInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand: no connection exists between learner and actor."""


@dataclass
class StagedUpdateInfo(WeightTransferUpdateInfo):
    """All tensors of one version, checksums already verified, named as in the checkpoint."""

    tensors: Sequence[RawTensor] = field(default_factory=list)


class StagedWeightEngine(WeightTransferEngine[StagedInitInfo, StagedUpdateInfo]):
    """Loads whole versions through vLLM's layerwise reload."""

    init_info_cls = StagedInitInfo
    update_info_cls = StagedUpdateInfo

    def init_transfer_engine(self, init_info: StagedInitInfo) -> None:
        """No rendezvous: versions come through the weight store."""

    def start_weight_update(self) -> None:
        """Restore the layers to the layout that checkpoints load into."""
        self._kernels: dict[UnquantizedFusedMoEMethod, Any] = {}
        if self.device.type == "cpu":
            for module in self.model.modules():
                method = getattr(module, "quant_method", None)
                if isinstance(method, UnquantizedFusedMoEMethod):
                    self._kernels[method] = method.moe_kernel
                    method.moe_kernel = None
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: StagedUpdateInfo) -> None:
        """Load the tensors of a version; a fused layer must come whole, which whole versions guarantee."""
        self.model.load_weights((t.name, as_torch(t).to(self.device)) for t in update_info.tensors)

    def finish_weight_update(self) -> None:
        """Repack for the kernels, including the two layers that vLLM leaves stale."""
        finalize_layerwise_reload(self.model, self.model_config)
        for method, kernel in self._kernels.items():
            if method.moe_kernel is None:
                method.moe_kernel = kernel
        self._kernels = {}
        if self.device.type == "cpu":
            for module in self.model.modules():
                method = getattr(module, "quant_method", None)
                if isinstance(module, ParallelLMHead) and isinstance(method, UnquantizedEmbeddingMethod):
                    method.process_weights_after_loading(module)

    def shutdown(self) -> None:
        """Nothing is held between updates."""
