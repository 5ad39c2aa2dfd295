"""What the trace says of all optimizers that a recorder follows."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from bhfast.recording.hooks import OptimizerFollower
from bhfast.recording.optimizer_description import joined_descriptions


def description_metadata(followers: Sequence[OptimizerFollower], tied: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata that describe the optimizers, and the further names of tied parameters.

    Args:
        followers: of the optimizers.
        tied: for each further name of a parameter, the name it is recorded under.
    """
    keys = keys_of(followers)
    rows = {of.name for follower in followers for of in follower.params if of.all_rows is not None}
    names = {
        key.replace(name, other, 1): key
        for other, name in tied.items()
        for key in [*keys.get(name, {}).values(), *([f"{name}.rows"] if name in rows else [])]
        if key.startswith(name)
    }
    own = {"optimizer": json.dumps(joined_description(followers))}
    return {**own, "tied": json.dumps(names)} if names else own


def joined_description(followers: Sequence[OptimizerFollower]) -> dict[str, Any]:
    """Return what the trace says of the optimizers."""
    keys = keys_of(followers)
    return joined_descriptions(
        [own.description.describe({of.name: of.param for of in own.params}, keys) for own in followers]
    )


def keys_of(followers: Sequence[OptimizerFollower]) -> dict[str, dict[str, str]]:
    """Return, for each parameter, under which name a reader finds each field."""
    keys: dict[str, dict[str, str]] = defaultdict(dict)
    for follower in followers:
        for field in follower.fields.values():
            keys[field.of.name][field.field] = field.key
    return keys
