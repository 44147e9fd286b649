"""Key tables of both layouts: equal weights give equal parameters, and every difference is reported."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file

from reelforge.export.checkpoint.component import Checkpoint, Layout
from reelforge.export.checkpoint.digest import TensorDigest, digest
from reelforge.export.checkpoint.match import Explained, match, match_component
from reelforge.export.checkpoint.open import open_checkpoint
from reelforge.export.checkpoint.sources import Columns, Conversion, Resolved, Rows, Whole, loaded
from reelforge.export.models.hunyuan_video import keys_diffusers, keys_tencent
from reelforge.export.models.hunyuan_video.spec_from_checkpoint import model_spec
from reelforge.runtime.errors import CheckpointError
from reelforge.runtime.spec import DitSpec, ModelSpec
from tests.checkpoints import load_shards, make_diffusers_checkpoint, make_tencent_checkpoint

Shapes = dict[str, dict[str, tuple[int, ...]]]
KEYS: dict[Layout, ModuleType] = {Layout.DIFFUSERS: keys_diffusers, Layout.TENCENT: keys_tencent}
TRANSFORMER = ("refiner", "modulation", "dit")


def transformer_shapes(dit: DitSpec) -> Shapes:
    """The parameters of the transformer's stages by hand, from the dimensions of the specification (section 3)."""
    d, m, hd, s = dit.width, dit.mlp_width, dit.head_dim, dit.sinusoid_width
    patch = dit.latent_channels * math.prod(dit.patch)

    def linears(sizes: dict[str, tuple[int, int]]) -> dict[str, tuple[int, ...]]:
        weights = {f"{name}.weight": size for name, size in sizes.items()}
        return {**weights, **{f"{name}.bias": size[:1] for name, size in sizes.items()}}

    attention = {"q": (d, d), "k": (d, d), "v": (d, d)}
    blocks = range(dit.refiner_blocks)
    refiner = linears({"time_in.fc1": (d, s), "time_in.fc2": (d, d), "input": (d, dit.text_width)})
    refiner |= linears({"pooled_text_in.fc1": (d, dit.text_width), "pooled_text_in.fc2": (d, d)})
    parts = {**attention, "proj": (d, d), "fc1": (m, d), "fc2": (d, m), "gates": (2 * d, d)}
    refiner |= linears({f"blocks.{i}.{name}": size for i in blocks for name, size in parts.items()})
    refiner |= {
        f"blocks.{i}.{norm}.{kind}": (d,) for i in blocks for norm in ("norm1", "norm2") for kind in ("weight", "bias")
    }

    embedders = {"time_in": s, "pooled_in": dit.pooled_width, **({"guidance_in": s} if dit.guidance_embedding else {})}
    modulation = linears({f"{name}.fc1": (d, size) for name, size in embedders.items()})
    modulation |= linears({f"{name}.fc2": (d, d) for name in embedders})
    streams = [f"double.{i}.{stream}" for i in range(dit.double_blocks) for stream in ("image", "text")]
    singles = [f"single.{i}" for i in range(dit.single_blocks)]
    modulation |= linears({f"{stream}.linear": (6 * d, d) for stream in streams})
    modulation |= linears({f"{single}.linear": (3 * d, d) for single in singles} | {"final.linear": (2 * d, d)})

    dit_shapes = linears({"patch_embed": (d, patch), "final.proj": (patch, d)})
    parts = {**attention, "proj": (d, d), "fc1": (m, d), "fc2": (d, m)}
    dit_shapes |= linears({f"{stream}.{name}": size for stream in streams for name, size in parts.items()})
    parts = {**attention, "fc1": (m, d), "proj_attention": (d, d)}
    dit_shapes |= linears({f"{single}.{name}": size for single in singles for name, size in parts.items()})
    dit_shapes |= {f"{single}.proj_mlp.weight": (d, m) for single in singles}
    dit_shapes |= {f"{block}.{norm}.weight": (hd,) for block in (*streams, *singles) for norm in ("q_norm", "k_norm")}
    return {"refiner": refiner, "modulation": modulation, "dit": dit_shapes}


