"""The installed peers behind one face, for parity tests.

`make_peer(name, params, **kwargs)` copies `params` (torch tensors), builds the peer's optimizer
with its own constructor arguments and returns an object with `step(grads)` and `params()`. A peer
is imported when it is first asked for; one that is not installed skips the test and says what is
missing, or fails it where FUSED_ADAFACTOR_REQUIRE_PEERS=1 says that everything is installed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

Grads = Sequence[Tensor | None]
REQUIRED = "FUSED_ADAFACTOR_REQUIRE_PEERS"


def missing(reason: str) -> NoReturn:
    """Skips the running test, or the module being imported, for want of something installed.

    Where `REQUIRED` is 1 it fails: an environment that lost a peer would else pass every test.
    """
    if os.environ.get(REQUIRED) == "1":
        pytest.fail(f"{reason} ({REQUIRED}=1: nothing may be missing)", pytrace=False)
    pytest.skip(reason, allow_module_level=True)


def require_module(name: str) -> types.ModuleType:
    """The module `name`, by `missing` where it cannot be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what its own imports say is not about our code
            return importlib.import_module(name)
    except ImportError as error:
        missing(f"needs the module {name}: {error}")


class TorchPeer:
    """A peer that is a torch.optim.Optimizer: torch, transformers, timm, pytorch_optimizer."""

    def __init__(self, optimizer_class: type, params: Sequence[Tensor], **kwargs: Any) -> None:
        self._params = [torch.nn.Parameter(p.detach().clone()) for p in params]
        self.optimizer = optimizer_class(self._params, **kwargs)

    def step(self, grads: Grads) -> None:
        """One step; the gradients are copied because some peers write to them."""
        for p, g in zip(self._params, grads, strict=True):
            p.grad = None if g is None else g.detach().to(p.dtype, copy=True)
        self.optimizer.step()

    def params(self) -> list[Tensor]:
        """Copies of the parameters."""
        return [p.detach().clone() for p in self._params]


class KerasPeer:
    """keras.optimizers.Adafactor on Keras' torch backend.

    `learning_rate` may be a callable of the number of earlier `apply` calls; `decay_mask` (False =
    excluded) goes to `exclude_from_weight_decay`.
    """

    def __init__(
        self,
        keras: types.ModuleType,
        params: Sequence[Tensor],
        *,
        decay_mask: Sequence[bool] | None = None,
        **kwargs: Any,
    ) -> None:
        self._keras = keras
        dtypes = [str(p.dtype).removeprefix("torch.") for p in params]
        self._variables = [
            keras.Variable(p.detach().cpu().numpy(), dtype=dtype)
            for p, dtype in zip(params, dtypes, strict=True)
        ]
        if callable(kwargs.get("learning_rate")):
            kwargs["learning_rate"] = _keras_schedule(keras, kwargs["learning_rate"])
        self.optimizer = keras.optimizers.Adafactor(**kwargs)
        if decay_mask is not None:
            excluded = [
                v for v, decays in zip(self._variables, decay_mask, strict=True) if not decays
            ]
            self.optimizer.exclude_from_weight_decay(var_list=excluded)
        self.optimizer.build(self._variables)

    def step(self, grads: Grads) -> None:
        """One `apply`; Keras warns about a gradient of None, which is meant here."""
        convert = self._keras.ops.convert_to_tensor
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Gradients do not exist")
            self.optimizer.apply(
                [None if g is None else convert(g.cpu().numpy()) for g in grads], self._variables
            )

    def finalize(self) -> None:
        """`finalize_variable_values`, which Keras' fit calls at the end of training."""
        self.optimizer.finalize_variable_values(self._variables)

    def params(self) -> list[Tensor]:
        """Copies of the variables."""
        return [v.value.detach().cpu().clone() for v in self._variables]


class OptaxPeer:
    """optax.adafactor; float64 parameters run with 64-bit JAX, switched on for the calls here only.

    A callable `learning_rate` takes the number of earlier updates. No gradient may be None.
    """

    def __init__(
        self,
        jax: types.ModuleType,
        optax: types.ModuleType,
        params: Sequence[Tensor],
        **kwargs: Any,
    ) -> None:
        self._jax, self._optax = jax, optax
        self._x64 = any(p.dtype == torch.float64 for p in params)
        if isinstance(kwargs.get("dtype_momentum"), torch.dtype):
            kwargs["dtype_momentum"] = str(kwargs["dtype_momentum"]).removeprefix("torch.")
        if kwargs.get("weight_decay_mask") is not None:
            kwargs["weight_decay_mask"] = list(kwargs["weight_decay_mask"])
        with jax.enable_x64(self._x64):
            self._params = [self._to_jax(p) for p in params]
            self._transform = optax.adafactor(**kwargs)
            self._state = self._transform.init(self._params)

    def step(self, grads: Grads) -> None:
        """One update, applied."""
        with self._jax.enable_x64(self._x64):
            updates, self._state = self._transform.update(
                [self._to_jax(g) for g in grads], self._state, self._params
            )
            self._params = self._optax.apply_updates(self._params, updates)

    def params(self) -> list[Tensor]:
        """Copies of the parameters."""
        to_numpy = self._jax.device_get
        return [torch.tensor(to_numpy(p)) for p in self._params]

    def _to_jax(self, x: Tensor | None) -> Any:
        if x is None:
            raise ValueError("optax takes no gradient of None")
        return self._jax.numpy.asarray(x.detach().cpu().numpy())


