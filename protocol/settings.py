"""Every setting of a run, documented where it is defined. `protocol.recipe` reads, merges and reports them.

One `Settings` describes the whole run, so that any process of it can be started from the same recipe.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from protocol.deepspeed_keys import check_deepspeed_table
from protocol.objectives import ObjectiveSettings, VespoSettings, choose
from protocol.section import Section

PositiveInt = Annotated[int, Field(gt=0)]
Port = Annotated[int, Field(ge=1, le=65535)]


class RunSettings(Section):
    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")
    """Names the run in Redis keys, metrics and logs; several runs may share one server."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seeds prompt order, model initialisation, warm start and sampling."""
    steps: PositiveInt = 200
    """Optimizer updates after which the run is complete."""


class ToySettings(Section):
    """A small Qwen3 with a character tokenizer, built on the spot and warm-started by supervised training."""

    hidden_size: PositiveInt = 96
    """Width; must be a multiple of `num_heads`."""
    num_layers: PositiveInt = 2
    """Decoder layers."""
    num_heads: PositiveInt = 4
    """Attention heads; keys and values use half as many."""
    num_experts: int = Field(default=0, ge=0)
    """0 for a dense model, otherwise experts per layer of a mixture of experts (2 active per token)."""
    tie_embeddings: bool = False
    """Whether the output head shares the input embedding."""
    warm_start_accuracy: float = Field(default=0.36, ge=0, lt=1)
    """Supervised training stops when sampled answers reach this accuracy; 0 skips the warm start."""

    @model_validator(mode="after")
    def _shape(self) -> Self:
        if self.hidden_size % self.num_heads or self.num_heads % 2:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be a multiple of num_heads {self.num_heads}, and num_heads even"
            )
        return self


class LoraSettings(Section):
    """Train and publish a low-rank adapter of each linear layer instead of the weights (LoRA)."""

    rank: PositiveInt = 16
    """Rank of every adapter."""
    alpha: float = Field(default=32.0, gt=0)
    """An adapter's product is multiplied by `alpha / rank` before it is added to the weight."""
    target_modules: list[str] | None = None
    """Names of the linear layers to adapt, such as `["q_proj", "v_proj"]`; default all but the output head."""


class ModelSettings(Section):
    path: str | None = None
    """Directory of a Hugging Face model with its tokenizer. Exactly one of `path` and `[model.toy]` is given."""
    toy: ToySettings | None = None
    """Build a small model instead of loading one."""
    reference: str | None = None
    """Directory of the model that `objective.kl_coefficient` measures from; default the run's initial model."""
    lora: LoraSettings | None = None
    """Train an adapter instead of the weights; without this table all weights are trained."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Number format of the weights that are published and served."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where learner and engine compute; auto takes CUDA where there is one."""
    trust_remote_code: bool = False
    """Whether Python code inside the model directory may run."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.path is None) == (self.toy is None):
            raise ValueError('give exactly one of path = "DIRECTORY" and a [model.toy] table')
        return self


class TaskSettings(Section):
    name: str = "arithmetic"
    """`arithmetic`, or `package.module:Class` for a task of your own."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the task."""
    group_size: int = Field(default=8, ge=2, le=4096)
    """Completions per prompt; advantages compare them with each other, so 1 would teach nothing."""
    max_prompt_tokens: PositiveInt = 1024
    """A longer prompt is an error, found when the ticket is taken."""
    max_completion_tokens: PositiveInt = 1024
    """Sampling stops here, with finish reason "length"."""
    temperature: float = Field(default=1.0, gt=0, le=10)
    """Sampling temperature; the learner divides its logits by the same number."""
    top_p: float = 1.0
    """Must be 1: nucleus sampling renormalises behaviour log-probs, which biases every importance weight."""
    top_k: int = 0
    """Must be 0 (off), for the same reason."""

    @model_validator(mode="after")
    def _full_support(self) -> Self:
        if self.top_p != 1.0 or self.top_k != 0:
            raise ValueError(
                f"top_p = {self.top_p} and top_k = {self.top_k} truncate the sampling distribution: its log-probs are "
                "renormalised over fewer tokens than the learner's, so every importance weight would be biased below "
                "1; leave top_p = 1 and top_k = 0"
            )
        return self


