"""Names of all Prometheus metrics, defined once: what the learner exports, and what an actor exports.

A caller hands in its own registry, so that several learners or actors may live in one process (tests do). Every metric
carries the run's name as label `run`, an actor's also its name as `actor`; units are Prometheus base units.
"""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from protocol.records import ActorStatus, StepRecord

LAG_BUCKETS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class _Metrics:
    """Makes metrics of one process and one run."""

    def __init__(self, registry: CollectorRegistry, run: str, prefix: str) -> None:
        self._registry = registry
        self._run = run
        self._prefix = prefix

    def _gauge(self, name: str, meaning: str) -> Gauge:
        return Gauge(f"{self._prefix}_{name}", meaning, ["run"], registry=self._registry).labels(self._run)

    def _counter(self, name: str, meaning: str) -> Counter:
        return Counter(f"{self._prefix}_{name}", meaning, ["run"], registry=self._registry).labels(self._run)

    def _histogram(self, name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"{self._prefix}_{name}", meaning, ["run"], registry=self._registry, buckets=buckets)
        return histogram.labels(self._run)


class LearnerMetrics(_Metrics):
    """What the learner exports; all but `version` and the publisher's are set by `observe`."""

    def __init__(self, registry: CollectorRegistry, run: str) -> None:
        super().__init__(registry, run, "vespo_learner")
        self.version = self._gauge("version", "Policy version of the learner's weights, published or not")
        self.step = self._gauge("step", "Optimizer updates done")
        self.epoch = self._gauge("epoch", "Learner incarnation")
        self.reward = self._gauge("reward", "Mean reward of the newest step")
        self.loss = self._gauge("loss", "Loss of the newest step")
        self.grad_norm = self._gauge("grad_norm", "Global gradient norm before clipping")
        self.entropy = self._gauge("entropy_nats", "Mean entropy per sampled token")
        self.behaviour_kl = self._gauge("behaviour_kl_nats", "Mean behaviour minus policy log-prob per sampled token")
        self.ess = self._gauge("ess_ratio", "Effective sample size of the importance weights, as a share")
        self.ess_phi = self._gauge("ess_weights_ratio", "Effective sample size of the objective's weights, as a share")
        self.kernel_mass = self._gauge("kernel_mass_ratio", "Advantage mass that the kernel lets through")
        self.starved = self._gauge("starved_positives_ratio", "Good sequences that get practically no gradient")
        self.zero_variance = self._gauge("zero_variance_groups_ratio", "Groups whose rewards are all equal")
        self.padding = self._gauge("padding_ratio", "Positions of the micro-batches that hold no token")
        self.buffered = self._gauge("buffered_groups", "Groups that wait for the learner")
        self.lag = self._histogram("lag_versions", "Lag of each sequence trained on", LAG_BUCKETS)
        self.step_seconds = self._histogram("step_seconds", "Time from one step to the next", SECONDS_BUCKETS)
        self.publish_seconds = self._gauge("publish_seconds", "Time the newest publication took in the background")
        self.superseded = self._gauge("superseded_versions", "Versions a newer one replaced before publication")
        self.wait = self._counter("wait_seconds_total", "Time the optimizer waited for groups")
        self.build = self._counter("build_seconds_total", "Time the optimizer waited for groups to be laid out")
        self.checkpoint = self._counter("checkpoint_seconds_total", "Time the optimizer stood still for checkpoints")
        self.train = self._counter("train_seconds_total", "Time in forward, backward and optimizer")
        self.groups = self._counter("groups_total", "Groups trained on")
        self.sequences = self._counter("sequences_total", "Sequences trained on")
        self.tokens = self._counter("tokens_total", "Response tokens trained on")
        self.skipped = self._counter("skipped_steps_total", "Steps skipped because of a non-finite gradient")
        self.silenced = self._counter("silenced_sequences_total", "Sequences left out for a non-finite log-prob")
        self.filtered = self._counter("filtered_groups_total", "Groups dropped because their rewards are all equal")
        self.stale = self._counter("stale_groups_total", "Groups dropped as too old, their tickets issued again")

    def observe(self, record: StepRecord) -> None:
        """Export one step."""
        for gauge, value in (
            (self.step, record.step),
            (self.epoch, record.epoch),
            (self.reward, record.reward_mean),
            (self.loss, record.loss),
            (self.grad_norm, record.grad_norm),
            (self.entropy, record.entropy),
            (self.behaviour_kl, record.behaviour_kl),
            (self.ess, record.ess_w),
            (self.ess_phi, record.ess_phi),
            (self.kernel_mass, record.kernel_mass),
            (self.starved, record.starved_positive_share),
            (self.zero_variance, record.zero_variance_share),
            (self.padding, record.padding_share),
            (self.buffered, record.buffered_groups),
        ):
            gauge.set(value)
        for counter, amount in (
            (self.wait, record.wait_seconds),
            (self.build, record.build_seconds),
            (self.checkpoint, record.checkpoint_seconds),
            (self.train, record.train_seconds),
            (self.groups, record.num_groups),
            (self.sequences, record.num_sequences),
            (self.tokens, record.num_tokens),
            (self.skipped, int(record.skipped)),
            (self.silenced, record.silenced),
            (self.stale, record.stale),
            (self.filtered, record.filtered),
        ):
            counter.inc(amount)
        self.step_seconds.observe(record.step_seconds)
        for lag, count in record.lag_counts.items():
            for _ in range(count):
                self.lag.observe(lag)


