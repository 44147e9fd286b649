"""Write a complete synthetic HunyuanVideo checkpoint of any size, in diffusers' layout or in Tencent's.

Content is drawn per piece (see ``synthesize_layout``) from Philox streams keyed by the seed and the piece's name, so
the same seed gives the same bytes on every machine and the same model in both formats. ``sparse`` content stamps only
the first bytes of each piece and leaves holes: the real 41 GB are laid out in seconds, and no two tensors are alike.
Tencent's files are written as safetensors under their usual names, with that suffix.

The module knows nothing of how checkpoints are read, and needs neither torch nor diffusers.
"""

from __future__ import annotations

import enum
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click

from reelforge.runtime.codec import to_json
from reelforge.runtime.errors import OutputError, RequestError
from reelforge.runtime.spec import ModelSpec
from reelforge.tools import console
from reelforge.tools import synthesize_configs as configs
from reelforge.tools import synthesize_layout as layout
from reelforge.tools import synthesize_text as text
from reelforge.tools.synthesize_files import (
    Content,
    Dtype,
    Values,
    write_bytes,
    write_json,
    write_safetensors,
    write_sharded,
)
from reelforge.tools.synthesize_layout import TensorLayout

DEFAULT_SHARD_BYTES = {**dict.fromkeys(layout.SIZES, 10_000_000_000), "tiny": 1_000_000}
DEFAULT_DTYPE = {**dict.fromkeys(layout.SIZES, Dtype.BF16), "tiny": Dtype.FP32, "demo": Dtype.FP16}
DEFAULT_CONTENT = {**dict.fromkeys(layout.SIZES, Content.RANDOM), "full": Content.SPARSE}


class Layout(enum.Enum):
    """Whose folder and file names to use."""

    DIFFUSERS = "diffusers"
    TENCENT = "tencent"


@dataclass(frozen=True)
class Request:
    """Everything that decides the bytes of a checkpoint."""

    size: str
    format: Layout
    values: Values
    shard_bytes: int

    @property
    def spec(self) -> ModelSpec:
        """Numbers of the model."""
        return layout.SIZES[self.size]


