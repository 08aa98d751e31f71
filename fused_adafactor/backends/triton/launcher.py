"""What Triton supplies to step tensors: sizes, and one kernel that is compiled for their traits."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from fused_adafactor.backends.triton import interprets
from fused_adafactor.backends.triton.kernel import step
from fused_adafactor.backends.triton.variants import Variant, variant_of
from fused_adafactor.launching import Arguments, Launch
from fused_adafactor.spec import TensorSpec
from fused_adafactor.tickets import Tuning
from fused_adafactor.traits import Traits

TUNING = Tuning()
Options = dict[str, int | bool]


class TritonLauncher:
    """See ``launching.Launcher``.

    Args:
        spec: Of one of the tensors: their device and math dtype.
        launch_form: ``persistent`` or ``phases``.
    """

    def __init__(self, spec: TensorSpec, launch_form: str) -> None:
        """Look at the device."""
        self.tuning = TUNING.for_math(spec.math_dtype)
        self.waits = launch_form == "persistent"
        self.programs = self.tuning.programs_per_processor
        if spec.device.type == "cuda":  # interpreted, programs run one after the other
            found = torch.cuda.get_device_properties(spec.device)
            self.programs *= found.multi_processor_count

    @property
    def options(self) -> Options:
        """What it is compiled with. a * b + c is one operation only where a formula says so."""
        options: Options = {"num_warps": self.tuning.warps, "enable_fp_fusion": False}
        if torch.version.hip is None:
            # All that there are: NVIDIA's assembler would rather spill than hold one program less.
            options["maxnreg"] = 255
        return options

    def tuning_of(self, traits: Traits) -> Tuning:
        """Sizes for a tensor."""
        return self.tuning.for_blocks() if traits.exp_avg_dtype is torch.int8 else self.tuning

    def group_of(self, traits: Traits) -> Hashable:
        """A launch is compiled for the traits of its tensors."""
        return traits

    def kernel_of(self, launch: Launch) -> TritonKernel:
        """What takes the tickets of a launch."""
        return TritonKernel(self.variant_of(launch), launch.programs, self.options)

    def variant_of(self, launch: Launch) -> Variant:
        """What is compiled for a launch."""
        return variant_of(
            launch.traits[0],
            launch.pieces,
            self.tuning_of(launch.traits[0]),
            launch.kinds,
            waits=launch.waits,
            joined=launch.joined,
        )


class TritonKernel:
    """See ``launching.Kernel``."""

    def __init__(self, variant: Variant, programs: int, options: Options) -> None:
        """Nothing is compiled yet."""
        self.variant, self.options = variant, options
        self._grid = programs, 1, 1
        self._compiled: Any = None

    def compile(self, arguments: Arguments) -> None:
        """Compile it for these arguments, unless it is compiled, or interpreted."""
        if self._compiled is None and not interprets():
            self._compiled = step.warmup(*arguments, self.variant, grid=self._grid, **self.options)

    def start(self, arguments: Arguments) -> None:
        """Launch it on the current stream of the current device."""
        if self._compiled is None:
            step[self._grid](*arguments, self.variant, **self.options)
        else:
            # Without looking for it in Triton's own cache, which takes longer.
            self._compiled[self._grid](*arguments, self.variant)
