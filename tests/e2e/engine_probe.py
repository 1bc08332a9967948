"""Program of `test_vllm_updates.py`: versions of a model loaded in place into one vLLM, compared with transformers.

Prints one JSON object. It is a process of its own because an engine binds its process.
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from actors.engine.base import Finished, Scored
from actors.engine.vllm_engine import VllmEngine, prepare_environment
from actors.weights.plugin import as_torch
from buffer.store import RawTensor, WeightStore
from protocol.manifest import Manifest, Probe
from protocol.settings import Settings

DTYPES = {"float32": "F32", "bfloat16": "BF16"}
PROMPT = [3, 4, 5]


def build(tied: bool, experts: int, dtype: str) -> torch.nn.Module:
    shared = {
        "vocab_size": 40,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    if experts:
        # 40 is no multiple of 32 on purpose: vLLM pads such experts on CPU.
        config = Qwen3MoeConfig(num_experts=experts, num_experts_per_tok=2, moe_intermediate_size=40, **shared)
    else:
        config = Qwen3Config(**shared)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def perturb(model: torch.nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)


def published(
    model: torch.nn.Module, version: int, store: WeightStore, probe_tokens: torch.Tensor, dtype: str
) -> Manifest:
    from safetensors import safe_open

    with torch.no_grad():
        logprobs = model(probe_tokens).logits.float().log_softmax(-1)[:, :-1]
    values = logprobs.gather(-1, probe_tokens[:, 1:, None])[..., 0].tolist()
    probe = Probe(tokens=tuple(map(tuple, probe_tokens.tolist())), logprobs=tuple(map(tuple, values)))
    tensors = []
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        with safe_open(Path(directory) / "model.safetensors", "pt") as file:
            for name in file.keys():  # noqa: SIM118  # safe_open is no mapping
                tensor = file.get_tensor(name)
                data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
                tensors.append(RawTensor(name, DTYPES[dtype], tuple(tensor.shape), data))
    return store.write(version, 1, version, tensors, probe)


def parity(engine: VllmEngine, manifest: Manifest) -> float:
    for number, tokens in enumerate(manifest.probe.tokens):
        engine.score(f"p{number}", tokens)
    scored: dict[str, tuple[float, ...]] = {}
    while len(scored) < len(manifest.probe.tokens):
        scored |= {r.request_id: r.logprobs for r in engine.step() if isinstance(r, Scored)}
    pairs = [(scored[f"p{n}"], expected) for n, expected in enumerate(manifest.probe.logprobs)]
    return max(abs(a - b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))


def in_flight(engine: VllmEngine, store: WeightStore, manifests: list[Manifest]) -> list[tuple[int, int, int]]:
    """Start under the first version, load the second after a few tokens; spans of the first sample."""
    engine.load(manifests[0], store.read(manifests[0]))
    engine.generate("long", PROMPT, 2)
    for _ in range(4):
        assert not engine.step()
    engine.load(manifests[1], store.read(manifests[1]))
    while True:
        for result in engine.step():
            assert isinstance(result, Finished)
            assert all(len(s.tokens) == s.spans[-1].end and (s.logprobs <= 0).all() for s in result.samples)
            return [(span.start, span.end, span.version) for span in result.samples[0].spans]


def main() -> None:
    tied, experts, dtype = sys.argv[1] == "tied", int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        settings = Settings.model_validate(
            {
                "model": {"path": directory, "dtype": dtype, "device": "cpu"},
                "task": {"max_prompt_tokens": 32, "max_completion_tokens": 24},
                "actors": {"concurrency": 16, "kv_cache_gib": 0.1},
            }
        )
        model = build(tied, experts, dtype).eval()
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(root / "skeleton")
        store = WeightStore(str(root / "store"))
        probe_tokens = torch.randint(2, 40, (3, 20), generator=torch.Generator().manual_seed(1))
        manifests = []
        for version in range(3):
            perturb(model, version)
            manifests.append(published(model, version, store, probe_tokens, dtype))
        prepare_environment(settings, root)
        engine = VllmEngine(settings, root / "skeleton", seed=0)
        differences = []
        for manifest in [*manifests, manifests[0]]:
            tensors = store.read(manifest)
            assert as_torch(tensors[0]).shape == tensors[0].shape
            engine.load(manifest, tensors)
            differences.append(parity(engine, manifest))
        spans = in_flight(engine, store, manifests[1:])
        print(json.dumps({"parity": differences, "spans": spans}))
        engine.close()


if __name__ == "__main__":
    main()
