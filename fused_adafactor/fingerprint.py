"""Whether two steps concern the same memory, found out with a few loops in C.

A prepared step holds what follows from the rules of the groups, from which tensors there are, and
from where and how they lie. A user may change any of that between two steps: replace ``p.data``,
``p.grad``, an entry of the state, a list of parameters or a value of a group. So all of it is
looked at in every step, and compared with what it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain, compress, repeat
from operator import attrgetter, is_, is_not
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_adafactor.rule import Rule
from fused_adafactor.spec import local_of

_PLAIN = {Tensor, torch.nn.Parameter}
_grad, _dtype, _requires_grad = map(attrgetter, ("grad", "dtype", "requires_grad"))


class Fingerprint(NamedTuple):
    """What a prepared step depends on.

    Attributes:
        objects: Compared by identity: tensors with equal values are not the same memory.
        facts: Compared by value.
    """

    objects: list[object]
    facts: tuple[object, ...]

    def matches(self, other: Fingerprint) -> bool:
        """Whether nothing has changed."""
        return (
            len(self.objects) == len(other.objects)
            and all(map(is_, self.objects, other.objects))
            and self.facts == other.facts
        )


def fingerprint_of(
    params: Sequence[Tensor],
    places: Sequence[object],
    groups: Sequence[Mapping[str, Any]],
    rules: Sequence[Rule],
    state: Mapping[Tensor, Any],
    mirrors: Sequence[Tensor],
) -> tuple[Fingerprint, list[Tensor]] | None:
    """The fingerprint of a step, and the gradients that there are.

    Where gradients lie is not part of it: most steps have new ones.

    Args:
        params: What is stepped.
        places: Where each is, and its name, which a rule may go by; in any form.
        groups: Those that the parameters are in.
        rules: Theirs.
        state: Of the parameters, and of others where it is not worth the time to choose.
        mirrors: Likewise.

    Returns:
        None if there is anything whose memory cannot be told, such as a sparse gradient or a number
        in the state.
    """
    grads = list(map(_grad, params))
    given = list(map(is_not, grads, repeat(None)))
    grads = list(compress(grads, given))
    here, given_here = _parts(params), _parts(grads)
    kept = list(chain.from_iterable(map(dict.values, state.values())))
    shared = [group["step"] for group in groups if "step" in group]
    try:
        facts = (
            places,
            rules,
            [(g["seed"], g["capturable"], g["fused"]) for g in groups],
            given,
            # Where a parameter is tells on which device, and torch holds a gradient to both.
            list(map(Tensor.data_ptr, here)),
            list(map(Tensor.size, params)),
            list(map(Tensor.stride, here)),
            list(map(_dtype, params)),
            list(map(type, params)),
            list(map(Tensor.numel, grads)),
            list(map(Tensor.stride, given_here)),  # a sparse one raises
            list(map(_dtype, grads)),
            list(map(type, grads)),
            _placements(params),
            _placements(grads),
            list(chain.from_iterable(state.values())),
            list(map(Tensor.data_ptr, _parts([*kept, *shared, *mirrors]))),
            # Without a gradient, a distributed one takes part if it wants one.
            None if _are_plain(params) else list(map(_requires_grad, params)),
        )
    except (RuntimeError, TypeError):
        return None
    return Fingerprint([*params, *state, *kept, *shared, *mirrors], facts), given_here


def _placements(tensors: Sequence[Tensor]) -> list[object] | None:
    """How distributed tensors are distributed; None where there is none."""
    if set(map(type, tensors)) <= _PLAIN:
        return None
    names = ("placements", "device_mesh")
    return [tuple(getattr(tensor, name, None) for name in names) for tensor in tensors]


def _parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """What this process has of each: a distributed tensor has no address of its own."""
    return list(tensors) if _are_plain(tensors) else list(map(local_of, tensors))


def _are_plain(tensors: Sequence[Tensor]) -> bool:
    return set(map(type, tensors)) <= _PLAIN
