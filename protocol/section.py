"""The base of every table of settings; apart, so that tables may live in several modules."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of all settings: unknown keys are errors, values do not change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)
