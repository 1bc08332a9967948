"""Training a low-rank adapter of each linear layer instead of the model: LoRA (arXiv 2106.09685).

An adapted layer computes `x W' + scale · (x A') B'` with W frozen; A starts random and B at zero, so that training
starts from the model itself. In evaluation it computes with the merged weight instead, rounded as it is published: what
a probe measures is what actors serve. Left out: dropout, adapters of embeddings, of the output head, and of experts
whose weights are fused into one tensor; and ZeRO-3, which would spread frozen weights over ranks.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from buffer.adapter import SUFFIX_A, SUFFIX_B
from protocol.errors import SettingsError
from protocol.settings import LoraSettings


class LoraLinear(nn.Linear):
    """A linear layer, frozen, with an adapter `lora_A` `[rank, in]`, `lora_B` `[out, rank]` of the weight's dtype."""

    def __init__(self, frozen: nn.Linear, rank: int, scale: float) -> None:
        nn.Module.__init__(self)  # the frozen layer's own tensors are taken over, none are made
        self.in_features, self.out_features = frozen.in_features, frozen.out_features
        self.weight, self.bias = frozen.weight, frozen.bias
        self.scale = scale
        self.lora_A = nn.Parameter(self.weight.new_empty((rank, self.in_features)))
        self.lora_B = nn.Parameter(self.weight.new_zeros((self.out_features, rank)))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        if not self.training:
            a, b = self.published()
            merged = torch.addmm(self.weight.float(), b, a).to(self.weight.dtype)
            return functional.linear(input, merged, self.bias)
        low = functional.linear(functional.linear(input, self.lora_A), self.lora_B)
        return functional.linear(input, self.weight, self.bias) + self.scale * low

    def published(self) -> tuple[Tensor, Tensor]:
        """Copies of the adapter in float32, with the scale in the second."""
        return self.lora_A.detach().float(), self.scale * self.lora_B.detach().float()


def add_adapters(model: Any, lora: LoraSettings) -> None:
    """Freeze the model and put an adapter on each linear layer that the recipe names.

    Raises:
        SettingsError: there is no such layer, or what is named cannot be adapted.
    """
    head = model.get_output_embeddings()
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    chosen = {name: module for name, module in linear.items() if module is not head}
    if lora.target_modules is None:
        fused = [name for name, parameter in model.named_parameters() if parameter.dim() > 2]
        if fused:
            raise SettingsError(
                f"model.lora: {type(model).__name__} holds experts fused into one tensor ({fused[0]}), which cannot be "
                f"adapted; name the layers to adapt in model.lora.target_modules, of {_last_names(chosen)}"
            )
    else:
        for target in lora.target_modules:
            if target not in _last_names(chosen):
                raise SettingsError(
                    f"model.lora.target_modules: {type(model).__name__} has no linear layer {target!r} that can be "
                    f"adapted; it has {_last_names(chosen)}"
                )
        chosen = {name: module for name, module in chosen.items() if _last(name) in lora.target_modules}
    model.requires_grad_(False)
    for name, module in chosen.items():
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, _last(name), LoraLinear(module, lora.rank, lora.alpha / lora.rank))


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _last_names(layers: dict[str, nn.Linear]) -> list[str]:
    return sorted({_last(name) for name in layers})


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter."""
    return name.endswith((SUFFIX_A, SUFFIX_B))


def adapter_tensors(model: Any) -> dict[str, Tensor]:
    """Copies of all adapters on the CPU, as `buffer.adapter` describes them."""
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            a, b = module.published()
            tensors[name + SUFFIX_A], tensors[name + SUFFIX_B] = a.to("cpu", copy=True), b.to("cpu", copy=True)
    return tensors
