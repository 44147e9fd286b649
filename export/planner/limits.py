"""What a plan leaves out, in sentences: what of a build request the cost model says nothing about.

Beside each number that might mislead stands why. What no plan models (loading, launches, the host) is in
``docs/planner.md``. The module judges nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from reelforge.export.build_request import BuildRequest
from reelforge.export.planner.kernels import has_plugins, plugin_kernel
from reelforge.runtime.recipe import Backend, Precision, Recipe


def limits(request: BuildRequest, recipe: Recipe) -> Iterator[str]:
    """Yield what is not known of this build, a sentence each.

    Args:
        request: The build.
        recipe: As it was resolved.
    """
    target = request.target
    if not target.backend.has_plans:
        yield f"activations on {target} are those of TensorRT-RTX's kernels: ONNX Runtime orders its own otherwise"
    if target.backend is Backend.CPU:
        yield "memory on a CPU is that of tensors; the interpreter and its libraries come on top"
    if recipe.attention is Precision.INT8:
        yield "attention in int8 keeps logits of 128 queries at a time: only its operands are in the activations"
    if recipe.sparse_attention is not None:
        yield "sparse attention is planned as dense: what is left out is each request's, and so are the lists of blocks"
    if recipe.attention is None and has_plugins(target) and plugin_kernel(target) is None:
        yield f"attention runs in plugins, which were never timed on a GPU like {target}: planned as 16-bit attention"
    if request.parted:
        yield (
            "memory is that of requests that do not look into dit: fbcache and reuse=tokens keep the head's and the "
            "body's tokens between steps"
        )
    if request.step_cache is not None:
        yield f"times are those of every step computed: what {request.step_cache} skips depends on the video"
