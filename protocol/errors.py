"""Every error that crosses a room, one type per boundary; a caller's mistake is a `ValueError` instead.

`exit_code` is what the `vespo` command returns when the error ends it.
"""


class VespoError(Exception):
    """Base of all errors raised on purpose by this system; the message says what, where and what to do."""

    exit_code = 1


class SettingsError(VespoError):
    """A recipe, environment variable or command-line override is wrong."""

    exit_code = 2


class BufferUnavailableError(VespoError):
    """The Redis server cannot be reached, or stayed away longer than the reconnect deadline."""


class BufferPolicyError(VespoError):
    """The Redis server is configured so that it could lose data (eviction), or is too old."""


class RunMismatchError(VespoError):
    """The buffer holds a run that this run directory or recipe does not belong to."""


class FencedError(VespoError):
    """A newer learner epoch exists: this learner must stop; nothing it wrote since is counted."""


class CodecError(VespoError):
    """Bytes that are not a valid group or manifest: wrong magic, version, size, checksum or content."""


class WeightStoreError(VespoError):
    """The weight store cannot be read or written, or what it returned does not match its checksums."""


class WeightsDamagedError(WeightStoreError):
    """The weight store answers, but a version's payload is missing or is not what its manifest says."""


class ParityError(VespoError):
    """An engine's log-probs differ from the learner's by more than the tolerance under one version."""


class EngineError(VespoError):
    """The generation engine failed and must be replaced; its unfinished tickets go back to the buffer."""


class TaskError(VespoError):
    """A task or scorer failed on one ticket; the ticket fails, nothing is rewarded."""


class StarvedError(VespoError):
    """The learner has waited past its deadline and no actor is alive to end the wait."""


class CheckpointError(VespoError):
    """A checkpoint is incomplete, damaged, or of another model."""


class RankError(VespoError):
    """Another rank of the learner failed, or went away; all ranks end, and resume from the last checkpoint."""


class NonFiniteError(VespoError):
    """Gradients were not finite in several consecutive steps."""


class LauncherError(VespoError):
    """A process of the run could not be started, or kept dying."""
