"""Settings of the policy objectives, one table for each, chosen by `[objective] name`.

Names, defaults and ranges are those of the functions in `learner.objectives`, repeated here so that a recipe can be
checked without loading what computes them; a test holds the two together. Functions of one's own, named
`package.module:function`, take `[objective.options]`, which only the learner can check.
"""

from difflib import get_close_matches
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PlainSerializer, field_validator, model_validator

from protocol.section import Section

PositiveInt = Annotated[int, Field(gt=0)]
Exponent = Annotated[float, Field(ge=1, le=100)]
Positive = Annotated[float, Field(gt=0, le=100)]
Clip = Annotated[float, Field(ge=0, le=100)]
Cap = Annotated[float, Field(gt=0, le=1e6)]
Step = Annotated[float, Field(gt=0, le=1)]
Coefficient = Annotated[float, Field(ge=0, le=100)]
OFF = "off"  # TOML has no null
DualClip = Annotated[
    Annotated[float, Field(gt=1, le=1e6)] | None,
    BeforeValidator(lambda value: None if value == OFF else value),
    PlainSerializer(lambda value: OFF if value is None else value, when_used="json"),
]

MAX_CANDIDATES = 1000


class ObjectiveSettings(Section):
    """What every objective has."""

    name: str
    """vespo, grpo, gspo, sapo, cispo, topr, bapo, tis, reinforce, or `package.module:function` of your own."""
    normalise_std: bool = False
    """Divide advantages by their group's standard deviation (the authors' scripts) or not (the paper's text)."""
    aggregation: Literal["token-mean", "sequence-mean-token-mean"] | None = None
    """Average over all tokens, or over each sequence's and then over sequences; default as the objective's source."""
    kl_coefficient: Coefficient = 0.0
    """Weight of the KL divergence from the initial model (or `model.reference`), a mean over tokens; 0 is off. A second
    model in the learner's memory, and a forward pass of it for each token."""
    entropy_coefficient: Coefficient = 0.0
    """Weight of the entropy that is rewarded, a mean over tokens; 0 is off."""
    overlong: Literal["keep", "zero", "mask", "penalty"] = "keep"
    """Completions cut at `task.max_completion_tokens`: keep their reward; count it as zero; mask their tokens, which
    then are in neither loss nor token count, while their reward still counts for what the rest of the group is compared
    with; or DAPO's soft penalty (arXiv 2503.14476), up to -1 for all that come near the limit."""
    overlong_buffer_tokens: PositiveInt | None = None
    """`overlong = "penalty"`: it sets in this many tokens before the limit; default a fifth of the limit."""
    reward_shaping: str | None = None
    """`package.module:function` that takes a group and returns a reward for each of its completions; runs in the
    learner, after `overlong`, before groups are filtered and compared."""

    @field_validator("reward_shaping")
    @classmethod
    def _importable(cls, name: str | None) -> str | None:
        module, colon, function = (name or "").partition(":")
        if name is not None and not (module and colon and function.isidentifier()):
            raise ValueError("is not of the form package.module:function")
        return name

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        module, colon, function = name.partition(":")
        if name not in OBJECTIVES and not (module and colon and function.isidentifier()):
            near = get_close_matches(name, OBJECTIVES, 1)
            raise ValueError("no such objective" + (f", the nearest is {near[0]}" if near else ""))
        return name

    def hyperparameters(self) -> dict[str, Any]:
        """What the objective's function takes by keyword."""
        return self.model_dump(exclude=set(ObjectiveSettings.model_fields))


class VespoSettings(ObjectiveSettings):
    name: str = "vespo"
    k_pos: Exponent = 2.0
    """VESPO's kernel exponent k for advantages ≥ 0; below 1 the second moment of the weights is unbounded."""
    lambda_pos: Positive = 3.0
    """VESPO's kernel rate λ for advantages ≥ 0."""
    k_neg: Exponent = 3.0
    """VESPO's kernel exponent k for advantages < 0; below 1 the second moment of the weights is unbounded."""
    lambda_neg: Positive = 2.0
    """VESPO's kernel rate λ for advantages < 0."""


class GrpoSettings(ObjectiveSettings):
    name: str = "grpo"
    clip_low: Clip = 0.2
    """GRPO and GSPO: the importance ratio is clipped from below at 1 - clip_low."""
    clip_high: Clip = 0.28
    """GRPO and GSPO: the importance ratio is clipped from above at 1 + clip_high."""
    dual_clip: DualClip = 3.0
    """GRPO and BAPO: cap of the token ratio where the advantage is negative, above 1, or "off"."""


