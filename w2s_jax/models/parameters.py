"""The table of a decoder's parameters: path → shape, logical axes, and where files keep it.

Shape, axes and initialiser are declared in `decoder.py`, from which the table is read by tracing
one layer; the names and arrangements of checkpoint files are here, one list per architecture. From
this table derive abstract shapes, shardings, reading, writing and adapters.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from w2s_jax.models.config import ModelConfig
from w2s_jax.models.decoder import initial_params
from w2s_jax.models.families import FAMILIES, OWN, QKV, TEXT_PARTS
from w2s_jax.ops.layers import OutputMajor, QTensor, input_major, output_major
from w2s_jax.ops.sharding import Axes

Index = tuple[slice, ...]
STACKED, EXPERTS = "layers", "experts"


def layer_name(layer: int) -> str:
    """The key of one layer's subtree in the per-layer layout."""
    return f"{STACKED}_{layer}"


@dataclass(frozen=True)
class Span:
    """Which outputs of a stored tensor are a parameter's, where several share it.

    The tensor's `total` outputs are `stretches` of equal length. In each, one run is the
    parameter's, `start` behind the stretch's first.
    """

    start: int
    total: int
    stretches: int = 1

    def runs(self, outputs: int, first: int, last: int) -> list[slice]:
        """Where outputs first .. last of a parameter of so many are among the tensor's."""
        run, found = outputs // self.stretches, []
        for stretch in range(first // run, -(-last // run)):
            shift = self.start + stretch * (self.total // self.stretches - run)
            own = max(first, stretch * run), min(last, (stretch + 1) * run)
            found.append(slice(own[0] + shift, own[1] + shift))
        return found


@dataclass(frozen=True)
class Stored:
    """How files hold one parameter: the tensor's name and how its axes lie there.

    groups: how many of our axes, in order, make up each stored axis: (1, 2) stores [D, H, C] as
        [D, H·C], (2,) stores [H, C] as [H·C].
    transposed: the stored axes are in the opposite order, [out, in].
    span: the parameter is these outputs of the tensor; None where it is all of them.
    """

    name: str
    groups: tuple[int, ...] = (1,)
    transposed: bool = False
    span: Span | None = None

    def grouped(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The parameter's shape with its axes joined as stored, before any transposing."""
        sizes, axis = [], 0
        for group in self.groups:
            sizes.append(math.prod(shape[axis : axis + group]))
            axis += group
        return tuple(sizes)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The whole stored tensor's shape, given the parameter's."""
        *most, last = self.grouped(shape)
        sizes = (*most, last if self.span is None else self.span.total)
        return sizes[::-1] if self.transposed else sizes

    @property
    def major_axis(self) -> int:
        """The axis of the parameter that the tensor's first one begins with."""
        return sum(self.groups[:-1]) if self.transposed else 0

    def runs(self, shape: tuple[int, ...], first: int = 0, last: int | None = None) -> list[slice]:
        """Where in the tensor's outputs those from `first` to `last` of the parameter are."""
        outputs = self.grouped(shape)[-1]
        last = outputs if last is None else last
        return [slice(first, last)] if self.span is None else self.span.runs(outputs, first, last)

    def read(self, tensor: Any, shape: tuple[int, ...], index: Index) -> np.ndarray:
        """A rectangular part of a parameter, touching only the stored bytes that cover it."""
        ranges, lengths, inner, axis = [], [], [], 0
        for group in self.groups:
            major, *minor = shape[axis : axis + group]
            start, stop, _ = index[axis].indices(major)
            step = math.prod(minor)
            ranges.append(slice(start * step, stop * step))
            lengths += [stop - start, *minor]
            inner += [slice(None), *index[axis + 1 : axis + group]]
            axis += group
        *most, outputs = ranges
        slices = [(*most, run) for run in self.runs(shape, outputs.start, outputs.stop)]
        if self.transposed:
            array = _joined([tensor[part[::-1]] for part in slices], 0).T
        else:
            array = _joined([tensor[part] for part in slices], -1)
        return array.reshape(lengths)[tuple(inner)]

    def read_outputs(
        self, tensor: Any, shape: tuple[int, ...], summed: tuple[int, ...], index: Index
    ) -> np.ndarray:
        """Whole rows of a matrix [outputs, inputs], whose `summed` axes are its inputs'.

        Files of torch's Linear and of embeddings hold it so, and are read in one piece.
        """
        if summed[0] > 0:
            return tensor[index[0]]
        runs = self.runs(shape, index[0].start, index[0].stop)
        rows = [tensor[run] if self.transposed else tensor[:, run].T for run in runs]
        return _joined(rows, 0)

    def arranged(self, array: np.ndarray) -> np.ndarray:
        """A parameter as the files keep it (or its outputs of a stored tensor)."""
        flat = array.reshape(self.grouped(array.shape))
        return flat.T if self.transposed else flat

    def write(self, tensor: np.ndarray, array: np.ndarray) -> None:
        """Put a parameter in its place in a stored tensor."""
        axis = 0 if self.transposed else -1
        whole, own = (np.moveaxis(x, axis, 0) for x in (tensor, self.arranged(array)))
        self.put(whole, own, array.shape)

    def put(self, whole: np.ndarray, own: np.ndarray, shape: tuple[int, ...]) -> None:
        """Put what belongs to each output of a parameter where the tensor's outputs are."""
        begun = 0
        for run in self.runs(shape):
            whole[run] = own[begun : (begun := begun + run.stop - run.start)]

    def take(self, whole: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """What `put` put there."""
        return _joined([whole[run] for run in self.runs(shape)], 0)


def _joined(arrays: list[np.ndarray], axis: int) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis)


@dataclass(frozen=True)
class StoredHead:
    """How files hold the head on a decoder.

    name: of its tensors, `{name}.weight` [out, in] and perhaps `{name}.bias`.
    classes: a pattern of the names in config.json's `architectures` that keep such a head.
    wrapped: the decoder was saved by a module that holds a whole language model as `model` and the
        decoder of it, a second time, as `transformer`; the language model's head is not used.
    """

    name: str
    classes: str = ".*"
    wrapped: bool = False

    @property
    def weight(self) -> str:
        """The name of the head's matrix."""
        return f"{self.name}.weight"

    @property
    def bias(self) -> str:
        """The name of the head's bias, which few have."""
        return f"{self.name}.bias"


LANGUAGE_HEAD = StoredHead("lm_head")
REWARD_HEADS = (
    StoredHead("score", ".*ForSequenceClassification"),
    StoredHead("regression_head", "LlamaRewardModel"),  # UltraRM (arXiv 2310.01377)
    # Starling-RM; its files come with a config.json of their own or with the language model's.
    StoredHead(
        "v_head", "GPTRewardModel|LLMForSequenceRegression|.*ForCausalLM|.*LMHeadModel", True
    ),
)


def stored_head(config: ModelConfig, head: StoredHead = LANGUAGE_HEAD) -> StoredHead:
    """The head under the name by which files of the architecture keep it."""
    name = FAMILIES.get(config.architecture, OWN).tensors.get("head", LANGUAGE_HEAD.name)
    return replace(head, name=name) if head == LANGUAGE_HEAD else head


ATTENTION, MLP = (*QKV, "out"), ("gate", "up", "down")
PROJECTIONS = (*ATTENTION, *MLP)


def kernel_axes(module: str) -> tuple[int, int]:
    """How many of a kernel's axes are its input's, and how many its output's."""
    return 2 if module == "out" else 1, 2 if module in QKV else 1


def contracted(projection: str) -> int:
    """How many of a kernel's axes are its input's."""
    return kernel_axes(projection)[0]


def module_of(config: ModelConfig, projection: str) -> str:
    """Where a projection is in its layer, as in "attention/query"."""
    if projection in ATTENTION:
        return f"attention/{projection}"
    return f"mlp/{projection}" if config.experts == 1 else f"mlp/{EXPERTS}/{projection}"


def leading_axes(path: str) -> int:
    """How many axes of a kernel or a factor are numbers of layers and of experts."""
    return int(path.startswith(f"{STACKED}/")) + (f"/{EXPERTS}/" in path)


def of_expert(path: str, expert: int) -> str:
    """Where the table keeps one expert's part of the parameter at "layers_3/mlp/experts/up/kernel".

    Files hold each expert's kernels by themselves.
    """
    return path.replace(f"/{EXPERTS}/", f"/{EXPERTS}/{expert}/")


def stored_as(names: Mapping[str, str], path: str, rank: int = 1) -> Stored:
    """Where files keep the parameter at a path such as "layers_3/attention/query/kernel".

    How its axes lie follows from its kind alone: heads and their width are one axis, torch's Linear
    is [out, in], and GPT-2's Conv1D, known by its name c_*, [in, out]. `names` holds the modules'
    names, with {i} for a layer's number and {e} for an expert's; a norm's scale has `rank` axes
    here, and one in files.
    """
    module, _, leaf = path.rpartition("/")
    projection = module.rpartition("/")[2]
    numbers = re.match(rf"{STACKED}_(\d+)/(?:mlp/{EXPERTS}/(\d+)/)?", path)
    name = names[re.sub(r"_\d+(?=/)|(?<=/)\d+/", "", module)]
    name = name.format(i=numbers[1], e=numbers[2]) if numbers else name
    axes = kernel_axes(projection)
    groups = {"kernel": axes, "embedding": (1, 1), "bias": axes[1:]}
    convolution = name.rpartition(".")[2].startswith("c_")
    return Stored(
        f"{name}.{'bias' if leaf == 'bias' else 'weight'}",
        groups.get(leaf, (rank,)),
        transposed=leaf == "kernel" and not convolution,
    )


# Constants that older versions of transformers saved among the weights.
_BUFFERS = re.compile(r"\.\d+\.(attn|attention)\.(masked_)?bias$|\.rotary_emb\.inv_freq$")


def stored_places(config: ModelConfig, path: str) -> dict[str, tuple[int, ...]]:
    """The table's paths of a parameter in either layout, and where in its array each lies."""
    kind, _, rest = path.partition("/")
    layers = {f"{layer_name(layer)}/{rest}": (layer,) for layer in range(config.layers)}
    places: dict[str, tuple[int, ...]] = {**layers} if kind == STACKED else {path: ()}
    if f"/{EXPERTS}/" not in path:
        return places
    every = range(config.experts)
    return {of_expert(one, e): (*at, e) for one, at in places.items() for e in every}


@dataclass(frozen=True)
class Parameter:
    """One row of the table; its initialiser stands beside its shape and axes in `decoder.py`."""

    shape: tuple[int, ...]
    axes: Axes
    stored: Stored

    def read_outputs(
        self, tensors: Mapping[str, Any], summed: tuple[int, ...], index: Index
    ) -> np.ndarray:
        """Whole rows of it as a matrix [outputs, inputs]; `summed` as of `summed_axes`."""
        return self.stored.read_outputs(tensors[self.stored.name], self.shape, summed, index)

    def read(self, tensors: Mapping[str, Any], index: Index | None = None) -> np.ndarray:
        """A rectangular part of it, or all of it, from the tensors of files."""
        index = (slice(None),) * len(self.shape) if index is None else index
        return self.stored.read(tensors[self.stored.name], self.shape, index)


def decoder_parameters(
    config: ModelConfig, head: StoredHead = LANGUAGE_HEAD
) -> dict[str, Parameter]:
    """The table by paths of the per-layer layout, as in "layers_3/mlp/up/kernel".

    Each expert has rows of its own, "layers_3/mlp/experts/7/up/kernel". A language model's head is
    in it unless it is tied; a reward model's is `reward_head`'s.
    """
    family = FAMILIES.get(config.architecture, OWN)
    names = family.tensors | {"head": stored_head(config, head).name}
    rows: dict[str, tuple[tuple[int, ...], Axes]] = {}
    for path, (shape, axes) in declared(config).items():
        if leading_axes(path):
            each = (of_expert(path, expert) for expert in range(config.experts))
            rows |= dict.fromkeys(each, (shape[1:], axes[1:]))
        else:
            rows[path] = shape, axes
    table = {
        path: Parameter(shape, axes, stored_as(names, path, len(shape)))
        for path, (shape, axes) in rows.items()
    }
    return table | _sharing(table, config.heads if family.interleaved else 1)


def _sharing(table: Mapping[str, Parameter], stretches: int) -> dict[str, Parameter]:
    """The parameters that share a tensor, with their spans of it: side by side in each stretch."""
    shared: dict[str, dict[str, int]] = {}
    for path, row in table.items():
        shared.setdefault(row.stored.name, {})[path] = row.stored.grouped(row.shape)[-1]
    found: dict[str, Parameter] = {}
    for outputs in shared.values():
        start, total = 0, sum(outputs.values())
        for path in sorted(outputs, key=_place_of) if len(outputs) > 1 else ():
            stored = replace(table[path].stored, span=Span(start, total, stretches))
            found[path] = replace(table[path], stored=stored)
            start += outputs[path] // stretches
    return found


def _place_of(path: str) -> int:
    return PROJECTIONS.index(path.split("/")[-2])


def reward_head(
    config: ModelConfig, head: StoredHead, labels: int, *, bias: bool
) -> dict[str, Parameter]:
    """The rows of a reward model's head, which stands in the place of a language model's."""
    names = {"head": head.name}
    shapes = {"head/kernel": (config.head_inputs, labels)} | (
        {"head/bias": (labels,)} if bias else {}
    )
    axes: dict[str, Axes] = {"head/kernel": ("embed", None), "head/bias": (None,)}
    return {
        path: Parameter(shape, axes[path], stored_as(names, path)) for path, shape in shapes.items()
    }


@lru_cache(maxsize=16)
def declared(
    config: ModelConfig, scan_layers: bool = False
) -> Mapping[str, tuple[tuple[int, ...], Axes]]:
    """Shape and logical axes of every parameter, in either layout, by path."""
    # One layer is traced, whatever their number; the key is made inside: no device is looked for.
    boxed = jax.eval_shape(lambda: initial_params(config, jax.random.key(0), jnp.float32, True))
    flat = flatten_dict(boxed, sep="/")
    stacked = {path: (box.value.shape, tuple(box.names)) for path, box in flat.items()}
    if scan_layers:
        return stacked
    rows: dict[str, tuple[tuple[int, ...], Axes]] = {}
    for path, (shape, axes) in stacked.items():
        kind, _, rest = path.partition("/")
        if kind == STACKED:
            names = (f"{layer_name(layer)}/{rest}" for layer in range(config.layers))
            rows |= dict.fromkeys(names, (shape[1:], axes[1:]))
        else:
            rows[path] = shape, axes
    return rows


_IMAGES = re.compile(r"(model\.)?(vision_tower|multi_modal_projector)\.")


def is_of_images(config: ModelConfig, name: str) -> bool:
    """Whether a tensor belongs to the part of a multimodal checkpoint that is not read."""
    return config.architecture in TEXT_PARTS.values() and _IMAGES.match(name) is not None


def full_name(config: ModelConfig, name: str, head: StoredHead = LANGUAGE_HEAD) -> str | None:
    """A tensor's name with the prefix that base-model checkpoints leave out.

    None for what no parameter is read from: a buffer, the unused head of a wrapped language model,
    what reads images.
    """
    decoder = FAMILIES.get(config.architecture, OWN).prefix
    if is_of_images(config, name):
        return None
    if config.architecture in TEXT_PARTS.values():
        name = re.sub(r"^(model\.)?language_model\.(model\.)?", "", name)
    if head.wrapped:
        if name.removeprefix("model.") in (LANGUAGE_HEAD.weight, stored_head(config).weight):
            return None
        for prefix in (f"model.{decoder}", "transformer."):
            if name.startswith(prefix):
                name = decoder + name.removeprefix(prefix)
                break
    own = stored_head(config, head)
    if name == head.weight:
        return own.weight
    if name not in (own.weight, own.bias) and not name.startswith(decoder):
        name = decoder + name
    return None if _BUFFERS.search(name) else name


def stack_layers(params: dict, layers: int) -> dict:
    """The same parameters with the `layers_{i}` subtrees stacked as `layers`, [N, ...] each leaf.

    Stacked parameters are returned as they are.
    """
    if STACKED in params:
        return params
    params = input_major_params(params)
    names = [layer_name(layer) for layer in range(layers)]
    rest = {name: subtree for name, subtree in params.items() if name not in names}
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in names))
    return rest | {STACKED: stacked}


def summed_axes(path: str, tied: bool) -> tuple[int, ...] | None:
    """The axes of the matrix at "layers_3/mlp/up/kernel" that products sum over.

    Of an embedding those are a tied head's. None for what no product reads, and for experts.
    """
    module, _, leaf = path.rpartition("/")
    if f"/{EXPERTS}/" in path:
        return None
    if leaf == "kernel":
        return tuple(range(contracted(module.rpartition("/")[2])))
    return (1,) if path == "embed/embedding" and tied else None


def output_major_leaf(path: str, leaf: Any, *, tied: bool) -> Any:
    """A parameter as CPUs decode it: an `OutputMajor` of a matrix, anything else as it is.

    Of a quantised one only where a scale serves a whole channel: products of groups gain nothing.
    """
    axes = summed_axes(path, tied)
    grouped = isinstance(leaf, QTensor) and leaf.group is not None
    if axes is None or grouped or isinstance(leaf, OutputMajor):
        return leaf
    return output_major(leaf, axes)


def input_major_leaf(path: str, leaf: Any) -> Any:
    """A parameter in its own shape again, where it is an `OutputMajor`; else as it is."""
    if not isinstance(leaf, OutputMajor):
        return leaf
    axes = summed_axes(path, tied=True)
    assert axes is not None
    return input_major(leaf, axes)


def output_major_params(params: Mapping[str, Any], *, tied: bool) -> dict[str, Any]:
    """The parameters in the layout in which CPUs decode: every matrix is an `OutputMajor`.

    Args:
        params: A decoder's, its layers apart, quantised or not.
        tied: Whether the embedding is its head too.
    """
    flat = flatten_dict(dict(params), sep="/")
    kept = {path: output_major_leaf(path, leaf, tied=tied) for path, leaf in flat.items()}
    return unflatten_dict(kept, sep="/")


def is_output_major(params: Mapping[str, Any]) -> bool:
    """Whether any of a decoder's matrices is an `OutputMajor`."""
    return any(isinstance(leaf, OutputMajor) for leaf in flatten_dict(dict(params)).values())


def input_major_params(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with arrays again in place of every `OutputMajor`."""
    flat = flatten_dict(dict(params), sep="/")
    return unflatten_dict({p: input_major_leaf(p, leaf) for p, leaf in flat.items()}, sep="/")


def unstack_layers(params: dict) -> dict:
    """The same parameters with `layers` [N, ...] split into `layers_{i}` subtrees.

    Per-layer parameters are returned as they are.
    """
    if STACKED not in params:
        return params
    rest = {name: subtree for name, subtree in params.items() if name != STACKED}
    layers = jax.tree.leaves(params[STACKED])[0].shape[0]
    split = {
        layer_name(layer): jax.tree.map(lambda leaf, i=layer: leaf[i], params[STACKED])
        for layer in range(layers)
    }
    return rest | split
