"""What the schemas of all bodies that ask for answers have in common."""

from pydantic import BaseModel, ConfigDict


class Schema(BaseModel):
    """Unknown fields are ignored. Values are of their type, not merely convertible to it."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
