"""Program of `test_vllm_updates.py`: versions of models loaded in place into vLLM engines, compared with transformers.

Prints a line of JSON per model, then one for what happens when updates go wrong. It is a process of its own because an
engine binds its process; all engines live in it one after the other, because importing vLLM takes longer than they do.
"""

import json
import tempfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig
from transformers import PreTrainedTokenizerFast as FastTokenizer

from actors.engine.base import Finished, Sample, Scored
from actors.engine.vllm_engine import VllmEngine, prepare_environment
from actors.weights.follower import StagedVersion
from actors.weights.gate import Verdict, VersionGate
from buffer.store import RawTensor, WeightStore
from protocol.manifest import Manifest, Probe
from protocol.settings import Settings

DTYPES = {"float32": "F32", "bfloat16": "BF16"}
PROMPT = [3, 4, 5]
PREFIX = [2 + i * i % 37 for i in range(300)]  # two blocks of vLLM's prefix cache on a CPU, and more
CASES = {
    "qwen3": ("float32", False),
    "qwen3-tied": ("float32", True),
    "qwen3-tied-bfloat16": ("bfloat16", True),
    "moe": ("float32", False),
    "moe-tied": ("float32", True),
    "moe-tied-bfloat16": ("bfloat16", True),
    "llama": ("float32", False),
    "qwen2-tied": ("float32", True),
}


def configuration(family: str, tied: bool) -> PretrainedConfig:
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
    match family:
        case "moe":  # 40 is no multiple of 32 on purpose: vLLM pads such experts on CPU.
            return Qwen3MoeConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=40, **shared)
        case "llama":
            return LlamaConfig(**shared)
        case "qwen2":  # its query, key and value projections have a bias; heads are as wide as width / heads
            return Qwen2Config(**shared | {"num_attention_heads": 2, "num_key_value_heads": 1})
    return Qwen3Config(**shared)


def perturb(model: torch.nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)


class Models:
    """Three versions of one model: as transformers modules, and published to a store."""

    def __init__(self, name: str, root: Path) -> None:
        dtype, tied = CASES[name]
        self.settings = Settings.model_validate(
            {
                "model": {"path": str(root), "dtype": dtype, "device": "cpu"},
                "task": {"max_prompt_tokens": 320, "max_completion_tokens": 24},
                "actors": {"concurrency": 16, "kv_cache_gib": 0.1},
            }
        )
        self.skeleton = root / "skeleton"
        self.store = WeightStore(str(root / "store"))
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(configuration(name.split("-")[0], tied), dtype=getattr(torch, dtype))
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(self.skeleton)
        words = Tokenizer(WordLevel({str(i): i for i in range(40)}, unk_token="0"))
        FastTokenizer(tokenizer_object=words).save_pretrained(self.skeleton)
        probe_tokens = torch.randint(2, 40, (3, 20), generator=torch.Generator().manual_seed(1))
        self.versions, self.manifests = [], []
        for version in range(3):
            perturb(model, version)
            self.versions.append(deepcopy(model.eval()))
            self.manifests.append(self._publish(version, probe_tokens, dtype))

    def _publish(self, version: int, probe_tokens: torch.Tensor, dtype: str) -> Manifest:
        from safetensors import safe_open

        values = logprobs_of(self.versions[version], probe_tokens).tolist()
        probe = Probe(tokens=tuple(map(tuple, probe_tokens.tolist())), logprobs=tuple(map(tuple, values)))
        tensors = []
        with tempfile.TemporaryDirectory() as directory:
            self.versions[version].save_pretrained(directory)
            with safe_open(Path(directory) / "model.safetensors", "pt") as file:
                for name in file.keys():  # noqa: SIM118  # safe_open is no mapping
                    tensor = file.get_tensor(name)
                    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
                    tensors.append(RawTensor(name, DTYPES[dtype], tuple(tensor.shape), data))
        return self.store.write(version, 1, version, tensors, probe)

    def staged(self, version: int) -> StagedVersion:
        return StagedVersion(self.manifests[version], self.store.read(self.manifests[version]))

    def start(self) -> VllmEngine:
        return VllmEngine(self.settings, self.skeleton, seed=0)


