"""KL to a reference and entropy bonus: the gradient of the whole step's loss, against float64 over whole logits."""

import numpy as np
import pytest
import torch
from learner_reference import Spy
from learner_samples import SHAPE, make_groups, make_settings, write_model
from terms_reference import TEMPERATURE, check_terms, whole_step
from transformers import AutoModelForCausalLM, Gemma2Config, Qwen3Config

from learner.engine import Engine
from protocol.errors import SettingsError


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "m", tied=True)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("reference") / "m", seed=1)


def some_groups():
    """Groups with an advantage, and one without, which only the terms move."""
    return make_groups(4, holes=True) + make_groups(1, rewards=[1.0] * 4, seed=9)


def make_engine(directory, kind=Engine, *, kl=0.0, entropy=0.0, reference=None, aggregation=None, **learner):
    return kind(
        make_settings(
            directory,
            objective={"kl_coefficient": kl, "entropy_coefficient": entropy, "aggregation": aggregation},
            model={"reference": None if reference is None else str(reference)},
            task={"temperature": TEMPERATURE},
            learner=learner,
        ),
        directory,
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("kl", "entropy"), [(0.3, 0.0), (0.0, 0.2), (0.3, 0.2)])
@pytest.mark.parametrize("packing", [True, False])
def test_gradient_is_that_of_the_whole_step_however_it_is_cut(directory, reference, stage, kl, entropy, packing):
    groups = some_groups()
    expected = None
    for budget in (20, 60, 10**6):
        engine = make_engine(
            directory,
            Spy,
            kl=kl,
            entropy=entropy,
            reference=reference if kl else None,
            zero_stage=stage,
            micro_batch_tokens=budget,
            packing=packing,
        )
        batch = engine.lay_out(groups)
        assert batch.quiet
        if expected is None:
            expected = whole_step(directory, reference, groups, batch.advantages, kl, entropy)
        check_terms(engine, batch, expected, kl)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_terms_in_bfloat16(directory, reference, stage):
    engine = make_engine(
        directory, Spy, kl=0.3, entropy=0.2, reference=reference, zero_stage=stage, precision="bfloat16"
    )
    groups = some_groups()
    batch = engine.lay_out(groups)
    loss, gradients, entropies, k3 = whole_step(directory, reference, groups, batch.advantages, 0.3, 0.2)
    update = engine.update(batch)
    assert update.loss == pytest.approx(float(loss.detach()), rel=0.05)
    assert update.entropy.sum() == pytest.approx(entropies.sum(), rel=0.02)
    assert update.reference_kl.sum() == pytest.approx(k3.sum(), rel=0.05)
    mine = torch.cat([engine.gradients[name].flatten().double() for name in gradients])
    right = torch.cat([gradient.flatten() for gradient in gradients.values()])
    assert torch.nn.functional.cosine_similarity(mine, right, dim=0) > 0.99


def test_terms_are_token_means_whatever_the_objective_divides_by(directory, reference):
    aggregation = "sequence-mean-token-mean"
    engine = make_engine(
        directory, Spy, kl=0.3, entropy=0.2, reference=reference, aggregation=aggregation, micro_batch_tokens=60
    )
    groups = some_groups()
    batch = engine.lay_out(groups)
    check_terms(
        engine, batch, whole_step(directory, reference, groups, batch.advantages, 0.3, 0.2, aggregation), kl=0.3
    )


def test_without_terms_sequences_without_advantage_have_no_backward_pass(directory):
    engine = make_engine(directory)
    batch = engine.lay_out(some_groups())
    assert engine._terms.backward_on(batch) == (batch.micro_batches, batch.quiet)
    assert not engine.update(batch).reference_kl.any()


def test_the_reference_is_the_initial_model_also_after_a_resume(directory, tmp_path):
    settings = {"kl": 0.1, "learning_rate": 1e-3}
    groups = some_groups()
    engine = make_engine(directory, **settings)
    distances = [engine.update(engine.lay_out(groups)).reference_kl.sum() for _ in range(3)]
    assert distances[0] == pytest.approx(0, abs=1e-6)
    assert min(distances[1:]) > 0.01
    save(engine, tmp_path)
    after = engine.update(engine.lay_out(groups)).reference_kl

    resumed = make_engine(directory, **settings)
    resumed.load(tmp_path)
    assert np.array_equal(resumed.update(resumed.lay_out(groups)).reference_kl, after)


def save(engine, directory):
    engine.capture(directory)()


def test_kl_keeps_the_policy_near_the_reference(directory):
    distances = []
    for coefficient in (1e-6, 1.0):
        engine = make_engine(directory, kl=coefficient, learning_rate=2e-3)
        for _ in range(8):
            update = engine.update(engine.lay_out(some_groups()))
        distances.append(update.reference_kl.sum())
    assert distances[1] < 0.3 * distances[0]


def test_the_bonus_raises_entropy_where_rewards_say_nothing(directory):
    engine = make_engine(directory, entropy=0.1, learning_rate=1e-3)
    batch = engine.lay_out(make_groups(2, rewards=[1.0] * 4))
    entropies = [engine.update(batch).entropy.sum() for _ in range(4)]
    assert entropies == sorted(entropies)
    assert entropies[-1] > 1.01 * entropies[0]


def test_silenced_sequences_are_in_no_term(directory, reference):
    engine = make_engine(directory, kl=0.3, entropy=0.2, reference=reference)
    micro = engine.lay_out(some_groups()).micro_batches[0]
    with torch.no_grad():
        logprobs, entropies = engine._logprobs(micro)
        silenced = torch.zeros(len(logprobs), dtype=torch.bool)
        silenced[0] = True
        broken = logprobs.clone()
        broken[0] = torch.nan
        entropies = entropies.clone()
        entropies[: int(micro.mask[0].sum())] = torch.nan
        loss, sums = engine._terms.part(broken, entropies, micro, silenced, 7)
    assert micro.mask[0].any()
    assert loss.isfinite()
    assert sums[0] == 0
    assert (sums[1:][micro.mask[1:].any(1)] > 0).all()


def test_a_reference_of_another_vocabulary_is_refused(directory, tmp_path):
    other = tmp_path / "m"
    AutoModelForCausalLM.from_config(Qwen3Config(**SHAPE | {"vocab_size": 29})).save_pretrained(other)
    with pytest.raises(SettingsError, match=r"vocabulary of 29, the model one of 23"):
        make_engine(directory, kl=0.1, reference=other)


def test_a_reference_that_cannot_be_packed_is_refused(directory, tmp_path):
    config = Gemma2Config(**SHAPE, attn_logit_softcapping=10.0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    with pytest.raises(SettingsError, match=r"set learner\.packing = false"):
        make_engine(directory, kl=0.1, reference=tmp_path / "m")
    assert make_engine(directory, kl=0.1, reference=tmp_path / "m", packing=False).update
