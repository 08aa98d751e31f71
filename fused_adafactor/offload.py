"""CPUOffload: parameters on a device; master weights, optimizer state and the step on the CPU.

A step, tensor by tensor: the gradient is copied to the host, the step there updates the master and
writes its mirror, the new parameter as the device has it, which is copied back. Copies of some
tensors run while others are stepped.

A master only adds bits to its parameter. Where the parameter is not what its master rounds to,
somebody has changed it, and the master starts from it anew.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, StateDict
from typing_extensions import override

from fused_adafactor.checkpoint import hooked_load, ids_of, without_functions
from fused_adafactor.counting import Cells
from fused_adafactor.fingerprint import Fingerprint, fingerprint_of, gradients_of
from fused_adafactor.joining import joins
from fused_adafactor.metrics import Metrics
from fused_adafactor.optimizer import AdafactorBase
from fused_adafactor.rounding import Rounding, is_rounding_of
from fused_adafactor.spec import DTYPES, TensorId, check_kinds, local_of, spec_of
from fused_adafactor.transfers import Lane, Pair, host_memory, wait_for

MASTER = "master"  # its key in the state of a parameter
_BATCH_BYTES = 32 * 2**20  # of gradients that are stepped while others are copied


class CPUOffload(torch.optim.Optimizer):
    """An Adafactor whose weights of full precision, state and step are on the CPU.

    It is used as any optimizer over the model's parameters, which stay where they are, in the
    dtype that they have. Param groups, schedulers, closures, hooks and state dicts work as usual.
    A step waits for the gradients, not for the new weights: the device is told to.

    Args:
        params: Parameters of any device, named parameters, or param groups.
        optimizer_class: A dialect, such as ``fused_adafactor.Adafactor``.
        offload_gradients: Copy every gradient to the host as soon as it is complete and free it on
            the device (``.grad`` is None after ``backward()``). Several backward passes add up on
            the host until ``step()``, which leaves none, or ``zero_grad()`` of this optimizer.
            What looks at ``.grad`` finds nothing: clip with ``max_grad_norm``.
        master_dtype: Of the master weights; None for float32 (float64 for float64 parameters).
        **kwargs: Of the dialect, for all param groups. ``rounding="stochastic"`` is how bfloat16
            parameters are rounded from their masters.

    Raises:
        RuntimeError: A parameter is complex, or on the meta device.
        TypeError: A class that is no dialect; a parameter of a dtype that is not stepped, or a
            DTensor.
        ValueError: An argument out of range, by the dialect's own check.

    A parameter that you change yourself (load weights, clamp, swap in an average) is noticed by
    its version at the next ``step()``, and what is different there goes into the master. Changes
    through ``.data`` have no version: call ``sync_from_parameters()`` after them.

    A parameter or a group that you take out of ``param_groups`` is let go, with its master and its
    state, at the next ``step()``. ``optimizer.state = defaultdict(dict)`` starts anew from the
    masters as they are; to add a parameter, call ``add_param_group``.
    """

    def __init__(
        self,
        params: ParamsT,
        optimizer_class: type[AdafactorBase],
        *,
        offload_gradients: bool = False,
        master_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> None:
        """Make the masters, and the optimizer over them."""
        if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, AdafactorBase)):
            raise TypeError(
                "optimizer_class must be a dialect, such as fused_adafactor.Adafactor, got "
                f"{optimizer_class!r}; its step must know of mirrors, as those of others do not"
            )
        if master_dtype is not None and master_dtype not in DTYPES:
            raise TypeError(
                "master_dtype must be None, torch.float32, torch.float64, torch.bfloat16 or "
                f"torch.float16, got {master_dtype!r}"
            )
        self._pairs: dict[Tensor, Pair] = {}
        # To the host, and back.
        self._lanes: dict[torch.device, tuple[Lane, Lane]] = {}
        self._checked: Fingerprint | None = None
        self._inner: AdafactorBase | None = None
        self.offload_gradients, self.master_dtype = offload_gradients, master_dtype
        super().__init__(params, {})
        groups = [self._mastered(group, group) for group in self.param_groups]
        self._inner = optimizer_class(groups, **kwargs)
        self.defaults = self._inner.defaults
        self._make_mirrors()
        self._show_groups()

    # --- param groups -----------------------------------------------------------------------------

    @property
    def _host(self) -> AdafactorBase:
        """The optimizer on the CPU."""
        assert self._inner is not None
        return self._inner

    @override
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group; see ``torch.optim.Optimizer.add_param_group``.

        Raises:
            RuntimeError: A parameter is complex, or on the meta device.
            TypeError: A parameter of a dtype that is not stepped, or a DTensor.
            ValueError: A hyperparameter of the group is out of range.
        """
        if self._inner is not None:
            self._send()
        # The defaults are the dialect's to add, which also knows other names for its keys.
        keys = list(param_group) if isinstance(param_group, dict) else []
        super().add_param_group(param_group)
        before = dict(self._pairs)
        try:
            for _, param, id in ids_of(self.param_groups):
                if param not in self._pairs:
                    self._check_param(id, param)
            if self._inner is not None:
                self._inner.add_param_group(self._mastered(self.param_groups[-1], keys))
                self._make_mirrors()
                self._show_groups(first=len(self.param_groups) - 1)
        except BaseException:
            self.param_groups.pop()
            self._pairs = before
            if self._inner is not None:
                del self._inner.param_groups[len(self.param_groups) :]
            raise

    def _check_param(self, id: TensorId, param: Tensor) -> None:
        check_kinds(id, param, param)
        if local_of(param) is not param:
            raise TypeError(
                f"{id} is a DTensor, of which CPUOffload makes no masters. Let FSDP2 keep its "
                "parts on the CPU, fully_shard(..., offload_policy=CPUOffloadPolicy()), and give "
                "the parameters to the dialect itself"
            )
        if param.is_meta:
            raise RuntimeError(
                f"{id} is on the meta device and has no values; materialize it before it is "
                "offloaded"
            )

    def _mastered(self, group: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
        """These keys of a param group, and the masters of its parameters, made if need be."""
        masters: list[Any] = [self._master_of(param) for param in group["params"]]
        own = {key: group[key] for key in keys if key not in ("params", "param_names")}
        if "param_names" in group:
            masters = list(zip(group["param_names"], masters, strict=True))
        return {**own, "params": masters}

    def _master_of(self, param: Tensor) -> Tensor:
        if param in self._pairs:
            return self._pairs[param].master
        usual = torch.float64 if param.dtype is torch.float64 else torch.float32
        values = param.detach()
        master = torch.empty_like(values, dtype=self.master_dtype or usual, device="cpu")
        master.copy_(values)
        self._pair(param, torch.nn.Parameter(master, requires_grad=True))
        return self._pairs[param].master

    def _pair(self, param: Tensor, master: Tensor) -> None:
        master.grad_dtype = None  # it takes gradients as they come
        self._pairs[param] = Pair(param=param, master=master)
        if self.offload_gradients and param.requires_grad:
            self._move_gradients_of(param)

    def _move_gradients_of(self, param: Tensor) -> None:
        me = weakref.ref(self)  # an optimizer that is gone moves nothing

        def move(param: Tensor) -> None:
            optimizer, grad = me(), param.grad
            if optimizer is None or param not in optimizer._pairs or grad is None:
                return
            if grad.layout is not torch.strided:
                return  # it stays, and step() says what is wrong with it
            lane, _ = optimizer._lanes_of(param)
            lane.follow()
            optimizer._pairs[param].collect(lane, adds=True)
            param.grad = None

        param.register_post_accumulate_grad_hook(move)  # type: ignore[no-untyped-call]

    def _make_mirrors(self) -> None:
        """Give every new pair its mirror, laid out as the CPU's optimizer will write it."""
        for (_, param, _), (own, master, id) in zip(
            ids_of(self.param_groups), self._host._ids(), strict=True
        ):
            pair = self._pairs[param]
            if pair.mirror is None:
                rule = self._host._param_rule(self._host._rule(own), id, master)
                strides = spec_of(id, master, master, rule).state_strides
                pair.mirror = host_memory(param.shape, strides, param.dtype, param.device)
        self._send_mirrors()

    def _send_mirrors(self) -> None:
        mirrors = {pair.master: pair.mirror for pair in self._pairs.values()}
        self._host._mirrors = {m: mirror for m, mirror in mirrors.items() if mirror is not None}

    def _send(self) -> None:
        """Tell the CPU's optimizer what the user has made of the param groups and of the state.

        Raises:
            ValueError: A group or a parameter that nobody has added.
        """
        groups, host = self.param_groups, self._host
        present = dict.fromkeys(chain.from_iterable(group["params"] for group in groups))
        if len(groups) > len(host.param_groups) or any(
            param not in self._pairs for param in present
        ):
            raise ValueError(
                "param_groups has groups or parameters that have no master; add them by "
                "add_param_group"
            )
        gone = [pair for param, pair in self._pairs.items() if param not in present]
        for pair in gone:
            del self._pairs[pair.param]
            self.state.pop(pair.param, None)
            host.state.pop(pair.master, None)
        if gone:
            self._send_mirrors()
        del host.param_groups[len(groups) :]
        for group, own in zip(groups, host.param_groups, strict=True):
            for key, value in self.defaults.items():
                group.setdefault(key, value)  # as the dialect completes a group that was replaced
            own.update({key: _on_host(value) for key, value in group.items()})
            own["params"] = [self._pairs[param].master for param in group["params"]]
        for param, pair in self._pairs.items():
            if self.state.get(param):
                host.state[pair.master] = self.state[param]
            else:
                host.state.pop(pair.master, None)

    def _show_groups(self, first: int = 0) -> None:
        """Let our param groups be those of the CPU's optimizer, but for their parameters.

        Args:
            first: Number of the first of them.
        """
        groups, owns = self.param_groups[first:], self._host.param_groups[first:]
        for group, own in zip(groups, owns, strict=True):
            params = group["params"]
            group.clear()
            group.update({**own, "params": params})

    def _show_state(self) -> None:
        """Show the state and the counters of the CPU's optimizer as those of the parameters."""
        for group, own in zip(self.param_groups, self._host.param_groups, strict=True):
            if "step" in own:
                group["step"] = own["step"]
        for param, pair in self._pairs.items():
            kept = self._host.state.get(pair.master)
            if kept:
                if MASTER not in kept:
                    kept[MASTER] = pair.master.detach()
                self.state[param] = kept

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        if name == "step":  # that is a scheduler
            try:
                self._send()
                self._host._check_schedulable()
            except ValueError:
                for group in self.param_groups:
                    group.pop("initial_lr", None)
                raise
        super().__setattr__(name, value)

    # --- steps ------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @override
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one optimization step.

        Args:
            closure: Re-evaluates the model with gradients enabled and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: torch's GradScaler is at work, and gradients are offloaded; or as the
                ``step`` of the dialect.
            TypeError: As that.
            ValueError: As that. Nothing has been changed then.
        """
        if self.offload_gradients and hasattr(self, "found_inf"):
            raise RuntimeError(
                "torch's GradScaler looks for Inf in .grad, and offload_gradients=True has moved "
                "the gradients away. Use offload_gradients=False, or train in bfloat16 without it"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._send()
        pairs = self._gather()
        try:
            for pair in pairs:
                pair.master.grad = pair.grad
            self._check()
            self._sync([pair for pair in self._pairs.values() if pair.has_changed])
            self._step_on_host(pairs)
        finally:
            for pair in pairs:
                pair.master.grad = None
                pair.has_grad = pair.has_grad and self.offload_gradients  # else .grad has it
            for _, lane in self._lanes.values():
                lane.lead()
            self._show_state()
        return loss

    def _gather(self) -> list[Pair]:
        """Begin to copy the gradients that are still on their devices; the pairs that have one."""
        pairs = [pair for pair in self._pairs.values() if pair.param.grad is not None]
        for _, param, id in ids_of(self.param_groups):
            if param.grad is not None:
                check_kinds(id, param, param.grad)
        for pair in self._pairs.values():
            self._lanes_of(pair.param)
        for lanes in self._lanes.values():
            for lane in lanes:
                lane.follow()
        for pair in pairs:
            pair.collect(self._lanes_of(pair.param)[0], adds=self.offload_gradients)
            if self.offload_gradients:
                pair.param.grad = None
        return [pair for pair in self._pairs.values() if pair.has_grad]

    def _check(self) -> None:
        """Check a step of all before any is stepped, unless nothing has changed since the last."""
        host = self._host
        rules = host._rules(range(len(host.param_groups)))
        concern = host._concern(rules, None)
        grads = gradients_of(concern.params)
        if (
            self._checked is None
            or not self._checked.matches(concern, grads)
            or not all(map(_is_count, Cells(self._counters()).read()))  # it sees no values
        ):
            host._draft(rules, host._ids())
            self._checked = fingerprint_of(concern, grads)

    def _counters(self) -> list[Tensor]:
        """The step counters that parameters have of their own."""
        key = self._host.layout.step
        return [kept[key] for kept in self._host.state.values() if key in kept]

    def _step_on_host(self, pairs: Sequence[Pair]) -> None:
        """Step the masters, batch by batch, and send their mirrors."""
        host = self._host
        rules = list(host._rules(range(len(host.param_groups))).values())
        found_inf, grad_scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        rest = [pair for pair in self._pairs.values() if not pair.has_grad]
        if pairs and found_inf is None and not joins(rules) and any(host.state.values()):
            for batch in _batches(pairs):
                self._await(batch)
                host._step_some([pair.master for pair in batch])
                self._return(batch)
                _use_up(batch)
            self._await(rest)
            host._finish_call()
            self._return(rest)
            return
        # What has to be known of all tensors together, or is a first step, is one batch. So is a
        # call without gradients, which does nothing.
        self._await(self._pairs.values())
        if found_inf is not None:  # the gradients are waited for anyway, so are these
            scale = None if grad_scale is None else torch.as_tensor(grad_scale).cpu()
            vars(host).update(found_inf=torch.as_tensor(found_inf).cpu(), grad_scale=scale)
        try:
            host._step_all()
        finally:
            for name in ("found_inf", "grad_scale"):
                vars(host).pop(name, None)
        self._return(self._pairs.values())
        _use_up(pairs)

    def _await(self, pairs: Iterable[Pair]) -> None:
        """Gradients have come, and mirrors may be written again."""
        for pair in pairs:
            pair.settle()
            wait_for(pair.sent)
            pair.sent = None

    def _return(self, pairs: Iterable[Pair]) -> None:
        """Begin to copy to the device what was written."""
        for pair in pairs:
            if pair.master._version != pair.stepped:
                assert pair.mirror is not None
                _, lane = self._lanes_of(pair.param)
                lane.copy(pair.param, pair.mirror)
                pair.sent = lane.mark()
                pair.note()

    def _lanes_of(self, param: Tensor) -> tuple[Lane, Lane]:
        """To the host, and back, for the device that a parameter is on."""
        if param.device not in self._lanes:
            self._lanes[param.device] = Lane(param.device), Lane(param.device)
        return self._lanes[param.device]

    @override
    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients, those on the host too."""
        super().zero_grad(set_to_none)
        for pair in self._pairs.values():
            pair.has_grad = False

    @torch.no_grad()
    def sync_from_parameters(self) -> None:
        """Let the masters follow parameters that were changed where no version tells, in ``.data``.

        A master stays as it is, element by element, where its parameter is what it rounds to.
        Waits for the device.
        """
        self._send()
        self._sync(self._pairs.values())

    def _sync(self, pairs: Iterable[Pair]) -> None:
        changed = {id(pair): pair for pair in pairs}
        if not changed:
            return
        for group in self.param_groups:
            rounding = Rounding.parse(group["rounding"])
            for param in group["params"]:
                pair = changed.pop(id(self._pairs[param]), None)
                if pair is not None:
                    assert pair.mirror is not None
                    wait_for(pair.sent)
                    pair.mirror.copy_(param)
                    kept = is_rounding_of(pair.mirror, pair.master, rounding)
                    pair.master.copy_(torch.where(kept, pair.master, pair.mirror))
                    pair.note()

    @torch.no_grad()
    def finalize_variable_values(self, var_list: Iterable[Tensor] | None = None) -> None:
        """Write the averages of use_ema to the masters and the parameters.

        Args:
            var_list: These parameters only; None for all.

        Raises:
            ValueError: A parameter that is not this optimizer's.
        """
        self._send()
        params = list(self._pairs) if var_list is None else list(var_list)
        known = [self._pairs[param] for param in params if param in self._pairs]
        masters = {pair.param: pair.master for pair in known}
        self._host.finalize_variable_values([masters.get(param, param) for param in params])
        written = [pair for pair in known if pair.master._version != pair.stepped]
        for pair in written:
            wait_for(pair.sent)
            assert pair.mirror is not None
            pair.mirror.copy_(pair.master)
            self._lanes_of(pair.param)[1].follow()
        self._return(written)
        for pair in written:
            self._lanes_of(pair.param)[1].lead()

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of all gradients together at the last update; see the dialect's ``grad_norm``."""
        return self._host.grad_norm

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # Read by torch's GradScaler.
        return any(group.get("fused") for group in self.param_groups)

    def explain(self) -> str:
        """The plan of the step on the CPU as a table; see the dialect's ``explain``."""
        self._send()
        return self._host.explain()

    def metrics(self) -> dict[str, Metrics]:
        """What the last update of each master has found out; see the dialect's ``metrics``."""
        return self._host.metrics()

    # --- copies and state dicts -------------------------------------------------------------------

    @override
    def state_dict(self) -> StateDict:
        """The dialect's state dict, with the master of each parameter in its state.

        It is on the CPU. There are no masters before the first step, as they add nothing yet.
        """
        return without_functions(super().state_dict())

    @override
    @torch.no_grad()
    def load_state_dict(self, state_dict: StateDict) -> None:
        """Load a state dict of this optimizer, of the dialect, or of its peer.

        Where it has no masters, they are taken from the parameters. Where a parameter is not what
        its master rounds to, once the model is loaded too, before or after this, the parameter is
        right.

        Args:
            state_dict: From ``state_dict()``.

        Raises:
            ValueError: Groups, state or masters that do not fit; nothing has been changed then.
        """

        def load(_: torch.optim.Optimizer, loaded: StateDict) -> StateDict:
            self._load_host(loaded)
            return {**loaded, "state": {}}  # the base class would move it all to the device

        def restore(_: torch.optim.Optimizer) -> None:
            self._show_groups()
            self._show_state()

        with hooked_load(self, load, restore):
            super().load_state_dict(state_dict)

    def _load_host(self, loaded: StateDict) -> None:
        self._send()
        masters = {n: s[MASTER] for n, s in loaded["state"].items() if MASTER in s}
        state = {
            number: {key: value for key, value in kept.items() if key != MASTER}
            for number, kept in loaded["state"].items()
        }
        numbers = [number for group in loaded["param_groups"] for number in group["params"]]
        places = list(zip(numbers, ids_of(self.param_groups), strict=False))
        for number, (_, param, id) in places:
            value = masters.get(number)
            if value is None:
                continue
            if not isinstance(value, Tensor) or value.shape != param.shape:
                shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"the loaded master of {id} is {shape}; expected a tensor of shape "
                    f"{tuple(param.shape)}. Is this the checkpoint of another model?"
                )
        self._host.load_state_dict({**loaded, "state": state})
        self._checked = None
        for number, (_, param, _) in places:
            pair = self._pairs[param]
            pair.master.copy_(masters.get(number, param))
            pair.seen = None  # the model may be loaded before or after this

    @override
    def __getstate__(self) -> dict[str, Any]:
        self._send()
        own = ("_inner", "offload_gradients", "master_dtype")
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in own}}

    @override
    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_inner" not in state:
            return  # load_state_dict
        self._pairs, self._lanes, self._checked = {}, {}, None
        for group, own in zip(self.param_groups, self._host.param_groups, strict=True):
            for param, master in zip(group["params"], own["params"], strict=True):
                if param not in self._pairs:
                    self._pair(param, master)
                    kept = self._host.state.get(master)
                    if kept:
                        kept[MASTER] = master.detach()  # a copy of the old one's is none of this
        self._make_mirrors()


def _use_up(pairs: Iterable[Pair]) -> None:
    """Their gradients have been stepped with, and never are again."""
    for pair in pairs:
        pair.has_grad = False


def _batches(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    """Pairs in their order, as many together as there are bytes of gradients in a batch."""
    batch: list[Pair] = []
    size = 0
    for pair in pairs:
        batch.append(pair)
        size += 0 if pair.grad is None else pair.grad.nbytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _is_count(value: float) -> bool:
    return 0 <= value < math.inf and not value % 1


def _on_host(value: Any) -> Any:
    """A hyperparameter as the CPU's optimizer reads it: a tensor lr may be on the device."""
    return value.cpu() if isinstance(value, Tensor) else value