class GspoSettings(ObjectiveSettings):
    name: str = "gspo"
    clip_low: Clip = 3e-4
    clip_high: Clip = 4e-4


class SapoSettings(ObjectiveSettings):
    name: str = "sapo"
    tau_pos: Positive = 1.0
    """SAPO's gate temperature for advantages > 0."""
    tau_neg: Positive = 1.05
    """SAPO's gate temperature for advantages ≤ 0."""


class CispoSettings(ObjectiveSettings):
    name: str = "cispo"
    ratio_min: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """CISPO: lower bound of the token ratio; 0 is none."""
    ratio_max: Cap = 5.0
    """CISPO and TIS: upper bound of the token ratio; TOPR: of the sequence weight where the advantage is negative."""

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.ratio_min > self.ratio_max:
            raise ValueError(f"ratio_min = {self.ratio_min} is above ratio_max = {self.ratio_max}")
        return self


class ToprSettings(ObjectiveSettings):
    name: str = "topr"
    ratio_max: Cap = 1.0


class BapoSettings(ObjectiveSettings):
    """An extra forward pass in every update finds the bounds."""

    name: str = "bapo"
    positive_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """BAPO: share of the clipped objective's size that tokens with positive advantage are to have."""
    low_start: Annotated[float, Field(ge=0, le=1)] = 0.6
    """BAPO: lower clip bound where the share is reached without a search."""
    low_max: Annotated[float, Field(ge=0, le=1)] = 0.9
    """BAPO: lower clip bound otherwise."""
    high_start: Annotated[float, Field(ge=1, le=100)] = 1.2
    """BAPO: where the search for the upper clip bound starts."""
    high_max: Annotated[float, Field(ge=1, le=100)] = 3.0
    """BAPO: where the search for the upper clip bound ends."""
    high_step: Step = 0.05
    """BAPO: by how much the upper clip bound moves."""
    dual_clip: DualClip = 3.0

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        for side, start, end in (("low", self.low_start, self.low_max), ("high", self.high_start, self.high_max)):
            if start > end:
                raise ValueError(f"{side}_start = {start} is above {side}_max = {end}")
        if (self.high_max - self.high_start) / self.high_step > MAX_CANDIDATES:
            raise ValueError(
                f"high_step = {self.high_step} makes more than {MAX_CANDIDATES} steps from high_start = "
                f"{self.high_start} to high_max = {self.high_max}"
            )
        return self


class TisSettings(ObjectiveSettings):
    name: str = "tis"
    ratio_max: Cap = 2.0


class ReinforceSettings(ObjectiveSettings):
    name: str = "reinforce"


class CustomSettings(ObjectiveSettings):
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of an objective of your own."""

    def hyperparameters(self) -> dict[str, Any]:
        """The options."""
        return dict(self.options)


OBJECTIVES: dict[str, type[ObjectiveSettings]] = {
    str(table.model_fields["name"].default): table
    for table in (
        VespoSettings,
        GrpoSettings,
        GspoSettings,
        SapoSettings,
        CispoSettings,
        ToprSettings,
        BapoSettings,
        TisSettings,
        ReinforceSettings,
    )
}
"""Tables of the built-in objectives by name."""

TABLES: tuple[type[ObjectiveSettings], ...] = (ObjectiveSettings, *OBJECTIVES.values(), CustomSettings)
"""All that may stand under `[objective]`; a key means the same in each that has it."""
COMMON = frozenset(ObjectiveSettings.model_fields)
DEFAULT = "vespo"


def choose(values: Any) -> Any:
    """The settings of the objective that a table's `name` chooses; what is no table passes unchanged.

    Raises:
        ValidationError: of the chosen table.
    """
    if not isinstance(values, dict):
        return values
    name = values.get("name", DEFAULT)
    if isinstance(name, str) and name in OBJECTIVES:
        return OBJECTIVES[name].model_validate(values)
    if isinstance(name, str) and ":" in name:
        return CustomSettings.model_validate(values)
    return ObjectiveSettings.model_validate({"name": name})


def stray(name: str, key: str) -> str:
    """What to say of a key that the chosen objective does not have."""
    table = OBJECTIVES.get(name, CustomSettings)
    keys = [known for known in table.model_fields if known not in COMMON]
    has = f"it has {', '.join(keys)}" if keys else "it has none"
    near = get_close_matches(key, keys, 1)
    owners = [owner for owner, other in OBJECTIVES.items() if key in other.model_fields]
    hint = f"; did you mean {near[0]}?" if near else f"; {has}"
    return f"not a setting of {name}" + (f" but of {', '.join(owners)}" if owners else "") + hint
