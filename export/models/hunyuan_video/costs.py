"""What a video costs in the stages of HunyuanVideo: rows per layer, attentions, and the tensors alive together.

Counts follow the modules of this folder. Which tensors are alive is what TensorRT-RTX 1.7 makes of them, read from its
layer information and the activation memory that it states: it runs attention and MLP of a single block beside each
other, so that the products' outputs, the normalised and rotated heads, attention's output and the activated hidden are
alive together; and it computes the decoder's norms in fp32, where their intermediate results decide. Another backend
may need less or more.

Letters: ``N`` image tokens, ``L`` text tokens, ``S = N + L``, ``D`` width, ``T`` ``H`` ``W`` a tile of latents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from reelforge.export.planner.work import Attention, Call, Live, Moment, Phase, Rows, StageWork, Workload
from reelforge.runtime.spec import DitSpec, ModelSpec, VaeSpec
from reelforge.runtime.tiling import plan_tiles

Grid = tuple[int, int, int]


def hunyuan_video_work(spec: ModelSpec, workload: Workload) -> Mapping[str, StageWork]:
    """Return the work of every stage for one call of the pipeline."""
    return {
        "llm": StageWork(Phase.TEXT, (_llm(spec, workload),)),
        "clip": StageWork(Phase.TEXT, (_clip(spec, workload),)),
        "refiner": StageWork(Phase.CONDITIONING, (_refiner(spec, workload),)),
        "modulation": StageWork(Phase.CONDITIONING, (_modulation(spec, workload),)),
        "dit": StageWork(Phase.LOOP, (_dit(spec, workload),)),
        "guidance": StageWork(Phase.LOOP, (_on_latents(spec, workload, 5),)),
        "step_change": StageWork(Phase.LOOP, (_on_latents(spec, workload, 7),)),
        "step_reuse": StageWork(Phase.LOOP, (_on_latents(spec, workload, 5),)),
        "vae_decoder": StageWork(Phase.DECODE, tuple(_vae_calls(spec, workload))),
    }


def _llm(spec: ModelSpec, workload: Workload) -> Call:
    llm, length = spec.llm, workload.prompt_tokens
    tokens, heads = length * workload.prompts, llm.heads * llm.head_dim
    attention = Attention(llm.used_layers * workload.prompts, llm.heads, llm.head_dim, length, _causal(length))
    # Two norms and sums, rotation of q and k, gate times up.
    passes = llm.used_layers * tokens * (10 * llm.width + 4 * heads + 3 * llm.mlp_width)
    down = "layers.0.mlp.down_proj"
    moment = Moment((Live(tokens * (2 * llm.mlp_width + llm.width)), Live(tokens * llm.mlp_width, down)))
    rows = (Rows("embed_tokens", 0), Rows("layers.*", tokens))
    return Call(1, rows, (attention,), passes, (moment,), {"batch": workload.prompts, "prompt_tokens": length})


def _clip(spec: ModelSpec, workload: Workload) -> Call:
    clip, length = spec.clip, spec.clip.max_tokens
    tokens = length * workload.prompts
    attention = Attention(clip.layers * workload.prompts, clip.heads, clip.width // clip.heads, length, _causal(length))
    passes = clip.layers * tokens * (10 * clip.width + 2 * clip.mlp_width)
    moment = Moment((Live(tokens * (2 * clip.mlp_width + clip.width)),))
    rows = (Rows("embeddings.*", 0), Rows("encoder.layers.*", tokens))
    return Call(1, rows, (attention,), passes, (moment,), {"batch": workload.prompts, "clip_tokens": length})


def _refiner(spec: ModelSpec, workload: Workload) -> Call:
    dit, steps, tokens = spec.dit, workload.steps, workload.text_tokens
    attention = Attention(dit.refiner_blocks * steps, dit.heads, dit.head_dim, tokens, tokens**2)
    passes = dit.refiner_blocks * steps * tokens * (14 * dit.width + 2 * dit.mlp_width)
    moment = Moment((Live(steps * tokens * (2 * dit.mlp_width + 4 * dit.width)),))
    rows = (
        Rows("time_in.*", steps),
        Rows("pooled_text_in.*", 1),
        Rows("input", tokens),
        Rows("blocks.*.gates", steps),
        Rows("blocks.*", steps * tokens),
    )
    return Call(1, rows, (attention,), passes, (moment,), {"steps": steps, "text_tokens": tokens})


def _modulation(spec: ModelSpec, workload: Workload) -> Call:
    dit, steps = spec.dit, workload.steps
    vectors = steps * dit.width * (12 * dit.double_blocks + 3 * dit.single_blocks + 2)
    rows = (Rows("pooled_in.*", 1), Rows("guidance_in.*", 1), Rows("*", steps))
    return Call(1, rows, (), 2 * vectors, (Moment((Live(vectors),)),), {"steps": steps})


def _on_latents(spec: ModelSpec, workload: Workload, tensors: int) -> Call:
    """Arithmetic on latents and velocities, for requests with a negative prompt or a step cache; others never call it.

    Args:
        spec: The model's numbers.
        workload: What is generated.
        tensors: As large as the latents, that are read or written.
    """
    channels, frames, height, width = spec.latent_shape(
        workload.shape.height, workload.shape.width, workload.shape.frames
    )
    latents = workload.batch * channels * frames * height * width
    dimensions = {
        "batch": workload.batch,
        "latent_frames": frames,
        "latent_height": height,
        "latent_width": width,
    }
    return Call(0, (), (), tensors * latents, (), dimensions)  # one kernel: nothing but its inputs and outputs


def _dit(spec: ModelSpec, workload: Workload) -> Call:
    dit, batch = spec.dit, workload.batch
    channels, frames, height, width = spec.latent_shape(
        workload.shape.height, workload.shape.width, workload.shape.frames
    )
    del channels
    patch = dit.patch
    image = (frames // patch[0]) * (height // patch[1]) * (width // patch[2])
    text, joint, heads = workload.text_tokens, image + workload.text_tokens, dit.heads * dit.head_dim
    blocks = dit.double_blocks + dit.single_blocks
    attention = Attention(blocks * batch, dit.heads, dit.head_dim, joint, joint**2, quantisable=True)
    # Reads and writes per token. Both: q, k, v normalised, rotated and laid out, attention's output laid out. Double:
    # two norms, two gated sums. Single: one norm, the MLP's activation, one gated sum of two products.
    double = 8 * heads + 12 * dit.width
    single = 8 * heads + 6 * dit.width + 2 * dit.mlp_width
    passes = batch * joint * (dit.double_blocks * double + dit.single_blocks * single)
    rows = (
        Rows("patch_embed", batch * image),
        Rows("double.*.image.*", batch * image),
        Rows("double.*.text.*", batch * text),
        Rows("single.*", batch * joint),
        Rows("final.proj", batch * image),
    )
    dimensions = {
        "batch": batch,
        "latent_frames": frames,
        "latent_height": height,
        "latent_width": width,
        "text_tokens": text,
        "image_tokens": image,
    }
    return Call(workload.steps, rows, (attention,), passes, _block_moments(dit, batch * joint), dimensions)


def _block_moments(dit: DitSpec, tokens: int) -> tuple[Moment, ...]:
    """Return what blocks keep alive: the heads of a double block; attention and MLP beside each other in a single one.

    In 16 bits the compiler makes one product of q, k, v and the MLP's first; in 8 bits each layer is its own, and the
    codes of what it reads are one more tensor.
    """
    heads, width, mlp = dit.heads * dit.head_dim, dit.width, dit.mlp_width
    double = Moment((Live(tokens * (6 * heads + 2 * width)),))
    if not dit.single_blocks:
        return (double,)
    fc1, proj, output = "single.0.fc1", "single.0.proj_mlp", "single.0.proj_attention"
    shared = (
        Live(tokens * (heads + mlp + width)),  # attention's result, the MLP's hidden, the stream
        Live(tokens * mlp, proj),
        Live(tokens * 3 * heads, attended=True),
    )
    joined = Live(tokens * (3 * heads + width))
    codes = (Live(tokens * width, fc1), Live(tokens * heads, output))
    return (
        double,
        Moment((*shared, joined), fc1, eight_bit=False),
        Moment((*shared, *codes), fc1, eight_bit=True),
    )


def _vae_calls(spec: ModelSpec, workload: Workload) -> Iterator[Call]:
    """Yield one call per distinct size of tile."""
    _, *latents = spec.latent_shape(workload.shape.height, workload.shape.width, workload.shape.frames)
    plan = plan_tiles((latents[0], latents[1], latents[2]), spec.tiling)
    sizes = Counter(
        (stop - start, bottom - top, far - near)
        for start, stop in plan.windows
        for top, bottom in plan.rows
        for near, far in plan.columns
    )
    for size, times in sorted(sizes.items(), reverse=True):
        yield _vae_tile(spec.vae, size, times)


def _vae_tile(vae: VaeSpec, tile: Grid, times: int) -> Call:
    """Follow the decoder level by level; ``Decoder`` in ``vae_decoder`` is what this counts."""
    widths = vae.block_widths[::-1]
    levels = len(widths)
    spatial_levels = vae.spatial_compression.bit_length() - 1
    temporal_levels = vae.temporal_compression.bit_length() - 1
    grid, before = tile, widths[0]
    rows = [Rows("post_quant_conv", _size(grid)), Rows("decoder.conv_in.*", _size(grid))]
    rows.append(Rows("decoder.mid_block.*", _size(grid)))
    passes = 2 * 6 * widths[0] * _size(grid)
    moments = [_convolution(grid, before, before, before)]
    for level, width in enumerate(widths):
        rows.append(Rows(f"decoder.up_blocks.{level}.resnets.*", _size(grid)))
        passes += (3 * (before + width) + 3 * width) * _size(grid)
        passes += vae.layers_per_block * 9 * width * _size(grid)
        moments += [_norm(grid, before), _convolution(grid, before, width, before)]
        if level < spatial_levels:
            in_time = levels - 1 - temporal_levels <= level < levels - 1
            frames = 2 * grid[0] - 1 if in_time else grid[0]
            grid = (frames, 2 * grid[1], 2 * grid[2])
            rows.append(Rows(f"decoder.up_blocks.{level}.upsamplers.*", _size(grid)))
            passes += 2 * width * _size(grid)
            moments.append(_convolution(grid, width, width, 0))
        before = width
    rows.append(Rows("decoder.conv_out.*", _size(grid)))
    passes += 3 * widths[-1] * _size(grid)
    moments.append(_convolution(grid, widths[-1], 3, 0))
    positions = tile[1] * tile[2]
    pairs = positions**2 * tile[0] * (tile[0] + 1) // 2
    attention = Attention(1, 1, widths[0], positions * tile[0], pairs)
    dimensions = {
        "tile_frames": tile[0],
        "tile_height": tile[1],
        "tile_width": tile[2],
        "video_frames": grid[0],
        "video_height": grid[1],
        "video_width": grid[2],
    }
    return Call(times, tuple(rows), (attention,), passes, tuple(moments), dimensions)


def _convolution(grid: Grid, inputs: int, outputs: int, residual: int) -> Moment:
    """Return what a 3x3x3 convolution keeps alive: its padded input, its output, and the residual."""
    return Moment((Live(inputs * _padded(grid)), Live((outputs + residual) * _size(grid))))


def _norm(grid: Grid, channels: int) -> Moment:
    """Return what a level's first norm keeps alive: its input, an fp32 copy, the next convolution's padded input."""
    size = channels * _size(grid)
    return Moment((Live(size), Live(channels * _padded(grid)), Live(size, fp32=True)))


def _padded(grid: Grid) -> int:
    return (grid[0] + 2) * (grid[1] + 2) * (grid[2] + 2)


def _size(grid: Grid) -> int:
    return grid[0] * grid[1] * grid[2]


def _causal(tokens: int) -> int:
    return tokens * (tokens + 1) // 2
