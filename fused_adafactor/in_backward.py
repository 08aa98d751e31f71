"""Steps in the backward pass: each parameter as its gradient arrives, which is then freed."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from fused_adafactor.compiling import uncompiled
from fused_adafactor.partial import PartialOptimizer, refuse_common_norms
from fused_adafactor.sharding import check_shape
from fused_adafactor.spec import TensorId

# Gradients wait for others until there are so many bytes of them: stepping these takes longer than
# calling a backend does.
BATCH_BYTES = 2**20


# Whose handle steps a parameter: two optimizers cannot.
_stepped_by: MutableMapping[Tensor, weakref.ref[BackwardStep]] = WeakTensorKeyDictionary()


@dataclass
class _Batch:
    """Parameters whose gradients have arrived, in that order, and the bytes of these."""

    params: dict[Tensor, None] = field(default_factory=dict)
    nbytes: int = 0


class BackwardStep:
    """A handle of what ``enable_backward_step`` began. Also a context manager.

    Args:
        optimizer: Whose parameters are stepped.
        model: As in ``enable_backward_step``, which has the errors too.
        on_remove: Called once, when this has ended.
    """

    def __init__(
        self,
        optimizer: PartialOptimizer,
        model: torch.nn.Module | None,
        on_remove: Callable[[], None],
    ) -> None:
        """Check what can be checked, then register the hooks."""
        # The optimizer holds this handle; it must be gone as soon as nobody else holds it.
        self._reference = weakref.ref(optimizer)
        self._on_remove: Callable[[], None] | None = on_remove
        # Several threads may run a backward pass, and a device has a thread of its own.
        self._lock = threading.RLock()
        # What has arrived and was not stepped, by the stream on which the gradients were made.
        self._waiting: dict[torch.cuda.Stream | None, _Batch] = {}
        self._hooks: dict[Tensor, RemovableHandle] = {}
        self._end_is_watched = False
        self._flush = uncompiled(self.flush)
        params = optimizer._all_params()
        if model is not None:
            _check_model(model, params)
        rules = optimizer._rules(range(len(optimizer.param_groups)))
        for param, id in zip(params, optimizer._find(params), strict=True):
            check_shape(id, param, rules[id.group])
            _check_free(id, param)
        self.check_groups(optimizer.param_groups)
        optimizer._refuse_what_joins(rules)
        self.watch()

    @property
    def _optimizer(self) -> PartialOptimizer:
        optimizer = self._reference()
        assert optimizer is not None, "hooks look before they ask"
        return optimizer

    def __enter__(self) -> BackwardStep:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Step in ``step()`` again; gradients that have not been stepped stay where they are.

        Does nothing the second time.
        """
        with self._lock:
            for param, hook in self._hooks.items():
                hook.remove()
                _stepped_by.pop(param, None)
            self._hooks.clear()
            self._waiting.clear()
            optimizer = self._reference()
            if optimizer is not None:
                optimizer._forget_steps()
            if self._on_remove is not None:
                self._on_remove()
                self._on_remove = None

    def check_groups(self, groups: Sequence[Mapping[str, Any]], first: int = 0) -> None:
        """Refuse param groups that cannot be stepped in the backward pass.

        Args:
            groups: With all their keys.
            first: Number of the first of them.

        Raises:
            ValueError: Names the argument and the group.
        """
        refuse_common_norms(groups, first)
        for number, group in enumerate(groups, first):
            if group["fused"]:
                raise ValueError(
                    f"fused=True (param group {number}) takes part in torch's GradScaler, which "
                    "must see all gradients before any is used; gradients that are stepped as they "
                    "arrive are never there together. Use fused=None, and bfloat16 without a scaler"
                )

    def watch(self) -> None:
        """Have a hook on every parameter that there is, and on no other."""
        params = dict.fromkeys(self._optimizer._all_params())
        with self._lock:
            for gone in [param for param in self._hooks if param not in params]:
                self._hooks.pop(gone).remove()
                _stepped_by.pop(gone, None)
            for param in params:
                # Others get no gradient from a backward pass.
                if param not in self._hooks and param.requires_grad and param.is_leaf:
                    hook = param.register_post_accumulate_grad_hook(_hook(self))  # type: ignore[no-untyped-call]
                    self._hooks[param] = hook
                    _stepped_by[param] = weakref.ref(self)

    def flush(self) -> None:
        """Step all that waits."""
        with self._lock, torch.no_grad():
            self._end_is_watched = False
            for stream in list(self._waiting):
                self._step(stream)

    def drop_waiting(self) -> None:
        """Forget gradients that wait, which an error has left there."""
        with self._lock:
            self._waiting.clear()
            self._end_is_watched = False  # an error may have kept the end from coming

    def take(self, param: Tensor) -> None:
        """Take the gradient that a parameter has just got.

        Raises:
            RuntimeError: It has got one before, or cannot be stepped.
        """
        with self._lock, torch.no_grad():
            if param.grad is None or not self._optimizer._owns(param):
                return  # another hook has freed it, or it was taken out of its group
            stepped = self._optimizer._stepped or {}
            if param in stepped or any(param in batch.params for batch in self._waiting.values()):
                (id,) = self._optimizer._find([param])
                raise RuntimeError(
                    f"{id} got a second gradient before step() was called, but it is stepped in "
                    "the backward pass, with the first. Call step() after every backward(); to "
                    "accumulate gradients, give the optimizer gradient_accumulation_steps; where "
                    "several checkpoints share a parameter, use checkpoint(use_reentrant=False)"
                )
            stream = _stream_of(param)
            batch = self._waiting.setdefault(stream, _Batch())
            batch.params[param] = None
            batch.nbytes += param.grad.numel() * param.grad.element_size()
            if batch.nbytes >= BATCH_BYTES:
                self._step(stream)
            elif not self._end_is_watched:
                self._watch_end()

    def _watch_end(self) -> None:
        """Have ``flush`` called at the end of the backward pass; otherwise ``step()`` does it."""
        queue = getattr(Variable._execution_engine, "queue_callback", None)
        if queue is not None:
            queue(self._flush)
            self._end_is_watched = True

    def _step(self, stream: torch.cuda.Stream | None) -> None:
        """Step what waits, on the stream that has made its gradients, and free these."""
        # In the order of the optimizer, so that the same batch is known whatever came first.
        waiting = list(self._waiting[stream].params)
        ids = self._optimizer._find(waiting)
        order = sorted(range(len(waiting)), key=lambda place: ids[place].index)
        with _on(stream):
            self._optimizer._step_some([waiting[place] for place in order])
        for param in waiting:
            param.grad = None
        del self._waiting[stream]