class LearnerSettings(Section):
    groups_per_step: PositiveInt = 32
    """Groups in one optimizer update."""
    learning_rate: float = Field(default=1e-6, gt=0)
    """AdamW's learning rate, where `schedule` does not lower it."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls from the end of the warm-up to nothing at `run.steps`, or that it does not."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises to its full value, in equal parts."""
    adam_betas: tuple[float, float] = (0.9, 0.999)
    """Adam's moment decays."""
    adam_epsilon: float = Field(default=1e-8, gt=0)
    """Added to the root of Adam's second moment."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this global norm."""
    precision: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Compute precision; below float32 the optimizer keeps float32 master weights. float16 scales the loss, and skips
    the step and halves the scale when a gradient overflows: a few of the first steps are spent on finding it."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed ZeRO spreads over ranks: nothing, optimizer state, gradients too, parameters too."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What of a GPU's share is kept in the CPU's memory: optimizer state, which is then updated there, and with
    `zero_stage = 3` parameters too."""
    deepspeed: str | dict[str, Any] = Field(default_factory=dict)
    """More of DeepSpeed's configuration, a table or the path of a JSON file: merged last and not looked into, but keys
    that other settings decide are refused."""
    micro_batch_tokens: PositiveInt = 16384
    """Tokens in one forward and backward pass, padding included; bounds memory, does not change the update."""
    packing: bool = True
    """Rows of whole sequences one behind the other, each of which attends to itself alone, instead of a padded row for
    each; models whose layers cannot keep sequences apart get padded rows all the same. Does not change the update."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    checkpoint_every_steps: PositiveInt = 20
    """Steps between checkpoints; groups are committed with the checkpoint that holds their effect."""
    checkpoints_kept: PositiveInt = 2
    """Complete checkpoints kept on disk."""
    starvation_seconds: float = Field(default=60.0, gt=0)
    """Waiting longer than this for groups while no actor is alive ends the run with an error."""
    filter_zero_variance: bool = False
    """Drop groups whose rewards, shaped, are all equal: they teach nothing. A step goes on gathering until it has
    `groups_per_step` others, and what is dropped makes room for new tickets."""
    rank_timeout_seconds: float = Field(default=600.0, gt=0)
    """Several ranks: a collective that one of them has not entered for this long ends the learner. A rank that dies
    ends it at once."""
    cpu_threads: PositiveInt = 1
    """Threads of the learner's CPU kernels."""

    @model_validator(mode="after")
    def _precise_gradients(self) -> Self:
        if self.zero_stage == 0 and self.precision != "float32":
            raise ValueError(
                f"zero_stage = 0 would accumulate gradients in {self.precision}; take zero_stage = 1, or precision = "
                '"float32"'
            )
        return self

    @model_validator(mode="after")
    def _deepspeed(self) -> Self:
        needed = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.zero_stage < needed:
            raise ValueError(f'offload = "{self.offload}" needs zero_stage = {needed} or more, not {self.zero_stage}')
        if not isinstance(self.deepspeed, str):
            check_deepspeed_table(self.deepspeed)
        return self


class ActorSettings(Section):
    count: int = Field(default=1, ge=0)
    """Actors that `vespo run` starts and keeps alive; more may join by `vespo actor` at any time."""
    concurrency: PositiveInt = 256
    """Completions in generation at once in one engine."""
    kv_cache_gib: float = Field(default=1.0, gt=0)
    """Key-value cache of a CPU engine; on GPUs `gpu_memory_utilization` decides."""
    gpu_memory_utilization: float = Field(default=0.9, gt=0, le=1)
    """Share of a GPU's memory that the engine may use."""
    max_restarts: int = Field(default=5, ge=0)
    """Deaths of one actor, without a group delivered in between, after which the run stops."""
    cpu_threads: PositiveInt = 1
    """Threads of a CPU engine."""


class BufferSettings(Section):
    url: str | None = None
    """Redis URL: `redis://`, `rediss://`, `unix://`, `redis+sentinel://HOST:PORT,HOST:PORT/SERVICE[/DB]` or
    `redis+cluster://HOST:PORT,HOST:PORT`; without it the run starts its own server in its directory."""
    max_lag: int = Field(default=4, ge=0)
    """How many versions generation may run ahead of training; 0 is synchronous training."""
    hard_max_lag: int | None = Field(default=None, ge=0)
    """A group older than this when the learner takes it is dropped and its ticket re-issued; default `max_lag`."""
    lease_seconds: float = Field(default=30.0, ge=1)
    """A ticket whose actor has not renewed it for this long is issued again."""
    max_attempts: PositiveInt = 5
    """Failures of one ticket after which it is dead."""
    max_bytes: PositiveInt = 4 << 30
    """Bytes of groups waiting in the buffer above which actors wait before submitting."""
    reconnect_seconds: float = Field(default=60.0, gt=0)
    """How long a client tries to reach a server that went away before it fails."""

    @model_validator(mode="after")
    def _gate(self) -> Self:
        if self.hard_max_lag is not None and self.hard_max_lag < self.max_lag:
            raise ValueError(
                f"hard_max_lag = {self.hard_max_lag} is below max_lag = {self.max_lag}: work that was admitted would "
                "be dropped on arrival"
            )
        return self

    @property
    def lag_gate(self) -> int:
        """Largest lag with which a group is trained."""
        return self.max_lag if self.hard_max_lag is None else self.hard_max_lag


