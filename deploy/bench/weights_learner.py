"""The learner of the weights bench: a small Qwen3 whose updates are like those of a real run, without its actors."""

from dataclasses import dataclass
from pathlib import Path

from buffer.payloads import RawTensor

LEARNING_RATE = 1e-6
NUM_SEQUENCES, LENGTH = 8, 64


@dataclass(frozen=True, slots=True)
class Size:
    """Shape of the model; heads are 64 wide."""

    vocabulary: int
    width: int
    layers: int


class Trajectory:
    """Float32 master weights under AdamW, and what is published of them in bfloat16."""

    def __init__(self, size: Size, skeleton: Path) -> None:
        """Build the model, and write its configuration and a tokenizer to `skeleton`."""
        import torch
        from tokenizers import Tokenizer, models
        from transformers import PreTrainedTokenizerFast
        from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM

        torch.manual_seed(0)
        heads = max(2, size.width // 64)
        config = Qwen3Config(
            vocab_size=size.vocabulary,
            hidden_size=size.width,
            intermediate_size=3 * size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 2,
            head_dim=64,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
            dtype="float32",
        )
        self._model = Qwen3ForCausalLM(config)
        config.architectures = [type(self._model).__name__]
        config.save_pretrained(skeleton)
        words = Tokenizer(models.WordLevel({str(i): i for i in range(size.vocabulary)}, unk_token="0"))
        PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(skeleton)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)

    def update(self) -> None:
        """One step of policy gradient on sampled tokens, with advantages of both signs."""
        import torch

        tokens = torch.randint(1, self._model.config.vocab_size, (NUM_SEQUENCES, LENGTH))
        logprobs = self._model(input_ids=tokens).logits[:, :-1].log_softmax(-1)
        taken = logprobs.gather(-1, tokens[:, 1:, None]).squeeze(-1)
        advantages = torch.randn(NUM_SEQUENCES, 1)
        self._optimizer.zero_grad()
        (-(advantages * taken).mean()).backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()

    def tensors(self) -> list[RawTensor]:
        """A bfloat16 copy of the weights."""
        import torch

        from learner.weights import checkpoint_tensors, raw_tensors

        return raw_tensors(checkpoint_tensors(self._model, torch.bfloat16, gather=False))