def synthesize(
    output: Path,
    size: str,
    *,
    format: Layout = Layout.DIFFUSERS,
    content: Content | None = None,
    dtype: Dtype | None = None,
    seed: int = 0,
    shard_bytes: int | None = None,
) -> Path:
    """Write a checkpoint folder and return its path.

    Args:
        output: Folder to create; it appears only when it is complete.
        size: A key of ``synthesize_layout.SIZES``.
        format: Whose layout to write.
        content: Default: random values, for ``full`` sparse stamps.
        dtype: Default: fp32 for ``tiny``, fp16 for ``demo``, else bf16.
        seed: Not negative; the same seed gives the same model in both formats.
        shard_bytes: Largest file of the transformer and the LLM in diffusers' layout; default 1 MB for ``tiny`` (so
            that there are several), else 10 GB.

    Raises:
        RequestError: For an unknown size or a negative number.
        OutputError: If ``output`` exists or cannot be written.
    """
    if size not in layout.SIZES:
        raise RequestError(f"there is no size {size!r}.", received=size, expected=" or ".join(layout.SIZES))
    if seed < 0 or (shard_bytes is not None and shard_bytes < 1):
        raise RequestError(
            "the seed or the shard size is negative.",
            received=f"seed {seed}, shard_bytes {shard_bytes}",
            expected="a seed from 0 and a shard size from 1",
        )
    request = Request(
        size,
        format,
        Values(content or DEFAULT_CONTENT[size], dtype or DEFAULT_DTYPE[size], seed),
        shard_bytes or DEFAULT_SHARD_BYTES[size],
    )
    if output.exists() or output.is_symlink():
        raise OutputError(
            f"the folder '{output}' exists already.",
            expected="a path that does not exist yet",
            fix="remove it, or choose another output folder",
        )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{output.name}.partial-", dir=output.parent))
        try:
            _write_checkpoint(partial, request)
            partial.chmod(0o755)
            partial.rename(output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise OutputError(
            f"the checkpoint '{output}' cannot be written.",
            received=str(error),
            fix="choose a folder that can be written, with room for the checkpoint",
        ) from error
    return output


def _write_checkpoint(folder: Path, request: Request) -> None:
    write = _write_diffusers if request.format is Layout.DIFFUSERS else _write_tencent
    write(folder, request.spec, request)
    if request.size != "full":  # the published checkpoints come without a template and without sampling defaults
        tokens = text.crop_start(text.llm_tokenizer(request.spec.llm), text.TEMPLATE)
        write_json(folder / "prompt_template.json", {"template": text.TEMPLATE, "crop_start": tokens})
        write_json(folder / "sampling_defaults.json", to_json(request.spec.defaults))


def _write_diffusers(folder: Path, spec: ModelSpec, request: Request) -> None:
    values, shard_bytes = request.values, request.shard_bytes
    transformer = layout.named(layout.diffusers_transformer(spec.dit), "transformer")
    write_sharded(folder / "transformer", "diffusion_pytorch_model", transformer, values, shard_bytes)
    write_json(folder / "transformer" / "config.json", configs.transformer_config(spec))
    vae = layout.named(layout.vae(spec.vae), "vae")
    write_safetensors(folder / "vae" / "diffusion_pytorch_model.safetensors", vae, values)
    write_json(folder / "vae" / "config.json", configs.vae_config(spec, tencent=False))
    llm = layout.named(layout.llm(spec.llm), "text_encoder")
    write_sharded(folder / "text_encoder", "model", llm, values, shard_bytes)
    llm_config = configs.llm_config(spec, values.dtype.torch_name, "LlamaModel")
    write_json(folder / "text_encoder" / "config.json", llm_config)
    _write_clip(folder / "text_encoder_2", spec, request)
    _write_tokenizers(folder / "tokenizer", folder / "tokenizer_2", spec)
    write_json(folder / "scheduler" / "scheduler_config.json", configs.SCHEDULER_CONFIG)
    write_json(folder / "model_index.json", configs.MODEL_INDEX)


def _write_tencent(folder: Path, spec: ModelSpec, request: Request) -> None:
    values, inner = request.values, folder / "hunyuan-video-t2v-720p"
    transformer = layout.named(layout.tencent_transformer(spec.dit), "transformer")
    write_safetensors(inner / "transformers" / "mp_rank_00_model_states.safetensors", transformer, values)
    write_safetensors(inner / "vae" / "pytorch_model.safetensors", layout.named(layout.vae(spec.vae), "vae"), values)
    write_json(inner / "vae" / "config.json", configs.vae_config(spec, tencent=True))
    # Tencent saves the whole language model: a prefix on every key, and an output head that nothing uses.
    head = layout.piece("lm_head.weight", (spec.llm.vocabulary, spec.llm.width))
    llm = layout.named(layout.llm(spec.llm), "text_encoder", "model.")
    llm += layout.named([TensorLayout(head.name, (head,))], "text_encoder")
    write_sharded(folder / "text_encoder", "model", llm, values, request.shard_bytes)
    llm_config = configs.llm_config(spec, values.dtype.torch_name, "LlamaForCausalLM")
    write_json(folder / "text_encoder" / "config.json", llm_config)
    _write_clip(folder / "text_encoder_2", spec, request)
    _write_tokenizers(folder / "text_encoder", folder / "text_encoder_2", spec)


def _write_clip(folder: Path, spec: ModelSpec, request: Request) -> None:
    tensors = layout.named(layout.clip(spec.clip), "text_encoder_2", "text_model.")
    write_safetensors(folder / "model.safetensors", tensors, request.values)
    # OpenAI's configuration carries token ids that its tokenizer does not have; the full size repeats that.
    config = configs.clip_config(spec, request.values.dtype.torch_name, legacy=request.size == "full")
    write_json(folder / "config.json", config)


def _write_tokenizers(llm_folder: Path, clip_folder: Path, spec: ModelSpec) -> None:
    write_bytes(llm_folder / "tokenizer.json", text.llm_tokenizer(spec.llm))
    write_json(llm_folder / "tokenizer_config.json", configs.llm_tokenizer_config())
    for name, content in text.clip_files(spec.clip).items():
        write_bytes(clip_folder / name, content)
    write_json(clip_folder / "special_tokens_map.json", configs.CLIP_SPECIAL_TOKENS)
    write_json(clip_folder / "tokenizer_config.json", configs.clip_tokenizer_config(spec))


@click.command(name="synthesize")
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--size", type=click.Choice(list(layout.SIZES)), required=True, help="Numbers of the model.")
@click.option(
    "--format",
    "format_name",
    type=click.Choice([item.value for item in Layout]),
    default="diffusers",
    show_default=True,
    help="Whose folder and file names to use; both hold the same model for the same seed.",
)
@click.option(
    "--content",
    type=click.Choice([item.value for item in Content]),
    help="sparse: stamps at both ends of each tensor, the rest holes. random: values everywhere.  [default: random; "
    "full: sparse]",
)
@click.option(
    "--dtype",
    type=click.Choice([item.value for item in Dtype]),
    help="Element type.  [default: fp32 for tiny, fp16 for demo, bf16 for full]",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Decides every byte.")
@click.option(
    "--shard-bytes",
    type=click.IntRange(min=1),
    help="Largest file of the transformer and the LLM.  [default: 10 GB; 1 MB for tiny]",
)
def command(
    output: Path,
    size: str,
    format_name: str,
    content: str | None,
    dtype: str | None,
    seed: int,
    shard_bytes: int | None,
) -> None:
    """Write a complete synthetic checkpoint folder OUTPUT.

    Tests and measurements use it in place of weights that cannot be had: the keys, shapes, files, tokenizers and
    configurations are those of a real checkpoint of the chosen SIZE, the values are invented. The same options give
    the same bytes. With sparse content the full 41 GB take seconds to write and a few megabytes of disk.
    """
    synthesize(
        output,
        size,
        format=Layout(format_name),
        content=None if content is None else Content(content),
        dtype=None if dtype is None else Dtype(dtype),
        seed=seed,
        shard_bytes=shard_bytes,
    )
    click.echo(f"wrote {output}")


if __name__ == "__main__":
    console.run(command)