def shapes_of(folder: Path, spec: ModelSpec) -> dict[str, Shapes]:
    """The shapes of all stages; where a parameter has the checkpoint's name, as diffusers and transformers saved it."""

    def stored(component: str, wanted: Callable[[str], bool]) -> dict[str, tuple[int, ...]]:
        tensors = load_shards(folder / component)
        return {name: tuple(tensor.shape) for name, tensor in tensors.items() if wanted(name)}

    used = tuple(f"layers.{i}." for i in range(spec.llm.used_layers))
    return {
        "transformer": transformer_shapes(spec.dit),
        "vae": {"vae_decoder": stored("vae", lambda name: name.startswith(("decoder.", "post_quant_conv.")))},
        "text_encoder": {"llm": stored("text_encoder", lambda name: name.startswith(("embed_tokens.", *used)))},
        "text_encoder_2": {"clip": stored("text_encoder_2", lambda name: "position_ids" not in name)},
    }


def resolved(checkpoint: Checkpoint, shapes: dict[str, Shapes]) -> dict[str, dict[str, Resolved]]:
    spec, keys = model_spec(checkpoint), KEYS[checkpoint.layout]
    explained = keys.explained(spec)
    result: dict[str, dict[str, Resolved]] = {}
    for component, tables in keys.stage_sources(spec).items():
        result |= match_component(checkpoint.component(component), tables, shapes[component], explained[component])
    return result


def digests(weights: dict[str, dict[str, Resolved]]) -> dict[str, dict[str, tuple[tuple[int, ...], TensorDigest]]]:
    return {
        stage: {name: (table[name].shape, entry) for name, entry in digest(table).items()}
        for stage, table in weights.items()
    }


def test_both_layouts_give_equal_parameters(diffusers_folder: Path, tencent_folder: Path) -> None:
    one, two = open_checkpoint(diffusers_folder), open_checkpoint(tencent_folder)
    assert model_spec(one) == model_spec(two)
    shapes = shapes_of(diffusers_folder, model_spec(one))
    first, second = resolved(one, shapes), resolved(two, shapes)
    assert set(first) == {"refiner", "modulation", "dit", "vae_decoder", "llm", "clip"}
    assert digests(first) == digests(second)
    distinct = {entry.sha256 for table in digests(first).values() for _, entry in table.values()}
    assert len(distinct) == sum(len(table) for table in first.values())  # no two parameters could be mistaken
    converted = {
        (stage, name) for stage, table in first.items() for name, item in table.items() if isinstance(item, Conversion)
    }
    assert {stage for stage, _ in converted} == {"dit", "modulation"}
    assert {name for stage, name in converted if stage == "modulation"} == {"final.linear.weight", "final.linear.bias"}


@pytest.mark.parametrize(
    "sizes",
    [
        {"guidance_embedding": False, "double_blocks": 1, "single_blocks": 3, "refiner_blocks": 1, "seed": 5},
        {
            "heads": 3,
            "head_dim": 64,
            "latent_channels": 6,
            "vae_layers": 2,
            "llm_layers": 3,
            "seed": 6,
        },
        {"dtype": torch.bfloat16, "clip_layers": 1, "vae_widths": (8, 16, 24, 32), "seed": 7},
    ],
)
def test_other_sizes(tmp_path: Path, sizes: dict[str, int]) -> None:
    folder = make_diffusers_checkpoint(tmp_path / "d", **sizes)  # type: ignore[arg-type]
    one = open_checkpoint(folder)
    two = open_checkpoint(make_tencent_checkpoint(tmp_path / "t", folder))
    shapes = shapes_of(folder, model_spec(one))
    assert model_spec(one) == model_spec(two)
    assert digests(resolved(one, shapes)) == digests(resolved(two, shapes))


