"""Layer information: a compiler's verbose log, read into receipts' records.

TensorRT-RTX 1.7 ends a build with one message ``Layers:`` whose lines read ``Name: ..., LayerType: gemm, Inputs: [ {
Name: ..., Datatype: FP8, ...}], Constants: [...], Outputs: [...], TacticName: ..., StreamId: 0, Metadata: [ONNX Layer:
double.0.image.fc1]<US>[ONNX Layer: ...]``: first all layers of the first profile, then of the second. Before it, it
states ``Total Activation Memory`` once per profile and ``Total Weights Memory`` once for all. A generated kernel's name
lists what it does in words of up to four letters (``__myl_MulCast``); a fused attention's begins with ``_gemm_mha``.
A plugin's layer is expected as classic TensorRT documents it, ``LayerType: PluginV3``, constants and kernel possibly
left out; no such log was seen here. Lines of any other form are passed over. The module knows these words and nothing
about what a recipe wants.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from reelforge.export.engines.module import Message
from reelforge.runtime.receipt import LayerRecord

_KINDS = {
    "gemm": "gemm",
    "correlation": "convolution",
    "convolution": "convolution",
    "conv": "convolution",
    "reformat": "reformat",
    "cast": "cast",
    "copy": "reformat",
}
_GENERATED = ("kgen", "runtime_fusion")
_PRODUCTS = {"Fc": "gemm", "Gemm": "gemm", "Conv": "convolution", "Corr": "convolution"}
_MOVES = frozenset(["Resh", "Move", "Tran", "Repl", "Conc", "Slic", "Pad", "Copy"])
_COMPUTED = ("gemm", "convolution", "attention", "plugin")
_HEAD = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<type>[^,]*), Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<constants>.*?)\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: (?P<kernel>.*?), StreamId: \d+, Metadata: ?(?P<metadata>.*)"
)
_PLUGIN = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<type>Plugin\w*), Inputs: \[(?P<inputs>.*?\}) ?\], "
    r"(?:Constants: \[(?P<constants>.*?)\], )?Outputs: \[(?P<outputs>.*?\}) ?\].*?"
    r"(?:, TacticName: (?P<kernel>.*?), .*?)?(?:, Metadata: ?(?P<metadata>.*))?"
)
_DATATYPE = re.compile(r", Datatype: (\w+),")
_NODE = "[ONNX Layer: "
_SEPARATOR = "\x1f"
_WORDS = re.compile(r"[A-Z][a-z0-9]*")
_SUFFIX = re.compile(r"_myl(\d+)_\d+$")
_SECOND_PROFILE = re.compile(r" \[profile (\d+)\]")


@dataclass(frozen=True)
class PlanInformation:
    """What a compiler says about a plan.

    Attributes:
        profiles: The layers under each profile, in execution order.
        weight_bytes: Constants in the plan; all profiles share them.
        activation_bytes: Per profile.
    """

    profiles: tuple[tuple[LayerRecord, ...], ...]
    weight_bytes: int | None
    activation_bytes: tuple[int, ...]


def read_log(messages: Iterable[Message], names: Mapping[str, str]) -> PlanInformation:
    """Read a finished build's log.

    Args:
        messages: Of one build, in order.
        names: Node name -> name of the layer or attention, as records are to call it.
    """
    profiles: dict[int, list[LayerRecord]] = {}
    weights: int | None = None
    activations: list[int] = []
    for message in messages:
        if message.text.startswith("Layers:"):
            for profile, record in _records(message.text, names):
                profiles.setdefault(profile, []).append(record)
        elif (number := _bytes(message.text, "Total Weights Memory")) is not None:
            weights = number
        elif (number := _bytes(message.text, "Total Activation Memory")) is not None:
            activations.append(number)
    return PlanInformation(tuple(tuple(profiles[key]) for key in sorted(profiles)), weights, tuple(activations))


def worth_keeping(message: Message) -> bool:
    """Whether :func:`read_log` reads the message; a large build writes hundreds of megabytes of others."""
    return message.text.startswith(("Layers:", "Total Weights Memory", "Total Activation Memory"))


def _records(text: str, names: Mapping[str, str]) -> Iterator[tuple[int, LayerRecord]]:
    lines = text.split("\n")
    regions = _profiles_of_regions(lines)
    for line in lines:
        match = _HEAD.fullmatch(line.rstrip("\r")) or _PLUGIN.fullmatch(line.rstrip("\r"))
        if match is None:
            continue
        name, kernel = match["name"], match["kernel"]
        kind = _kind(match["type"], name)
        made_of = _nodes(match["metadata"] or "")
        if kind == "plugin" and not made_of:  # a plugin's layer is called after its node
            made_of = [_SECOND_PROFILE.sub("", name)]
        nodes = [names[node] for node in made_of if node in names] if kind in _COMPUTED else []
        yield (
            _profile(name, regions),
            LayerRecord(
                name=_SECOND_PROFILE.sub("", name),
                kind=kind,
                kernel=kernel or match["type"],
                inputs=tuple(_DATATYPE.findall(match["inputs"])),
                outputs=tuple(_DATATYPE.findall(match["outputs"])),
                constants=tuple(_DATATYPE.findall(match["constants"] or "")),
                nodes=tuple(dict.fromkeys(nodes)),
            ),
        )


def _kind(layer_type: str, name: str) -> str:
    word = layer_type.strip().lower()
    if name.startswith("_gemm_mha"):
        return "attention"
    if word in _KINDS:
        return _KINDS[word]
    if word.startswith("plugin"):
        return "plugin"
    if word not in _GENERATED or not name.startswith("__myl_"):
        return "other"
    words = _WORDS.findall(_SUFFIX.sub("", _SECOND_PROFILE.sub("", name)).removeprefix("__myl_"))
    return _kind_of_words(words)


def _kind_of_words(words: Sequence[str]) -> str:
    """Return the kind of a generated kernel by what it does."""
    product = next((_PRODUCTS[word] for word in words if word in _PRODUCTS), None)
    if product is not None:
        return product
    if words and set(words) <= _MOVES:
        return "reformat"
    return "cast" if words and set(words) <= _MOVES | {"Cast"} else "other"


def _nodes(metadata: str) -> list[str]:
    """Return the node names of ``[ONNX Layer: a]<US>[ONNX Layer: b]``; a name may have brackets of its own."""
    items = metadata.split(_SEPARATOR)
    return [item[len(_NODE) : -1] for item in items if item.startswith(_NODE) and item.endswith("]")]


def _profiles_of_regions(lines: Iterable[str]) -> dict[str, int]:
    """Return the profile of each compiled region (``myl3``): some lines of a later profile's regions name it."""
    found: dict[str, int] = {}
    for line in lines:
        region = _SUFFIX.search(line.partition(", LayerType: ")[0])
        stated = _SECOND_PROFILE.search(line)
        if region is not None and stated is not None:
            found[region[1]] = int(stated[1])
    return found


def _profile(name: str, regions: Mapping[str, int]) -> int:
    """Return the index of a layer's profile, the first where nothing is said."""
    region, stated = _SUFFIX.search(name), _SECOND_PROFILE.search(name)
    if stated is not None:
        return int(stated[1])
    return regions.get(region[1], 0) if region is not None else 0


def _bytes(text: str, what: str) -> int | None:
    match = re.match(rf"{what}: (\d+) bytes", text)
    return int(match[1]) if match is not None else None