def _load_torch() -> Callable[..., TorchPeer]:
    optimizer_class = _attribute("torch.optim", "Adafactor")
    return lambda params, **kwargs: TorchPeer(optimizer_class, params, foreach=False, **kwargs)


def _load_torch_foreach() -> Callable[..., TorchPeer]:
    optimizer_class = _attribute("torch.optim", "Adafactor")
    return lambda params, **kwargs: TorchPeer(optimizer_class, params, foreach=True, **kwargs)


def _load_hf() -> Callable[..., TorchPeer]:
    optimizer_class = _attribute("transformers.optimization", "Adafactor")
    return lambda params, **kwargs: TorchPeer(optimizer_class, params, **kwargs)


def _load_pytorch_optimizer() -> Callable[..., TorchPeer]:
    optimizer_class = _attribute("pytorch_optimizer", "AdaFactor")
    return lambda params, **kwargs: TorchPeer(optimizer_class, params, **kwargs)


def _load_big_vision() -> Callable[..., TorchPeer]:
    with _bare_timm():
        optimizer_class = _attribute("timm.optim.adafactor_bv", "AdafactorBigVision")
    return lambda params, **kwargs: TorchPeer(optimizer_class, params, **kwargs)


def _load_keras() -> Callable[..., KerasPeer]:
    if "keras" not in sys.modules:
        os.environ["KERAS_BACKEND"] = "torch"
    keras = require_module("keras")
    if keras.backend.backend() != "torch":
        missing("keras was imported before with another backend; set KERAS_BACKEND=torch")
    return lambda params, **kwargs: KerasPeer(keras, params, **kwargs)


def _load_optax() -> Callable[..., OptaxPeer]:
    jax, optax = require_module("jax"), require_module("optax")
    return lambda params, **kwargs: OptaxPeer(jax, optax, params, **kwargs)


_LOADERS: dict[str, Callable[[], Callable[..., Any]]] = {
    "torch": _load_torch,
    "torch_foreach": _load_torch_foreach,
    "hf": _load_hf,
    "keras": _load_keras,
    "optax": _load_optax,
    "big_vision": _load_big_vision,
    "pytorch_optimizer": _load_pytorch_optimizer,
}
PEER_NAMES = tuple(_LOADERS)


def require_peer(name: str) -> Callable[..., Any]:
    """The factory of peer `name`; `missing` where it is not installed."""
    return _LOADERS[name]()


def make_peer(name: str, params: Sequence[Tensor], **kwargs: Any) -> Any:
    """A peer of `PEER_NAMES` on copies of `params`, with the peer's own constructor arguments.

    Returns an object with `step(grads)` (None where the peer allows it), `params()` -> list of
    torch tensors, `optimizer` (the peer's own, not for optax), and for Keras `finalize()`.
    """
    return require_peer(name)(params, **kwargs)


def _attribute(module: str, name: str) -> Any:
    found = getattr(require_module(module), name, None)
    if found is None:
        missing(f"needs {module}.{name}, which this version does not have")
    return found


@contextlib.contextmanager
def _bare_timm() -> Iterator[None]:
    """`timm` and `timm.optim` as packages whose `__init__` has not run: that imports torchvision.

    What was imported under those names before is put back afterwards.
    """
    spec = importlib.util.find_spec("timm")
    if spec is None or not spec.submodule_search_locations:
        missing("needs the module timm")
    root = next(iter(spec.submodule_search_locations))
    before = _take_out_of_sys_modules("timm")
    for name, path in (("timm", root), ("timm.optim", os.path.join(root, "optim"))):
        package = types.ModuleType(name)
        package.__path__ = [path]
        sys.modules[name] = package
    try:
        yield
    finally:
        _take_out_of_sys_modules("timm")
        sys.modules.update(before)


def _take_out_of_sys_modules(package: str) -> dict[str, types.ModuleType]:
    names = [name for name in sys.modules if name == package or name.startswith(package + ".")]
    return {name: sys.modules.pop(name) for name in names}


def _keras_schedule(keras: types.ModuleType, rate: Callable[[int], float]) -> Any:
    class Schedule(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step: Any) -> float:
            return rate(int(step))

        def get_config(self) -> dict[str, Any]:
            return {}

    return Schedule()