def test_values_against_the_stored_tensors(diffusers_folder: Path) -> None:
    checkpoint = open_checkpoint(diffusers_folder)
    spec = model_spec(checkpoint)
    weights = resolved(checkpoint, shapes_of(diffusers_folder, spec))
    stored = load_shards(diffusers_folder / "transformer")
    d, hd = spec.dit.width, spec.dit.head_dim

    def value(stage: str, name: str) -> torch.Tensor:
        return torch.from_numpy(loaded(weights[stage][name]).copy())

    def halves(tensor: torch.Tensor) -> torch.Tensor:
        heads = tensor.unflatten(0, (-1, hd))
        return torch.cat([heads[:, 0::2], heads[:, 1::2]], 1).flatten(0, 1)

    block = "transformer_blocks.1"
    for ours, theirs in (
        ("double.1.image.q.weight", f"{block}.attn.to_q.weight"),
        ("double.1.text.k.bias", f"{block}.attn.add_k_proj.bias"),
        ("double.1.text.q_norm.weight", f"{block}.attn.norm_added_q.weight"),
        ("single.0.k.weight", "single_transformer_blocks.0.attn.to_k.weight"),
    ):
        assert torch.equal(value("dit", ours), halves(stored[theirs]))
    for ours, expected in (
        ("double.1.text.v.weight", stored[f"{block}.attn.add_v_proj.weight"]),
        ("double.0.text.proj.bias", stored["transformer_blocks.0.attn.to_add_out.bias"]),
        ("single.1.proj_attention.weight", stored["single_transformer_blocks.1.proj_out.weight"][:, :d]),
        ("single.1.proj_mlp.weight", stored["single_transformer_blocks.1.proj_out.weight"][:, d:]),
        ("patch_embed.weight", stored["x_embedder.proj.weight"].flatten(1)),
    ):
        assert torch.equal(value("dit", ours), expected)
    assert torch.equal(value("modulation", "final.linear.bias"), torch.roll(stored["norm_out.linear.bias"], d))
    refiner_q = stored["context_embedder.token_refiner.refiner_blocks.0.attn.to_q.weight"]
    assert torch.equal(value("refiner", "blocks.0.q.weight"), refiner_q)


