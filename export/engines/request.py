"""What one plan is to be compiled from and what must be found in it, as data that crosses to a child process.

Nothing here imports a compiler. A plan belongs to one stage, or one part of a stage, and to architectures that can
share it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from reelforge.runtime.manifest import TensorInfo
from reelforge.runtime.recipe import Precision, Target


@dataclass(frozen=True)
class Profile:
    """One optimisation profile.

    Attributes:
        name: The shape bucket's, or ``default``.
        dimensions: Named dimension -> (minimum, optimum, maximum); every named dimension of the graph's inputs.
    """

    name: str
    dimensions: dict[str, tuple[int, int, int]]


@dataclass(frozen=True)
class Expected:
    """What the recipe promises of a plan; a compiler that does otherwise fails the build.

    Attributes:
        layers: Layer name -> ``FP8`` or ``INT8``: its product must be computed in that format.
        attentions: Attention name -> ``FP8``, ``FP16`` or ``BF16``: it must be one fused kernel in that format.
        decomposed: Attentions that no kernel of the backend covers, and that may become separate products.
        plugins: Attention name -> plugin: it must be one layer of the plugin, whose types its registration fixes.
    """

    layers: dict[str, Precision] = field(default_factory=dict)
    attentions: dict[str, Precision] = field(default_factory=dict)
    decomposed: tuple[str, ...] = ()
    plugins: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PlanRequest:
    """One plan to compile.

    Attributes:
        stage: Name of the stage.
        graph: Path of the ONNX file; its weights lie below its folder.
        inputs: The graph's inputs with named dimensions.
        outputs: Likewise.
        target: Backend, and architectures that can share one plan.
        profiles: At least one.
        expected: What must be found in the plan.
        plan: Where to write the plan.
        receipt: Where to write its receipt (``runtime.receipt``).
        scratch: A folder on a disk with room for the compiler's large allocations.
    """

    stage: str
    graph: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    target: Target
    profiles: tuple[Profile, ...]
    expected: Expected
    plan: str
    receipt: str
    scratch: str
