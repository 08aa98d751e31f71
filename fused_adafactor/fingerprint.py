"""Whether two steps concern the same memory.

A prepared step holds what follows from the rules of the groups, from which tensors there are, and
from where and how they lie. A user may change any of that between two steps: replace ``p.data``,
``p.grad``, an entry of the state, a list of parameters or a value of a group. So all of it is
looked at in every step, and compared with what it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor

from fused_adafactor.layouts import are_plain, notes_of, notes_of_state, parts_of
from fused_adafactor.rule import Rule

_NONE = type(None)
_grad, _requires_grad = map(attrgetter, ("grad", "requires_grad"))


class Concern(NamedTuple):
    """What a step concerns, as it is now.

    Attributes:
        params: What is stepped.
        places: Where each is, and its name, which a rule may go by; in any form.
        groups: Those that the parameters are in.
        rules: Theirs.
        state: Of the parameters, and of others where it is not worth the time to choose.
        mirrors: Likewise.
    """

    params: list[Tensor]
    places: Sequence[object]
    groups: Sequence[Mapping[str, Any]]
    rules: Sequence[Rule]
    state: Mapping[Tensor, Any]
    mirrors: Sequence[Tensor]

    def owners(self) -> list[Tensor]:
        """What lies somewhere beside the state: parameters, and what is not theirs alone."""
        shared = [group["step"] for group in self.groups if "step" in group]
        return [*self.params, *shared, *self.mirrors]


class Gradients(NamedTuple):
    """What a step has of gradients.

    Attributes:
        kinds: Type of the gradient of each parameter, that of None where there is none.
        given: Those that there are.
        parts: What this process has of each of them.
    """

    kinds: list[type]
    given: list[Tensor]
    parts: list[Tensor]


def gradients_of(params: Sequence[Tensor]) -> Gradients:
    """The gradients of parameters, as they are now."""
    grads = list(map(_grad, params))
    kinds = list(map(type, grads))
    given = [grad for grad in grads if grad is not None] if _NONE in kinds else grads
    return Gradients(kinds, given, parts_of(given))


class Fingerprint:
    """What a prepared step depends on; where gradients lie is no part of it: most are new.

    Raises:
        RuntimeError: There is something whose memory cannot be told, such as a sparse gradient.
        TypeError: Likewise, such as a number in the state.
    """

    def __init__(self, concern: Concern, grads: Gradients) -> None:
        """Note how everything is."""
        self._facts = _facts(concern, grads)
        self._owners = notes_of(concern.owners(), itself=True)
        self._grads = notes_of(grads.given, itself=False)
        self._state = notes_of_state(concern.state)

    def matches(self, concern: Concern, grads: Gradients) -> bool:
        """Whether nothing has changed.

        Args:
            concern: What there is now.
            grads: Of its parameters.
        """
        try:
            return (
                self._facts == _facts(concern, grads)
                and self._owners.fit(concern.owners())
                and self._grads.fit(grads.given)
                and self._state.fit(concern.state)
            )
        except (RuntimeError, TypeError):
            return False


def fingerprint_of(concern: Concern, grads: Gradients) -> Fingerprint | None:
    """The fingerprint of a step; None where it would not show every change.

    Args:
        concern: The step.
        grads: Of its parameters.
    """
    try:
        return Fingerprint(concern, grads)
    except (RuntimeError, TypeError):
        return None


def _facts(concern: Concern, grads: Gradients) -> tuple[object, ...]:
    """What is compared by value."""
    return (
        concern.places,
        concern.rules,
        [(group["seed"], group["capturable"], group["fused"]) for group in concern.groups],
        grads.kinds,
        # Without a gradient, a distributed one takes part if it wants one.
        None if are_plain(concern.params) else list(map(_requires_grad, concern.params)),
    )
