"""vLLM's engine driven in the actor's own process, one scheduler step at a time.

Between two steps it takes new requests and new weights, so an in-flight update needs no pause protocol. The weights on
disk are never read: the engine starts from the model's configuration alone and serves nothing before a version from
the weight store has been loaded. Running it in processes of its own is left to a later engine behind the same protocol.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.engine.base import Finished, Sample, Scored
from buffer.store import RawTensor
from protocol.errors import EngineError
from protocol.manifest import Manifest
from protocol.settings import Settings
from protocol.trajectory import VersionSpan

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput, RequestOutput

PROBE_SLOTS = 8  # sequences that may be scored while every generation slot is taken


def prepare_environment(settings: Settings, run_dir: Path) -> None:
    """Set what vLLM reads from the environment; must run before its first import in the process."""
    threads = str(settings.actors.cpu_threads)
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_NO_USAGE_STATS="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        OMP_NUM_THREADS=threads,
        TOKENIZERS_PARALLELISM="false",
    )
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if settings.model.device == "cpu":
        os.environ.setdefault("VLLM_TARGET_DEVICE", "cpu")


class VllmEngine:
    """`actors.engine.base.Engine` on `vllm.LLM` with one local worker."""

    def __init__(self, settings: Settings, skeleton: Path, seed: int) -> None:
        """Build the engine from a model directory without weights.

        Args:
            settings: the run's settings.
            skeleton: directory with the model's configuration and tokenizer.
            seed: sampling seed; actors of one run use different ones.
        """
        with _engine_errors("start"):
            from vllm import LLM, SamplingParams
            from vllm.sampling_params import RequestOutputKind

            # It warns at every update of layers that have no weights; what was really left out shows in the parity.
            logging.getLogger("vllm.model_executor.model_loader.reload.layerwise").setLevel(logging.ERROR)
            task, actors = settings.task, settings.actors
            device_options: dict[str, Any] = {"gpu_memory_utilization": actors.gpu_memory_utilization}
            if not _on_gpu(settings):
                device_options = {"kv_cache_memory_bytes": int(actors.kv_cache_gib * 2**30), "enforce_eager": True}
            self._llm: Any = LLM(
                model=str(skeleton),
                dtype=settings.model.dtype,
                load_format="dummy",
                trust_remote_code=settings.model.trust_remote_code,
                max_model_len=task.max_prompt_tokens + task.max_completion_tokens,
                max_num_seqs=actors.concurrency + PROBE_SLOTS,
                logprobs_mode="processed_logprobs",
                weight_transfer_config={"backend": "vespo"},
                seed=seed,
                disable_log_stats=True,
                **device_options,
            )
            self._engine: Any = self._llm.llm_engine
            self._engine.collective_rpc("init_weight_transfer_engine", args=({},))
            self._sampling = SamplingParams(
                temperature=task.temperature,
                max_tokens=task.max_completion_tokens,
                logprobs=0,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            self._scoring = SamplingParams(
                max_tokens=1, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
            )
        self._version = -1
        self._num_loads = 0
        self._internal_ids: dict[str, str] = {}

    @property
    def version(self) -> int:
        """Policy version of the loaded weights, -1 before the first `load`."""
        return self._version

    @property
    def num_running(self) -> int:
        """Requests not finished yet, probes included."""
        return len(self._internal_ids)

    def generate(self, request_id: str, prompt_tokens: Sequence[int], num_samples: int) -> None:
        """Queue `num_samples` completions of one prompt, with a prefix cache of the loaded weights' own."""
        params = self._sampling.clone()
        params.n = num_samples
        self._add(request_id, prompt_tokens, params)

    def score(self, request_id: str, tokens: Sequence[int]) -> None:
        """Queue the scoring of a probe sequence."""
        self._add(request_id, tokens, self._scoring.clone())

    def _add(self, request_id: str, tokens: Sequence[int], params: Any) -> None:
        # Salted by the load, not by the version: what a damaged load left in the cache must not survive its repetition.
        prompt = {"prompt_token_ids": list(tokens), "cache_salt": f"load-{self._num_loads}"}
        with _engine_errors("add a request"):
            self._internal_ids[request_id] = self._engine.add_request(request_id, prompt, params)

    def abort(self, request_ids: Sequence[str]) -> None:
        """Forget requests; unknown ones are ignored."""
        internal = [i for i in (self._internal_ids.pop(r, None) for r in request_ids) if i is not None]
        if internal:
            with _engine_errors("abort"):
                self._engine.abort_request(internal, internal=True)

    def step(self) -> list[Finished | Scored]:
        """Advance every running request by one token and return what finished."""
        with _engine_errors("step"):
            outputs = self._engine.step()
        results: list[Finished | Scored] = []
        for output in outputs:
            if not output.finished or self._internal_ids.pop(output.request_id, None) is None:
                continue
            if output.prompt_logprobs is not None:
                results.append(Scored(output.request_id, _prompt_logprobs(output)))
            else:
                samples = tuple(_sample(c) for c in sorted(output.outputs, key=lambda c: c.index))
                results.append(Finished(output.request_id, samples))
        return results

    def load(self, manifest: Manifest, tensors: Sequence[RawTensor]) -> None:
        """Replace the weights in place. An error half-way leaves layers without storage: the engine is lost."""
        with _engine_errors(f"load version {manifest.version}"):
            self._num_loads += 1
            self._engine.collective_rpc("start_weight_update")
            self._engine.collective_rpc("update_weights", args=({"tensors": tensors},))
            self._engine.collective_rpc("finish_weight_update")
            self._engine.set_weight_version(str(manifest.version))
        self._version = manifest.version

    def close(self) -> None:
        """Stop the engine's worker and free its memory; another engine may then start in this process."""
        if self._llm is None:
            return
        with _engine_errors("shut down"):
            from vllm.distributed import cleanup_dist_env_and_memory

            try:
                self._engine.engine_core.shutdown()
            finally:
                self._llm = self._engine = None
                cleanup_dist_env_and_memory()


def _on_gpu(settings: Settings) -> bool:
    if settings.model.device != "auto":
        return settings.model.device == "cuda"
    from vllm.platforms import current_platform

    return bool(current_platform.is_cuda_alike())


@contextmanager
def _engine_errors(doing: str) -> Iterator[None]:
    """Attribute whatever vLLM raises to the engine."""
    try:
        yield
    except Exception as error:
        raise EngineError(f"vLLM failed to {doing}: {type(error).__name__}: {error}") from error


def _sample(output: "CompletionOutput") -> Sample:
    tokens = np.asarray(output.token_ids, np.int32)
    assert output.logprobs is not None and output.weight_versions is not None
    logprobs = np.fromiter(
        (position[token].logprob for position, token in zip(output.logprobs, output.token_ids, strict=True)),
        np.float32,
        len(tokens),
    )
    spans = tuple(VersionSpan(s.start, s.end, int(s.version)) for s in output.weight_versions)
    return Sample(tokens, logprobs, spans, "stop" if output.finish_reason == "stop" else "length")


def _prompt_logprobs(output: "RequestOutput") -> tuple[float, ...]:
    assert output.prompt_logprobs is not None and output.prompt_token_ids is not None
    pairs = zip(output.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True)
    return tuple(position[token].logprob for position, token in pairs if position is not None)
