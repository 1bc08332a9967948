"""A Qwen3, dense or mixture of experts, of a few hundred thousand parameters with one character a token.

Sizes follow what vLLM's CPU kernels accept: attention heads of one of its sizes, experts a multiple of 32 wide.
"""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.qwen3 import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3_moe import Qwen3MoeConfig, Qwen3MoeForCausalLM

from protocol.settings import ToySettings

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
CHARACTERS = "0123456789+-*/=?()<>., :"
HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256)
EXPERT_WIDTH_STEP = 32
ACTIVE_EXPERTS = 2


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer with a token for each of `CHARACTERS`; anything else becomes `<unk>`."""
    vocabulary = {token: number for number, token in enumerate([PAD, EOS, UNKNOWN, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def make_model(toy: ToySettings, tokenizer: PreTrainedTokenizerFast, max_positions: int) -> PreTrainedModel:
    """Randomly initialised float32 model; the caller seeds torch.

    Args:
        toy: shape of the model.
        tokenizer: its vocabulary and special tokens.
        max_positions: longest prompt and completion together, in tokens.
    """
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": toy.hidden_size,
        "num_hidden_layers": toy.num_layers,
        "num_attention_heads": toy.num_heads,
        "num_key_value_heads": toy.num_heads // 2,
        "head_dim": _head_size(toy.hidden_size // toy.num_heads),
        "max_position_embeddings": max_positions,
        "tie_word_embeddings": toy.tie_embeddings,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "initializer_range": toy.hidden_size**-0.5,  # the customary 0.02 suits wide models; this learns 4 times as fast
        "dtype": "float32",
    }
    if toy.num_experts == 0:
        width = _round_up(8 * toy.hidden_size // 3, EXPERT_WIDTH_STEP)
        return Qwen3ForCausalLM(Qwen3Config(**common, intermediate_size=width))
    width = _round_up(8 * toy.hidden_size // (3 * ACTIVE_EXPERTS), EXPERT_WIDTH_STEP)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **common,
            intermediate_size=width,
            moe_intermediate_size=width,
            num_experts=toy.num_experts,
            num_experts_per_tok=min(ACTIVE_EXPERTS, toy.num_experts),
            norm_topk_prob=True,
        )
    )


def _head_size(least: int) -> int:
    return next((size for size in HEAD_SIZES if size >= least), least)


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step