def _hook(handle: BackwardStep) -> Callable[[Tensor], None]:
    """A hook that does not keep the optimizer alive."""
    reference = weakref.ref(handle)

    def step_in_backward(param: Tensor) -> None:
        alive = reference()
        if alive is not None and alive._reference() is not None:
            alive.take(param)

    return uncompiled(step_in_backward)  # a compiled function may call backward()


def _stream_of(param: Tensor) -> torch.cuda.Stream | None:
    """The stream on which a hook of this parameter runs, and its gradient was made."""
    return torch.cuda.current_stream(param.device) if param.device.type == "cuda" else None


@contextlib.contextmanager
def _on(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Run on a stream, which the current one then waits for."""
    if stream is None:
        yield
        return
    current = torch.cuda.current_stream(stream.device)
    with torch.cuda.stream(stream):
        yield
    if current != stream:
        current.wait_stream(stream)


def _check_model(model: torch.nn.Module, params: Sequence[Tensor]) -> None:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.parallel.DistributedDataParallel):
            raise RuntimeError(
                f"{f'module {name!r} of the model' if name else 'the model'} is wrapped in "
                "DistributedDataParallel, which sums the gradients of all ranks after they have "
                "arrived: stepped before that, the ranks would drift apart. Call step() alone"
            )
    ours = set(params)
    if not any(param in ours for param in model.parameters()):
        raise ValueError(
            "model has none of the optimizer's parameters; give the model that it trains, or None"
        )


def _check_free(id: TensorId, param: Tensor) -> None:
    """Refuse a parameter that another handle steps."""
    reference = _stepped_by.get(param)
    other = None if reference is None else reference()
    if other is not None and other._reference() is not None:
        raise RuntimeError(
            f"{id} is stepped in the backward pass already, by another optimizer; call remove() of "
            "the handle that its enable_backward_step returned first"
        )
