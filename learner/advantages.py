"""Group-relative advantages: a completion's reward minus the mean of its group.

The VESPO paper's text stops there; the authors' scripts also divide by the group's standard deviation.
"""

from collections.abc import Hashable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

EPSILON = 1e-6  # added to the standard deviation, as verl does


def group_advantages(
    rewards: Tensor | Sequence[float] | NDArray[np.floating],
    group_ids: Tensor | Iterable[Hashable],
    normalise_std: bool,
) -> Tensor:
    """Advantages `[N]` of rewards `[N]`, compared within each group, in the dtype and on the device of `rewards`.

    A group of one keeps its raw reward (mean 0, standard deviation 1), as in the reference; a group of equal rewards
    gives exactly zero. Sums run in float64. Plain numbers give a float64 result, integer tensors a float32 one.

    Args:
        rewards: `[N]` numbers.
        group_ids: `[N]` integers or names; equal ids belong together, in any order.
        normalise_std: divide by the group's sample standard deviation (ddof 1) plus 1e-6.

    Raises:
        ValueError: the lengths differ, rewards or ids are not one-dimensional, or a reward is not finite: a failure is
            no reward, and would spoil its whole group.
    """
    source = rewards if isinstance(rewards, Tensor) else torch.as_tensor(np.asarray(rewards, dtype=np.float64))
    ids = list(group_ids.tolist() if isinstance(group_ids, Tensor | np.ndarray) else group_ids)
    if source.dim() != 1 or len(ids) != len(source):
        raise ValueError(f"rewards {tuple(source.shape)} and {len(ids)} group_ids must both be [N]")
    values = source.detach().double().cpu().numpy()
    if len(wrong := np.flatnonzero(~np.isfinite(values))):
        raise ValueError(f"reward {wrong[0]} of {len(values)}, in group {ids[wrong[0]]!r}, is {values[wrong[0]]}")
    members: dict[Hashable, list[int]] = {}
    for position, group in enumerate(ids):
        if not isinstance(group, Hashable):
            raise ValueError(f"group_ids must be [N] integers or names, but number {position} is {group!r}")
        members.setdefault(group, []).append(position)
    advantages = np.empty_like(values)
    for positions in members.values():
        advantages[positions] = _centre(values[positions], normalise_std)
    dtype = source.dtype if source.is_floating_point() else torch.float32
    return torch.from_numpy(advantages).to(source.device, dtype)


def _centre(rewards: NDArray[np.float64], normalise_std: bool) -> NDArray[np.float64]:
    if len(rewards) == 1:
        centred, std = rewards, 1.0
    elif (rewards == rewards[0]).all():
        return np.zeros_like(rewards)  # rounding of the mean must not give a constant group a spread
    else:
        centred, std = rewards - rewards.mean(), float(rewards.std(ddof=1))
    scale = std + EPSILON if normalise_std else 1.0
    return np.divide(centred, scale)
