"""The toy model: what it can say, how good it starts, that it is the same every time, and that it is built once."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors.tasks.arithmetic import Arithmetic
from deploy.toy.build import MARKER, ensure_toy
from deploy.toy.model import CHARACTERS, EXPERT_WIDTH_STEP, HEAD_SIZES, make_model, make_tokenizer
from protocol.errors import SettingsError
from protocol.settings import ModelSettings, RunSettings, Settings, TaskSettings, ToySettings

SMALL = {"hidden_size": 32, "num_layers": 1, "num_heads": 2}


def settings(seed: int = 0, task: str = "arithmetic", **toy: object) -> Settings:
    return Settings(
        run=RunSettings(seed=seed),
        model=ModelSettings(toy=ToySettings(**toy), dtype="float32"),
        task=TaskSettings(name=task, max_prompt_tokens=16, max_completion_tokens=6),
    )


def test_the_tokenizer_survives_saving_and_has_a_token_a_character(tmp_path: Path) -> None:
    make_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokens = tokenizer.encode(CHARACTERS)
    assert len(set(tokens)) == len(CHARACTERS)
    assert tokenizer.decode(tokens) == CHARACTERS
    assert tokenizer.decode([*tokenizer.encode("12"), tokenizer.eos_token_id], skip_special_tokens=True) == "12"
    assert tokenizer.encode("ä\n") == [tokenizer.unk_token_id] * 2
    assert None not in (tokenizer.eos_token_id, tokenizer.pad_token_id)


@pytest.mark.parametrize("num_experts", [0, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_every_architecture_survives_saving(tmp_path: Path, num_experts: int, tied: bool) -> None:
    toy = ToySettings(num_experts=num_experts, tie_embeddings=tied, **SMALL)
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = make_model(toy, tokenizer, max_positions=64).eval()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    tokens = torch.tensor([tokenizer.encode("3+4=7")])
    torch.testing.assert_close(model(tokens).logits, loaded(tokens).logits)
    assert model.config.head_dim in HEAD_SIZES
    assert model.config.eos_token_id == tokenizer.eos_token_id
    if num_experts:
        assert model.config.moe_intermediate_size % EXPERT_WIDTH_STEP == 0


def test_the_warm_start_leaves_something_to_learn(tmp_path: Path) -> None:
    directory = ensure_toy(settings(warm_start_accuracy=0.3), tmp_path / "toy")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    task = Arithmetic()
    generator = torch.Generator().manual_seed(1)
    rewards = []
    for index in range(task.num_prompts):
        tokens = torch.tensor([tokenizer.encode(task.prompt(index))]).repeat(8, 1)
        start = tokens.shape[1]
        with torch.no_grad():
            for _ in range(4):
                probabilities = model(tokens).logits[:, -1].softmax(-1)
                tokens = torch.cat([tokens, torch.multinomial(probabilities, 1, generator=generator)], 1)
        for row in tokens[:, start:].tolist():
            end = row.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in row else len(row)
            rewards.append(task.score(index, tokenizer.decode(row[:end])))
    assert 0.25 <= sum(rewards) / len(rewards) <= 0.5


def test_the_same_settings_give_the_same_model_and_leave_the_random_state_alone(tmp_path: Path) -> None:
    fast = {"warm_start_accuracy": 0.02, **SMALL}
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first = ensure_toy(settings(**fast), tmp_path / "a")
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(8)
    second = ensure_toy(settings(**fast), tmp_path / "b")
    other = ensure_toy(settings(seed=1, **fast), tmp_path / "c")
    weights = [(directory / "model.safetensors").read_bytes() for directory in (first, second, other)]
    assert weights[0] == weights[1] != weights[2]


def test_a_finished_model_is_kept_and_another_recipe_rebuilds_it(tmp_path: Path) -> None:
    cold = {"warm_start_accuracy": 0, **SMALL}
    directory = ensure_toy(settings(**cold), tmp_path / "toy")
    built = (directory / MARKER).stat().st_mtime_ns
    ensure_toy(settings(**cold), directory)
    assert (directory / MARKER).stat().st_mtime_ns == built
    ensure_toy(settings(seed=3, **cold), directory)
    assert json.loads((directory / MARKER).read_text())["recipe"]["seed"] == 3


def test_a_torn_model_is_rebuilt(tmp_path: Path) -> None:
    cold = {"warm_start_accuracy": 0, **SMALL}
    directory = ensure_toy(settings(**cold), tmp_path / "toy")
    (directory / MARKER).unlink()
    (directory / "model.safetensors").write_bytes(b"torn")
    ensure_toy(settings(**cold), directory)
    AutoModelForCausalLM.from_pretrained(directory)


class Unanswerable:
    """A task that can score but does not tell."""

    num_prompts = 3

    def prompt(self, index: int) -> str:
        return "1"

    def score(self, index: int, completion: str) -> float:
        return 0.0


def test_a_task_without_answers_cannot_warm_start(tmp_path: Path) -> None:
    name = f"{__name__}:Unanswerable"
    with pytest.raises(SettingsError, match="no answer"):
        ensure_toy(settings(task=name, **SMALL), tmp_path / "toy")
    assert not (tmp_path / "toy").exists()
    ensure_toy(settings(task=name, warm_start_accuracy=0, **SMALL), tmp_path / "toy")