ACTOR_COUNTERS = {
    "tokens_generated": ("vespo_actor_tokens", "Response tokens generated"),
    "groups_submitted": ("vespo_actor_groups", "Complete groups accepted by the buffer"),
    "tickets_failed": ("vespo_actor_failed_tickets", "Tickets failed by the task or its scorer"),
    "versions_loaded": ("vespo_actor_updates", "Policy versions taken"),
    "fetch_failures": ("vespo_actor_fetch_failures", "Reads of the weight store that brought no version"),
    "fetch_fallbacks": ("vespo_actor_fetch_fallbacks", "Reads that a bad delta sent back to a full version"),
    "parity_violations": ("vespo_actor_parity_violations", "Parity probes over the tolerance"),
    "reloads": ("vespo_actor_reloads", "Versions loaded again after a parity violation"),
    "engine_rebuilds": ("vespo_actor_engine_rebuilds", "Engines replaced because an update failed"),
    "update_seconds": ("vespo_actor_update_seconds", "Time generation stood still to take versions"),
    "busy_seconds": ("vespo_actor_busy_seconds", "Time in engine steps with sequences in generation"),
}
ACTOR_GAUGES = {
    "served_version": ("vespo_actor_served_version", "Verified policy version that generates"),
    "served_seconds": ("vespo_actor_served_seconds", "Time since the served version was verified"),
    "parity": ("vespo_actor_parity_nats", "Largest log-prob difference to the learner under one version"),
    "running_sequences": ("vespo_actor_running_sequences", "Completions in generation"),
}


class ActorCollector(Collector):
    """What one actor exports, read from its status whenever Prometheus asks."""

    def __init__(self, run: str, actor: str, status: Callable[[], ActorStatus]) -> None:
        self._labels = {"run": run, "actor": actor}
        self._status = status

    def collect(self) -> Iterator[Metric]:
        """One sample of each metric, and the actor's state as a label."""
        status = self._status()
        names, values = list(self._labels), list(self._labels.values())
        for field, (name, meaning) in ACTOR_COUNTERS.items():
            counter = CounterMetricFamily(name, meaning, labels=names)
            counter.add_metric(values, getattr(status, field))
            yield counter
        for field, (name, meaning) in ACTOR_GAUGES.items():
            gauge = GaugeMetricFamily(name, meaning, labels=names)
            gauge.add_metric(values, getattr(status, field))
            yield gauge
        state = GaugeMetricFamily("vespo_actor_state", "1 for the state the actor is in", labels=[*names, "state"])
        state.add_metric([*values, status.state], 1)
        yield state