def rewrite_vae(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_everything_that_differs_is_listed_at_once(diffusers_copy: Path) -> None:
    spec = model_spec(open_checkpoint(diffusers_copy))
    shapes = shapes_of(diffusers_copy, spec)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors["decoder.conv_in.conv.bias"]
        tensors["decoder.surprise"] = torch.zeros(3)
        tensors["decoder.conv_out.conv.weight"] = tensors["decoder.conv_out.conv.weight"].transpose(0, 1).contiguous()
        tensors["post_quant_conv.bias"] = tensors["post_quant_conv.bias"].to(torch.int64)
        tensors["post_quant_conv.weight"] = tensors["post_quant_conv.weight"].to(torch.float8_e4m3fn)

    rewrite_vae(diffusers_copy, change)
    with pytest.raises(CheckpointError, match=r"the vae in .* does not have the tensors") as caught:
        resolved(open_checkpoint(diffusers_copy), shapes)
    text = str(caught.value)
    assert "missing (1):\n      decoder.conv_in.conv.bias for vae_decoder.decoder.conv_in.conv.bias" in text
    assert "unexpected (1):\n      decoder.surprise F32 [3]" in text
    assert "misshaped (1):\n      decoder.conv_out.conv.weight gives" in text
    assert "mistyped (2):" in text
    assert "post_quant_conv.bias is I64, one of BF16, F16, F32 is needed" in text
    assert "fp8 weights need their scales" in text
    assert "partly used" not in text


def test_long_lists_are_cut(diffusers_copy: Path) -> None:
    spec = model_spec(open_checkpoint(diffusers_copy))
    shapes = shapes_of(diffusers_copy, spec)
    rewrite_vae(diffusers_copy, lambda tensors: tensors.update({f"extra.{i}": torch.zeros(1) for i in range(25)}))
    with pytest.raises(CheckpointError, match="unexpected \\(25\\)") as caught:
        resolved(open_checkpoint(diffusers_copy), shapes)
    assert str(caught.value).count("extra.") == 10
    assert "... and 15 more" in str(caught.value)


def test_tables_and_shapes_are_held_against_each_other(diffusers_folder: Path) -> None:
    vae = open_checkpoint(diffusers_folder).component("vae")
    bias = vae.tensors["post_quant_conv.bias"]
    with pytest.raises(CheckpointError, match=r"(?s)vae\.absent has no source.*vae\.b is no parameter"):
        match(vae, {"b": Whole("post_quant_conv.bias")}, {"absent": bias.shape}, [Explained(".*", "not under test")])


def test_every_row_and_column_must_be_used(diffusers_folder: Path) -> None:
    text = open_checkpoint(diffusers_folder).component("text_encoder")
    key, rest = "layers.0.mlp.up_proj.weight", [Explained(r".*", "not under test")]
    rows, columns = text.tensors[key].shape
    for sources in (
        {"a": Rows(key, 0, 8), "b": Rows(key, 9, rows)},
        {"a": Rows(key, 0, 8), "b": Rows(key, 4, 16)},
        {"a": Columns(key, 0, 8), "b": Columns(key, 8, columns - 1)},
        {"a": Columns(key, 0, 8), "b": Rows(key, 0, 9)},
    ):
        shapes = {
            name: (source.stop - source.start, columns)
            if isinstance(source, Rows)
            else (rows, source.stop - source.start)
            for name, source in sources.items()
        }
        with pytest.raises(CheckpointError, match=r"partly used \(1\)"):
            match(text, sources, shapes, rest)
    whole = {"a": Columns(key, 0, 8), "b": Columns(key, 8, columns)}
    assert set(match(text, whole, {"a": (rows, 8), "b": (rows, columns - 8)}, rest)) == {"a", "b"}


def test_nan_weights_are_found_by_name(diffusers_copy: Path) -> None:
    spec = model_spec(open_checkpoint(diffusers_copy))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["decoder.conv_in.conv.weight"].view(-1)[7] = float("nan")

    rewrite_vae(diffusers_copy, change)
    weights = resolved(open_checkpoint(diffusers_copy), shapes_of(diffusers_copy, spec))
    found = {name: entry.non_finite for name, entry in digest(weights["vae_decoder"]).items() if entry.non_finite}
    assert found == {"decoder.conv_in.conv.weight": 1}


def test_unneeded_tensors_of_full_downloads_are_explained(tencent_copy: Path, diffusers_folder: Path) -> None:
    """LLaVA's vision part and CLIP's other tower come along in some downloads."""
    spec = model_spec(open_checkpoint(diffusers_folder))
    path = tencent_copy / "text_encoder" / "pytorch_model.bin"
    llm = torch.load(path, weights_only=True)
    llm = {f"language_model.{name}": tensor for name, tensor in llm.items()}
    llm |= {"language_model.lm_head.weight": torch.zeros(1), "multi_modal_projector.linear_1.bias": torch.zeros(1)}
    llm["vision_tower.vision_model.embeddings.class_embedding"] = torch.zeros(1)
    torch.save(llm, path)
    path = tencent_copy / "text_encoder_2" / "model.safetensors"
    clip = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(path).items()}
    clip |= {"text_model.embeddings.position_ids": torch.arange(77)[None], "logit_scale": torch.tensor(1.0)}
    clip |= {"vision_model.embeddings.class_embedding": torch.zeros(1), "text_projection.weight": torch.zeros(1)}
    save_file(clip, path)
    config_path = tencent_copy / "text_encoder_2" / "config.json"
    config = json.loads(config_path.read_text())
    config_path.write_text(json.dumps({"model_type": "clip", "text_config": config}))
    shapes = shapes_of(diffusers_folder, spec)
    assert digests(resolved(open_checkpoint(tencent_copy), shapes)) == digests(
        resolved(open_checkpoint(diffusers_folder), shapes)
    )
