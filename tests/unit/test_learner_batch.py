"""Micro-batches hold every token once, stay inside their budget and waste little."""

import numpy as np
import pytest
from learner_samples import make_groups

from learner.batch import build_step_batch


def _rows(batch):
    """(sequence, tokens, targets with their predicting tokens, behaviour log-probs) of every row, by sequence."""
    found = {}
    for micro in batch.micro_batches + batch.quiet:
        flat = micro.tokens.flatten()
        taken = 0
        for i, row in enumerate(micro.rows.tolist()):
            count = int(micro.mask[i].sum())
            part = slice(taken, taken + count)
            taken += count
            positions = micro.positions[part]
            assert (positions // micro.tokens.shape[1] == i).all()
            assert (flat[positions + 1] == micro.targets[part]).all()
            assert row not in found
            found[row] = (
                micro.tokens[i],
                positions % micro.tokens.shape[1],
                micro.behaviour_logprobs[i][micro.mask[i]],
            )
        assert taken == len(micro.positions)
    return found


@pytest.mark.parametrize("budget", [1, 24, 64, 100_000])
@pytest.mark.parametrize("holes", [False, True])
def test_every_token_is_laid_out_once(budget, holes):
    groups = make_groups(7, holes=holes)
    batch = build_step_batch(groups, micro_batch_tokens=budget, normalise_std=False)
    sequences = [(group, c) for group in groups for c in group.completions]
    rows = _rows(batch)
    assert sorted(rows) == list(range(len(sequences)))
    for number, (group, completion) in enumerate(sequences):
        tokens, positions, behaviour = rows[number]
        whole = np.concatenate([group.prompt_tokens, completion.tokens])
        assert (tokens[: len(whole)].numpy() == whole).all()
        assert not tokens[len(whole) :].any()
        sampled = np.flatnonzero(completion.mask)
        assert (positions.numpy() == len(group.prompt_tokens) - 1 + sampled).all()
        assert (behaviour.numpy() == completion.logprobs[sampled]).all()
        assert batch.rewards[number] == completion.reward
    assert batch.num_tokens == sum(int(c.mask.sum()) for _, c in sequences)
    for micro in batch.micro_batches + batch.quiet:
        assert micro.tokens.numel() <= budget or len(micro.tokens) == 1


def test_sorting_by_length_leaves_little_padding():
    groups = make_groups(32, size=8)
    batch = build_step_batch(groups, micro_batch_tokens=256, normalise_std=False)
    real = sum(len(g.prompt_tokens) + len(c.tokens) for g in groups for c in g.completions)
    padded = sum(m.tokens.numel() for m in batch.micro_batches + batch.quiet)
    assert batch.padding_share == pytest.approx(1 - real / padded)
    assert batch.padding_share < 0.12
    lengths = [m.tokens.shape[1] for m in batch.micro_batches]
    assert lengths == sorted(lengths, reverse=True)


def test_advantages_compare_within_groups_and_follow_their_rows():
    groups = make_groups(2, rewards=[1.0, 0.0, 0.0, 0.0]) + make_groups(1, rewards=[2.0, 2.0, 2.0, 2.0])
    batch = build_step_batch(groups, micro_batch_tokens=32, normalise_std=False)
    assert batch.advantages.tolist() == [0.75, -0.25, -0.25, -0.25] * 2 + [0.0] * 4
    for micro in batch.micro_batches:
        assert micro.advantages.tolist() == batch.advantages[micro.rows.numpy()].tolist()
        assert micro.advantages.all()
    assert sorted(row for micro in batch.quiet for row in micro.rows.tolist()) == [8, 9, 10, 11]
    normalised = build_step_batch(groups, micro_batch_tokens=32, normalise_std=True)
    assert normalised.advantages[0] == pytest.approx(1.5, abs=1e-5)


def test_the_layout_is_deterministic():
    first, second = (build_step_batch(make_groups(5), micro_batch_tokens=64, normalise_std=False) for _ in range(2))
    for a, b in zip(first.micro_batches, second.micro_batches, strict=True):
        tensors = [name for name in a.__slots__ if name != "packed"]
        assert all(bool((getattr(a, name) == getattr(b, name)).all()) for name in tensors)


@pytest.mark.parametrize("rewards", [[1.0, 0.0, 0.0, 0.0], [1.0] * 4])
def test_the_spare_micro_batch_counts_nothing(rewards):
    spare = build_step_batch(make_groups(2, rewards=rewards), micro_batch_tokens=64, normalise_std=False).spare
    assert spare.tokens.shape[0] == spare.mask.shape[0] == len(spare.advantages) == 1
    assert not spare.mask.any()
    assert len(spare.positions) == len(spare.targets) == len(spare.rows) == 0
