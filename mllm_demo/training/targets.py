"""Finds the linear layers of a language decoder that get experts, whatever its family calls them.

It knows nothing of configurations beyond their module patterns.
"""

import re
from collections.abc import Sequence

from torch import nn

from mllm_demo.errors import SettingsError

# What computes queries, keys and values, fused or not; an ordinary LoRA serves these better than a choice of experts
# (their outputs of different tokens are compared with each other).
QUERY_KEY_VALUE = (
    "q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "wqkv", "wq", "wk", "wv", "qkv",
    "query", "key", "value",
)  # fmt: skip
# Routers of a base that is a mixture of experts itself: what they choose is not ours to change.
ROUTERS = ("gate", "router", "shared_expert_gate")


def decoder_path(model: nn.Module) -> str:
    """Module path of the language decoder inside `model`; "" when it is `model` itself."""
    decoder = model.get_decoder()
    return next(path for path, module in model.named_modules() if module is decoder)


def linear_names(model: nn.Module) -> list[str]:
    """Last parts of the paths of the linear layers in the decoder's stack of layers, in order."""
    start = decoder_path(model)
    inside = re.compile(rf"{re.escape(start + '.') if start else ''}(?:.*\.)?\d+\.(?:.*\.)?([^.]+)$")
    names = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and (found := inside.match(path)):
            names[found[1]] = None
    return list(names)


def find_targets(
    model: nn.Module, wanted: Sequence[str] | None, plain: Sequence[str] | None, title: str
) -> tuple[str, str | None]:
    """Regular expressions for `target_modules` and `plain_target_modules`, which match in the decoder alone.

    `wanted`, `plain`: names of linear layers; None: every one there is but routers, queries, keys and values plain.

    Raises `SettingsError` naming the layers there are.
    """
    there = linear_names(model)
    if not there:
        raise SettingsError(
            f"{title} has no linear layers in its language decoder that could get experts; choose another base."
        )
    for name in (*(wanted or ()), *(plain or ())):
        if name not in there:
            raise SettingsError(
                f"{title} has no linear layer {name!r} in its language decoder; it has {', '.join(there)}."
            )
    if plain is None:
        plain = [] if wanted else [name for name in there if name in QUERY_KEY_VALUE]
    experts = list(wanted or [name for name in there if name not in (*plain, *ROUTERS)])
    if both := sorted({*experts} & {*plain}):
        raise SettingsError(f"{both[0]} is in --target-modules and in --plain-target-modules; name it in one of them.")
    if not experts:
        raise SettingsError(f"{title} has only {', '.join(there)}; name those that get experts with --target-modules.")
    return _pattern(model, experts), _pattern(model, plain) if plain else None


def _pattern(model: nn.Module, names: Sequence[str]) -> str:
    start = decoder_path(model)
    inside = re.escape(start + ".") if start else ""
    return rf"{inside}(?:.*\.)?\d+\.(?:.*\.)?(?:{'|'.join(map(re.escape, names))})"
