"""One export of ``peers_export`` in a process of its own: ``python -m reelforge.tools.bench.peers_export_child JOB``.

Builds diffusers' transformer at the published width with some of its blocks and random bf16 weights, and exports it
with ``torch.onnx.export(dynamo=True)``. ``JOB`` is JSON. Memory is limited before anything is imported.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

WIDTH_OF_HEAD, HEADS = 128, 24
LATENTS, TEXT_TOKENS = (1, 16, 3, 8, 8), 16
"""Small, because the graph's size and the weights do not depend on it; activations then take next to nothing."""


def transformer(double: int, single: int, width_of_head: int, heads: int) -> Any:
    """Return diffusers' transformer with random bf16 weights, made without a copy in another type."""
    import torch
    from diffusers import HunyuanVideoTransformer3DModel

    with torch.device("meta"):
        model = HunyuanVideoTransformer3DModel(
            num_layers=double,
            num_single_layers=single,
            num_attention_heads=heads,
            attention_head_dim=width_of_head,
            guidance_embeds=True,
        ).to(torch.bfloat16)
    model = model.to_empty(device="cpu").eval()
    for parameter in model.parameters():
        parameter.data.uniform_(-0.02, 0.02)
    return model


def arguments(model: Any) -> dict[str, Any]:
    """Return inputs of a small video."""
    import torch

    like = {"dtype": torch.bfloat16}
    return {
        "latents": torch.zeros(LATENTS, **like),
        "timestep": torch.tensor([500]),
        "states": torch.zeros(1, TEXT_TOKENS, model.config.text_embed_dim, **like),
        "mask": torch.ones(1, TEXT_TOKENS, dtype=torch.int64),
        "pooled": torch.zeros(1, model.config.pooled_projection_dim, **like),
        "guidance": torch.tensor([6000.0], **like),
    }


def main() -> None:
    """Do the job and print one line of JSON; a line before it says that the model was built."""
    job = json.loads(sys.argv[1])
    # Of private writable memory, which anonymous memory is; address space that is only reserved does not count.
    resource.setrlimit(resource.RLIMIT_DATA, (job["limit_bytes"], job["limit_bytes"]))

    import torch

    from reelforge.tools.bench.peers_child import export_diffusers, velocity_module

    torch.set_num_threads(2)
    started = time.monotonic()
    model = transformer(job["double"], job["single"], job["width_of_head"], job["heads"])
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    print(json.dumps({"weight_bytes": size, "built_s": time.monotonic() - started}), flush=True)
    with torch.no_grad():
        seconds = export_diffusers(velocity_module(model), arguments(model), Path(job["graph"]))
    print(json.dumps({"export_s": seconds}), flush=True)


if __name__ == "__main__":
    main()
