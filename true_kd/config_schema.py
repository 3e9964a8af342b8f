"""The JSON schema of a config file, for editors and for programs: made from the options classes, so from their bounds.

It and `load_config` differ only where a schema cannot tell: keys that exclude each other, keys of a whole run in the
file of a domain, secrets, and 8.0 for a whole number.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from true_kd.config import RunConfig
from true_kd.layers import SEAMS


def schema() -> dict[str, Any]:
    """The JSON schema of configs/base.yaml, configs/<domain>.yaml and run.json (draft 2020-12)."""
    found = RunConfig.model_json_schema()
    found["description"] = "A config of true-kd: `true-kd config show` prints it with where each value came from."
    model = found["$defs"]["ModelOptions"]
    # A mapping may leave out the name, which then is the default one.
    del model["required"]
    name = {key: value for key, value in model["properties"]["model"].items() if key in ("type", "minLength")}
    for seam in SEAMS:
        whole = found["properties"][seam]
        default = whole["default"]["model"]
        found["properties"][seam] = {
            "description": whole["description"],
            "anyOf": [{**name, "default": default}, {"$ref": "#/$defs/ModelOptions"}],
            "default": default,
        }
    for group in found["properties"].values():
        if "$ref" in group:
            # Its keys have their own defaults; an editor would write this one out whole.
            group.pop("default", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_tidy(found), "title": "true-kd config"}


def _tidy(part: Any) -> Any:
    """The schema without the titles that pydantic makes of names, and with each description on one line."""
    if isinstance(part, Mapping):
        kept = {name: value for name, value in part.items() if not (name == "title" and isinstance(value, str))}
        return {
            name: " ".join(value.split()) if name == "description" and isinstance(value, str) else _tidy(value)
            for name, value in kept.items()
        }
    return [_tidy(each) for each in part] if isinstance(part, list) else part