class WeightSettings(Section):
    store: str | None = None
    """fsspec URL of the weight store (`file:///...`, `s3://...`), of this run alone; default a folder in the run
    directory. `redis` keeps weights in the buffer's server, for models of up to 128 MiB."""
    updates_per_publish: PositiveInt = 1
    """Optimizer updates that make a policy version."""
    seconds_per_publish: float = Field(default=0.0, ge=0)
    """Versions that come sooner than this after the last publication are counted and not published, so that large
    weights are not written more often than pays. No more than `buffer.max_lag` versions pass without one: actors that
    are further behind may not generate. 0 publishes every version."""
    versions_kept: int = Field(default=4, ge=2)
    """Versions kept in the store, the newest ones; beside them stay those that a kept delta builds on, those that a
    living actor is reading, and for some seconds what is no longer needed."""
    delta: Literal["auto", "never"] = "auto"
    """`auto` publishes only the bits that changed since the last published version, where that takes at most half of
    the bytes; what actors get is the same to the bit. The learner keeps a copy of the last version for it."""
    full_every: PositiveInt = 8
    """With `delta = "auto"`, one version in so many is full all the same, so that an actor that joins late reads one
    full version and a short chain."""
    parity_tolerance: float | None = Field(default=None, gt=0)
    """Largest log-prob difference to the learner with which an actor may serve; default 1e-4 float32, 0.5 bfloat16."""
    update: Literal["in_flight", "drain"] = "in_flight"
    """How an actor takes a version. `in_flight`: between two tokens; running completions go on under the new weights,
    and say which version sampled what. `drain`: nothing new begins and running completions finish first, so that one
    version samples each; the engine runs empty at every update."""


class MetricsSettings(Section):
    learner_port: Port | None = None
    """Port of the learner's Prometheus endpoint on 127.0.0.1; none without it."""
    actor_port: Port | None = None
    """Port of the first actor's Prometheus endpoint on 127.0.0.1, the next actor takes the next; none without it."""


class Settings(Section):
    """A whole recipe."""

    run: RunSettings = RunSettings()
    model: ModelSettings
    task: TaskSettings = TaskSettings()
    objective: SerializeAsAny[ObjectiveSettings] = VespoSettings()
    learner: LearnerSettings = LearnerSettings()
    actors: ActorSettings = ActorSettings()
    buffer: BufferSettings = BufferSettings()
    weights: WeightSettings = WeightSettings()
    metrics: MetricsSettings = MetricsSettings()

    @model_validator(mode="after")
    def _reference(self) -> Self:
        if self.model.reference is not None and self.objective.kl_coefficient == 0:
            raise ValueError("model.reference is used by nothing while objective.kl_coefficient is 0")
        return self

    @model_validator(mode="after")
    def _adapters(self) -> Self:
        if self.model.lora is not None and self.learner.zero_stage == 3:
            raise ValueError("learner.zero_stage = 3 does not go with model.lora; take 2, adapters are small")
        if self.model.lora is not None and self.weights.delta == "never":
            raise ValueError('weights.delta = "never" would publish the frozen weights of model.lora every time')
        return self

    @field_validator("objective", mode="before")
    @classmethod
    def _chosen(cls, values: Any) -> Any:
        return choose(values)

    @model_validator(mode="after")
    def _overlong(self) -> Self:
        buffer_tokens, limit = self.objective.overlong_buffer_tokens, self.task.max_completion_tokens
        if buffer_tokens is not None and buffer_tokens > limit:
            raise ValueError(
                f"objective.overlong_buffer_tokens = {buffer_tokens} is above task.max_completion_tokens = {limit}: "
                "every completion would be punished"
            )
        return self

    @property
    def groups_per_version(self) -> int:
        """Groups that the learner consumes between two publications."""
        return self.learner.groups_per_step * self.weights.updates_per_publish

    @property
    def parity_tolerance(self) -> float:
        """Largest log-prob difference with which an actor may serve, by dtype where the recipe does not say."""
        return self.weights.parity_tolerance or {"float32": 1e-4, "bfloat16": 0.5}[self.model.dtype]
