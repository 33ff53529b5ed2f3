"""Responses that are JSON."""

from __future__ import annotations

import json
from typing import Any

from vbon_lightning.rewards.base import RewardError
from vbon_lightning.rewards.per_response import ResponseReward


class JsonReward(ResponseReward):
    """Score 1 where the response is valid JSON and fits a schema if one is given, 0 elsewhere.

    Args:
        schema: A JSON Schema; needs the package ``jsonschema`` (the extra ``verify``).
        fenced: Whether JSON within a Markdown fence counts as well.
    """

    def __init__(self, schema: dict[str, Any] | None = None, fenced: bool = False) -> None:
        super().__init__()
        self.schema, self.fenced = schema, fenced
        self._validator: Any = None
        if schema is not None:
            try:
                from jsonschema.exceptions import SchemaError
                from jsonschema.validators import validator_for
            except ImportError as error:
                raise RewardError(
                    "`schema` needs the package jsonschema: pip install 'vbon_lightning[verify]'"
                ) from error
            try:
                validator_for(schema).check_schema(schema)
            except SchemaError as problem:
                raise RewardError(f"`schema` is no JSON Schema: {problem.message}") from problem
            self._validator = validator_for(schema)(schema)

    def score(self, response: str, answer: Any) -> float:
        """Say whether a response is JSON of the schema."""
        try:
            value = json.loads(self._bare(response), parse_constant=_refuse)
        except (ValueError, RecursionError):
            return 0.0
        return 1.0 if self._validator is None else float(self._validator.is_valid(value))

    def _bare(self, response: str) -> str:
        lines = response.strip().splitlines()
        if self.fenced and len(lines) > 2 and lines[0].startswith("```") and lines[-1].strip() == "```":
            return "\n".join(lines[1:-1])
        return response


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON, though Python reads it")
