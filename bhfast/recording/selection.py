"""Selects the parameters and rows to record, by name or pattern. Each parameter is recorded once."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from bhfast.errors import ConfigError
from bhfast.recording.fields import RecordedParam

Params = Mapping[str, Tensor] | str | re.Pattern[str] | Sequence[str | re.Pattern[str]]
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.")  # of torch.compile and FullyShardedDataParallel
SHOWN = 8  # names in a message


def select(
    params: Params,
    *,
    model: nn.Module | None,
    optimizers: Sequence[torch.optim.Optimizer],
    rows: Mapping[str, Tensor | Sequence[int]],
) -> tuple[list[RecordedParam], dict[str, str]]:
    """Find the parameters and rows that a user asked for.

    Args:
        params: parameters by name; or names, globs and compiled regular expressions (which must match a whole name)
            over ``model.named_parameters()``. The name of a module, or a glob that matches one, stands for all its
            parameters. Patterns skip frozen parameters.
        model: needed for names. Prefixes of wrappers (``torch.compile``, ``DistributedDataParallel``) are removed.
        optimizers: each parameter must be in a group of one of them.
        rows: for some of the names, int64 indices along axis 0, or a bool mask over it.

    Returns:
        The parameters, not yet divided among processes; and for each further name of a tied parameter, the name it is
        recorded under.

    Raises:
        ConfigError: nothing matches, a parameter is frozen or not the optimizer's, or rows do not fit.
    """
    named = named_params(params, model)
    updated = {id(p) for own in optimizers for group in own.param_groups for p in group["params"]}
    if frozen := [name for name, param in named if not param.requires_grad]:
        raise ConfigError(f"cannot record frozen parameters (requires_grad=False): {_listed(frozen)}")
    if foreign := [name for name, param in named if id(param) not in updated]:
        raise ConfigError(f"params must be updated by the optimizer, but none of its groups has {_listed(foreign)}")
    first: dict[int, str] = {}
    for name, param in named:
        first.setdefault(id(param), name)
    tied = {name: first[id(param)] for name, param in named if first[id(param)] != name}
    chosen = {tied.get(name, name): which for name, which in rows.items()}
    if unknown := chosen.keys() - set(first.values()):
        raise ConfigError(f"rows are given for {_listed(sorted(unknown))}, which params do not include")
    return [_whole(name, param, chosen.get(name)) for name, param in named if name not in tied], tied


def _whole(name: str, param: Tensor, rows: Tensor | Sequence[int] | None) -> RecordedParam:
    indices = None if rows is None else _row_indices(name, param, rows)
    shape = tuple(param.shape) if indices is None else (len(indices), *param.shape[1:])
    return RecordedParam(name, param, indices, indices, shape, (0,) * param.dim())


def named_params(params: Params, model: nn.Module | None) -> list[tuple[str, Tensor]]:
    """Return the parameters that ``params`` stands for, by name; see :func:`select`.

    Raises:
        ConfigError: nothing matches.
    """
    if isinstance(params, Mapping):
        if not params:
            raise ConfigError("params must name at least one parameter, got none")
        return list(params.items())
    patterns = [params] if isinstance(params, str | re.Pattern) else list(params)
    if not patterns:
        raise ConfigError("params must name at least one parameter, got none")
    if model is None:
        raise ConfigError("params are names or patterns, so model= is needed to look them up")
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    everything = [(_without_wrappers(name), param) for name, param in model.named_parameters(remove_duplicate=False)]
    found: dict[str, Tensor] = {}
    for pattern in patterns:
        matches = {name: param for name, param in everything if _matches(pattern, name)}
        trained = {name: param for name, param in matches.items() if param.requires_grad or name == pattern}
        matches = trained or matches
        if not matches:
            text = pattern.pattern if isinstance(pattern, re.Pattern) else pattern
            raise ConfigError(f"params: nothing matches {text!r}; the model has {_listed([n for n, _ in everything])}")
        found |= matches
    return [(name, param) for name, param in everything if name in found]


def _without_wrappers(name: str) -> str:
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _matches(pattern: str | re.Pattern[str], name: str) -> bool:
    if isinstance(pattern, re.Pattern):
        return pattern.fullmatch(name) is not None
    return name == pattern or fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")


def require_supported(optimizers: Sequence[torch.optim.Optimizer], model: nn.Module | None) -> None:
    """Raise ConfigError for optimizers and models that cannot be recorded.

    FullyShardedDataParallel replaces parameters by flat shards of many of them. ZeroRedundancyOptimizer keeps the state
    of only some parameters on each rank.
    """
    params = [p for own in optimizers for group in own.param_groups for p in group["params"]]
    flat = any(getattr(p, "_is_flat_param", False) or getattr(p, "_fsdp_flattened", False) for p in params)
    wrapped = model is not None and any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules())
    if flat or wrapped:
        raise ConfigError(
            "FullyShardedDataParallel keeps flat shards in place of parameters, which cannot be recorded; "
            "use torch.distributed.fsdp.fully_shard"
        )
    for own in optimizers:
        if type(own).__name__ == "ZeroRedundancyOptimizer":
            raise ConfigError(
                "ZeroRedundancyOptimizer keeps the state of only some parameters on each rank, which cannot be "
                "recorded; use the optimizer it wraps, or torch.distributed.fsdp.fully_shard"
            )


def _row_indices(name: str, param: Tensor, rows: Tensor | Sequence[int]) -> Tensor:
    if param.dim() == 0:
        raise ConfigError(f"rows[{name!r}] must be left out: the parameter is a scalar, which has no rows")
    length = len(param)
    rows = torch.as_tensor(rows)
    if rows.dtype == torch.bool:
        if tuple(rows.shape) != (length,):
            raise ConfigError(f"rows[{name!r}] as a mask must have shape [{length}], got {list(rows.shape)}")
        return rows.nonzero()[:, 0].to(param.device)
    if rows.numel() == 0:
        rows = rows.to(torch.int64)
    if rows.dim() != 1 or rows.is_floating_point() or rows.is_complex():
        raise ConfigError(
            f"rows[{name!r}] must be a 1-D sequence of integers, or a mask, got {rows.dtype} {list(rows.shape)}"
        )
    if len(rows) and not (0 <= int(rows.min()) and int(rows.max()) < length):
        raise ConfigError(f"rows[{name!r}] must be 0 to {length - 1}, got {int(rows.min())} to {int(rows.max())}")
    return rows.to(param.device, torch.int64)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