def logprobs_of(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Of every token after the first, `[B, T-1] float32`."""
    with torch.no_grad():
        logprobs = model(tokens).logits.float().log_softmax(-1)[:, :-1]
    return logprobs.gather(-1, tokens[:, 1:, None])[..., 0]


def load(engine: VllmEngine, staged: StagedVersion) -> None:
    engine.load(staged.manifest, staged.tensors)


def scores(engine: VllmEngine, probe: Probe) -> dict[str, tuple[float, ...]]:
    for number, tokens in enumerate(probe.tokens):
        engine.score(f"p{number}", tokens)
    scored: dict[str, tuple[float, ...]] = {}
    while len(scored) < len(probe.tokens):
        scored |= {r.request_id: r.logprobs for r in engine.step() if isinstance(r, Scored)}
    return scored


def parity(engine: VllmEngine, manifest: Manifest) -> float:
    scored = scores(engine, manifest.probe)
    pairs = [(scored[f"p{n}"], expected) for n, expected in enumerate(manifest.probe.logprobs)]
    return max(abs(a - b) for ours, theirs in pairs for a, b in zip(ours, theirs, strict=True))


def generated(engine: VllmEngine, prompt: list[int]) -> Sample:
    engine.generate("one", prompt, 1)
    while not (results := engine.step()):
        pass
    assert isinstance(results[0], Finished)
    return results[0].samples[0]


def in_flight(engine: VllmEngine, models: Models) -> list[tuple[int, int, int]]:
    """Start under version 1, load version 2 after a few tokens; spans of the first sample."""
    load(engine, models.staged(1))
    engine.generate("long", PROMPT, 2)
    for _ in range(4):
        assert not engine.step()
    load(engine, models.staged(2))
    while True:
        for result in engine.step():
            assert isinstance(result, Finished)
            assert all(len(s.tokens) == s.spans[-1].end and (s.logprobs <= 0).all() for s in result.samples)
            return [(span.start, span.end, span.version) for span in result.samples[0].spans]


def prefix_cache(engine: VllmEngine, models: Models) -> list[tuple[str, int, float]]:
    """For one long prompt again and again: what was loaded, tokens taken from the cache, error of the log-probs."""
    cached: list[int] = []
    step = engine._engine.step

    def observed() -> list[object]:
        outputs = step()
        cached.extend(output.num_cached_tokens for output in outputs if output.finished)
        return list(outputs)

    engine._engine.step = observed
    report = []
    damaged = replace(models.staged(2), tensors=models.staged(0).tensors)
    sequence = [("first", 1), ("again", 1), ("updated", 2), ("damaged", 0), ("repaired", 2)]
    for what, version in sequence:
        if what != "again":
            load(engine, damaged if what == "damaged" else models.staged(version))
        sample = generated(engine, PREFIX)
        expected = logprobs_of(models.versions[version], torch.tensor([PREFIX + sample.tokens.tolist()]))
        difference = (expected[0, len(PREFIX) - 1 :] - torch.from_numpy(sample.logprobs)).abs().max()
        report.append((what, cached[-1], float(difference)))
    engine._engine.step = step
    return report


def examine(models: Models) -> dict[str, object]:
    """Everything about one model, in place and in a fresh engine."""
    engine = models.start()
    differences = []
    for version in (0, 1, 2, 0):
        load(engine, models.staged(version))
        differences.append(parity(engine, models.manifests[version]))
    in_place = scores(engine, models.manifests[0].probe)
    spans = in_flight(engine, models)
    cache = prefix_cache(engine, models)
    engine.close()
    fresh = models.start()
    load(fresh, models.staged(0))
    identical = scores(fresh, models.manifests[0].probe) == in_place
    fresh.close()
    return {"parity": differences, "identical": identical, "spans": spans, "cache": cache}


class Corrupted(VllmEngine):
    """A value in the model flips after each load but the first."""

    def load(self, manifest: Manifest, tensors: list[RawTensor]) -> None:  # type: ignore[override]
        super().load(manifest, tensors)
        if manifest.version > 0:
            self._llm.apply_model(lambda model: model.model.norm.weight.data[0].mul_(-3))


class Torn(VllmEngine):
    """A tensor of version 1 is of another shape than the model's."""

    def load(self, manifest: Manifest, tensors: list[RawTensor]) -> None:  # type: ignore[override]
        if manifest.version > 0:
            first = tensors[0]
            half = first.data[: len(first.data) // 2]
            halved = replace(first, shape=(first.shape[0] // 2, *first.shape[1:]), data=half)
            tensors = [halved, *tensors[1:]]
        super().load(manifest, tensors)


def remedied(models: Models, faulty: Callable[[Settings, Path, int], VllmEngine]) -> dict[str, object]:
    """Serve version 0, take version 1 in an engine that fails it, and go on as the gate says."""
    engines = iter([lambda: faulty(models.settings, models.skeleton, 0), models.start])
    gate = VersionGate(lambda: next(engines)(), models.settings.parity_tolerance)
    served, lost = [], 0
    for version in range(2):
        gate.offer(models.staged(version))
        while gate.served_version < version:
            while not gate.update(idle=False):
                lost += 1
            verdicts = [gate.answer(result) for result in gate.engine.step() if isinstance(result, Scored)]
            if Verdict.VERIFIED in verdicts:
                served.append(gate.parity)
    again = parity(gate.engine, models.manifests[1])
    gate.engine.close()
    counts = (gate.violations, gate.reloads, gate.rebuilds, lost)
    return {"counts": counts, "parity": [*served, again], "engine": type(gate.engine).__name__}


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        every = {name: Models(name, Path(directory) / name) for name in CASES}
        prepare_environment(every["qwen3"].settings, Path(directory))
        for name, models in every.items():
            print(json.dumps({"name": name} | examine(models)), flush=True)
        for fault in (Corrupted, Torn):
            print(json.dumps({"name": fault.__name__} | remedied(every["moe-tied"], fault)), flush=True)


if __name__ == "__main__":
    main()
