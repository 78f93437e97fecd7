"""Passes over the votes, each a JAX primitive with a lowering rule for every platform.

A pass reads poses and weights once, and computes votes one tile at a time instead of storing them:

    v = u W + coordinates                          votes [B, I, J, D], with D = R·E
    l = prior + k + (b·v | b·v/|v| | -½ Σ_d q (v - z)²)     "linear", "cosine", "gaussian" logits
    c = softmax over j of l                        couplings; if leaky, with one more logit, 0
    w = gates · c
    moments = (Σ_i w v) | (Σ_i w, mean Σ_i w v / Σ_i w, Σ_i w (v - mean)²)    "sums", "central"

u are the poses, W the weights; k, b, q and z are the `State` that parents contribute. A child whose
logits are all -infinity has couplings 0. The passes are `moments`, `chain` (the gradient of the
state), `input_gradients` and `couplings`; `chain_and_input_gradients` is two of them in one, which
is less work on some backends. A backend is a module with these functions and `config_for`, which
raises `Unsupported` for arguments that the backend does not accept. The backend is selected by a
lowering rule, so a program for one platform contains no code for others.

Shape letters are those of `capsjax.shapes`: a pose is `[R, P]`, a weight `[P, E]`, a vote `[R, E]`.
"""

import contextlib
import dataclasses
import importlib
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, PartitionSpec

from capsjax.kernels.dispatch import Unsupported
from capsjax.kernels.dtypes import accumulation_dtype
from capsjax.kernels.sharding import vary_over, varying_axes
from capsjax.kernels.vote_passes import tuned
from capsjax.kernels.vote_passes.cases import Case

# An array or None: the Spec determines which, but type checkers cannot infer it.
MaybeArray = Any


@dataclasses.dataclass(frozen=True)
class Spec:
    """Static description of the passes of an algorithm, in the terms of the module."""

    num_parents: int  # J
    logits: str = "linear"  # or "cosine", "gaussian"
    moments: str = "sums"  # or "central"
    mass: bool = False  # whether "sums" include Σ_i w; "central" always do
    leaky: bool = False  # whether each softmax has one more logit, fixed at 0


class Inputs(NamedTuple):
    """Arrays that every pass of a routing reads; None for an absent one."""

    # [B, I, R, P]. If weights is None, these are the votes: [B, I, J, D], or [B, I, 1, D] if all
    # parents share them.
    poses: MaybeArray
    weights: MaybeArray  # [I, P, J, E], or [P, J, E] if all children share them
    gates: MaybeArray = None  # [B, I], factors on the couplings, at least 0, which masks a child
    prior: MaybeArray = None  # logits [I, J] or [B, I, J], -infinity included
    coordinates: MaybeArray = None  # [I, D], added to the votes of each child
    parent_mask: MaybeArray = None  # booleans [B, J]; couplings are 0 at False; no gradient


class State(NamedTuple):
    """Contributions of the parents to the logits of a pass; None for zeros."""

    k: MaybeArray = None  # [B, J], bias of the logits
    b: MaybeArray = None  # [B, J, D], of "linear" and "cosine" logits
    z: MaybeArray = None  # [B, J, D], mean of "gaussian" logits
    q: MaybeArray = None  # [B, J, D], precision (inverse variance) of "gaussian" logits

    @property
    def is_empty(self) -> bool:
        """Whether the contributions are all zero, as in the first pass of dynamic routing."""
        return all(x is None for x in self)


class Moments(NamedTuple):
    """Results of a pass for each parent, in the accumulation dtype."""

    mass: MaybeArray  # [B, J], Σ_i w; None for "sums" without mass
    first: MaybeArray  # [B, J, D], Σ_i w v for "sums", the mean for "central"
    second: MaybeArray = None  # [B, J, D], Σ_i w (v - mean)² for "central"


class Kept(NamedTuple):
    """What `chain` keeps for `input_gradients`, in the accumulation dtype.

    Only the same backend understands the numbers. Zeros, if it keeps none.
    """

    of_children: MaybeArray  # [B, 2, I]
    of_votes: tuple[MaybeArray, ...] = ()  # two arrays [B, I, J], where votes have kernels; or none


class Term(NamedTuple):
    """Residuals and cotangents of the pass of one iteration."""

    state: State
    moments: Any  # Moments; None for "sums", whose gradient does not depend on them
    cotangent: Moments  # of the moments
    kept: Any = None  # `Kept`, by `chain` for `input_gradients`


@dataclasses.dataclass(frozen=True)
class Implementation:
    """An implementation of the passes: its name, and settings."""

    name: str
    config: Any = None  # tile sizes; None selects them for the shapes
    interpret: Any = False  # `interpret` of pallas_call: runs a kernel on any platform, slowly


class Device(NamedTuple):
    """The devices that a program is lowered for."""

    kind: str | None = None  # JAX's `device_kind`; None if unknown
    num_devices: int = 1  # over which XLA's partitioner may shard the arrays
    processors: int | None = None  # multiprocessors of a GPU; None if unknown
    capability: tuple[int, int] | None = None  # compute capability of a GPU; None if unknown


# Names of implementations: modules of this package, which `_backend` imports at lowering.
IMPLEMENTATIONS = ("reference", "xla", "triton", "mosaic_tpu")
# The only platform of each kernel implementation.
PLATFORMS = {"triton": "cuda", "mosaic_tpu": "tpu"}
# JAX's names of GPUs of compute capability 9.0, which a described device does not tell.
HOPPER = re.compile(r"\bG?H(100|200|20|800)\b")
# Implementations to try, in order, if none is named; on any other platform "xla".
PREFERENCE = {"cuda": ("triton", "xla"), "tpu": ("mosaic_tpu", "xla")}


def moments(
    spec: Spec, inputs: Inputs, state: State, *, implementation: Implementation | None = None
) -> Moments:
    """Compute the moments: sums over children of couplings times votes."""
    return _bind(_moments, implementation, inputs, state, spec=spec)


def chain(
    spec: Spec, inputs: Inputs, term: Term, *, implementation: Implementation | None = None
) -> tuple[State, Kept]:
    """Compute the cotangent of the state from that of the moments.

    Also return what the backend keeps for `input_gradients`, as `kept` of the same term.
    """
    return _bind(_chain, implementation, inputs, term, spec=spec)


def input_gradients(
    spec: Spec,
    inputs: Inputs,
    terms: Sequence[Term],
    *,
    constant_couplings: bool = False,
    implementation: Implementation | None = None,
) -> Inputs:
    """Compute the input gradients summed over `terms`, at constant couplings or through them."""
    static = {"spec": spec, "constant_couplings": constant_couplings}
    return _bind(_input_gradients, implementation, inputs, tuple(terms), **static)


def chain_and_input_gradients(
    spec: Spec,
    inputs: Inputs,
    term: Term,
    so_far: Inputs | None,
    *,
    implementation: Implementation | None = None,
) -> tuple[State, Inputs]:
    """Compute the cotangent of the state, and add the term's input gradients to those `so_far`.

    The gradients are in the accumulation dtype.
    """
    return _bind(_chain_and_input_gradients, implementation, inputs, term, so_far, spec=spec)


def couplings(
    spec: Spec, inputs: Inputs, state: State, *, implementation: Implementation | None = None
) -> Array:
    """Compute the couplings `[B, I, J]`, without gates, in the accumulation dtype."""
    return _bind(_couplings, implementation, inputs, state, spec=spec)


def one_after_the_other(
    module: Any, spec: Spec, inputs: Inputs, term: Term, so_far: Inputs | None, **settings: Any
) -> tuple[State, Inputs]:
    """Run `chain_and_input_gradients` by the two passes of a backend's module."""
    d_state = term.state
    if not d_state.is_empty:
        d_state, kept = module.chain(spec, inputs, term, **settings)
        term = term._replace(kept=kept)
    found = module.input_gradients(spec, inputs, (term,), constant_couplings=False, **settings)
    dtype = accumulation_dtype(inputs.poses.dtype)
    found = jax.tree.map(lambda x: x.astype(dtype), found)
    return d_state, found if so_far is None else jax.tree.map(jnp.add, so_far, found)


def nothing_kept(spec: Spec, inputs: Inputs) -> Kept:
    """Return the `kept` of a backend whose `input_gradients` ignore it; XLA removes it."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), _kept(spec, inputs))


def _kept(spec: Spec, inputs: Inputs) -> Kept:
    """Return the shapes and dtypes of what `chain` keeps, the same on every backend."""
    batch, children, rows, _ = inputs.poses.shape
    struct = partial(jax.ShapeDtypeStruct, dtype=accumulation_dtype(inputs.poses.dtype))
    of_children = struct((batch, 2, children))
    holds_votes = spec.logits == "gaussian" or (spec.logits == "linear" and rows > 1)
    if inputs.weights is None or not holds_votes:
        return Kept(of_children)
    of_vote = struct((batch, children, spec.num_parents))
    return Kept(of_children, (of_vote, of_vote))


def has_examples(inputs: Inputs) -> Inputs:
    """Return, for each array that is not None, whether its first axis is the batch."""
    prior = inputs.prior is not None and inputs.prior.ndim in (3, 7)  # 7: of `windows`
    flags = True, False, True, prior, False, True
    return Inputs(*(None if x is None else y for x, y in zip(inputs, flags, strict=True)))


def votes_depth(inputs: Inputs) -> int:
    """Return D, the length of a vote."""
    rows, length = inputs.poses.shape[-2:]
    return length if inputs.weights is None else rows * inputs.weights.shape[-1]


def case_of(spec: Spec, inputs: Inputs, num_iterations: int = 1) -> Case:
    """Return the sizes of a pass; `num_iterations` counts the terms of `input_gradients`."""
    batch, children, rows, length = inputs.poses.shape
    depth, dtype = votes_depth(inputs), jnp.dtype(inputs.poses.dtype).name
    return Case(batch, children, length, spec.num_parents, depth, num_iterations, dtype, rows)


def is_uniform(inputs: Inputs, state: State) -> bool:
    """Return whether all couplings are equal, independently of the votes."""
    return inputs.prior is None and inputs.parent_mask is None and state.is_empty


@dataclasses.dataclass(frozen=True)
class Program:
    """A pass of one backend, as a function of the leaves of its arguments."""

    name: str  # of the pass
    backend: str
    spec: Spec
    settings: tuple[tuple[str, Any], ...]  # keywords of the backend's function
    structure: Any  # tree structure of the arguments
    mapped: tuple[tuple[int | None, ...], ...]  # in_axes of each enclosing vmap, innermost first
    precision: str | None  # jax.default_matmul_precision where the pass was called

    @partial(jax.jit, static_argnums=0)  # so that iterations share one trace and one lowering
    def votes_pass(self, *arrays: Array) -> list[Array]:
        """Run the pass on the leaves."""
        function = _function(self.backend, self.name)

        def run(*arrays: Array) -> list[Array]:
            trees = jax.tree.unflatten(self.structure, arrays)
            return jax.tree.leaves(function(self.spec, *trees, **dict(self.settings)))

        for axes in self.mapped:
            run = jax.vmap(run, axes)
        with jax.default_matmul_precision(self.precision):
            return run(*arrays)

    __call__ = votes_pass


def select(
    name: str,
    platform: str | None,
    device: Device,
    shapes: Sequence[Any],
    *,
    implementation: Implementation | None,
    structure: Any,
    mapped: tuple[tuple[int | None, ...], ...],
    precision: str | None,
    spec: Spec,
    **settings: Any,
) -> Program:
    """Select the backend of a pass for a platform; None is any platform without kernels.

    `shapes` are those of the leaves of the pass's arguments, with the axes of `mapped`.

    Raises:
      ValueError: The named implementation runs on another platform only.
      Unsupported: The named implementation does not accept the arguments.
    """
    named = implementation or Implementation("")
    only_on = PLATFORMS.get(named.name)
    if only_on not in (None, platform) and not named.interpret:
        raise ValueError(
            f"routing: implementation must run on the platform of the program, got "
            f"{named.name!r}, which runs on {only_on} only"
        )
    trees = jax.tree.unflatten(structure, _unmapped(shapes, mapped)[0])
    names = (named.name,) if implementation else PREFERENCE.get(platform or "", ("xla",))
    for backend in names:
        try:
            _function(backend, name)
            with jax.default_matmul_precision(precision):
                config = _backend(backend).config_for(spec, *trees, device=device)
        except Unsupported:
            if backend == names[-1]:
                raise
            continue
        settings["config"] = named.config or _tuned(config, name, backend, spec, trees, device)
        if backend in PLATFORMS:
            settings["interpret"] = named.interpret
        static = tuple(settings.items())
        return Program(name, backend, spec, static, structure, mapped, precision)
    raise AssertionError("unreachable: the last implementation is selected or raises")


def _tuned(
    default: Any, name: str, backend: str, spec: Spec, trees: Sequence[Any], device: Device
) -> Any:
    """Return the measured config of a pass, or the default if none was measured.

    They are measured on one device, with linear logits, sums and vectors as poses.
    """
    inputs, others, *_ = trees
    is_measured = spec == Spec(spec.num_parents) and inputs.poses.shape[2] == 1
    if not is_measured or device.num_devices > 1 or device.kind is None:
        return default
    case = case_of(spec, inputs, len(others) if name == "input_gradients" else 1)
    return tuned.find(backend, case, device.kind, type(default)) or default


def _backend(name: str) -> Any:
    try:
        return importlib.import_module(f"{__package__}.{name}")
    except ImportError as missing:
        raise Unsupported(
            f"routing: this version of JAX lacks what implementation {name!r} needs "
            f"({missing}); name 'xla', or install another version"
        ) from missing


def _function(backend: str, name: str) -> Callable[..., Any]:
    module = _backend(backend)
    if hasattr(module, name):
        return getattr(module, name)
    if name == "chain_and_input_gradients":
        return partial(one_after_the_other, module)
    raise Unsupported(f"routing: implementation {backend!r} has no pass for {name}")


def _unmapped(
    shapes: Sequence[Any], mapped: tuple[tuple[int | None, ...], ...]
) -> tuple[list[jax.ShapeDtypeStruct], list[int]]:
    """Return the shapes inside all vmaps, and the sizes of the vmaps, outermost first."""
    inner = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes]
    sizes = []
    for axes in reversed(mapped):
        pairs = list(zip(inner, axes, strict=True))
        sizes.append(next(x.shape[axis] for x, axis in pairs if axis is not None))
        inner = [
            x if a is None else jax.ShapeDtypeStruct(x.shape[:a] + x.shape[a + 1 :], x.dtype)
            for x, a in pairs
        ]
    return inner, sizes


def _results(name: str, trees: Any, spec: Spec) -> Any:
    """Return the results of a pass as a tree of shapes and dtypes."""
    inputs = trees[0]
    dtype = accumulation_dtype(inputs.poses.dtype)
    examples, children = inputs.poses.shape[:2]

    def of_parents(*depth: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((examples, spec.num_parents, *depth), dtype)

    def alike(tree: Any, dtype: Any = None) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype), tree)

    if name == "moments":
        central, depth = spec.moments == "central", votes_depth(inputs)
        mass = of_parents() if spec.mass or central else None
        return Moments(mass, of_parents(depth), of_parents(depth) if central else None)
    if name == "chain":
        return alike(trees[1].state), _kept(spec, inputs)
    differentiable = inputs._replace(parent_mask=None)
    if name == "input_gradients":
        return alike(differentiable)
    if name == "chain_and_input_gradients":
        return alike(trees[1].state), alike(differentiable, dtype)
    return jax.ShapeDtypeStruct((examples, children, spec.num_parents), dtype)


def _bind(primitive: Primitive, implementation: Implementation | None, *trees: Any, **static: Any):
    leaves, structure = jax.tree.flatten(trees)
    leaves = vary_over(varying_axes(leaves), leaves)
    precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    static |= {"implementation": implementation, "precision": precision}
    results = primitive.bind(*leaves, structure=structure, mapped=(), **static)
    like = _results(primitive.name, trees, static["spec"])
    return jax.tree.unflatten(jax.tree.structure(like), results)


@partial(jax.jit, static_argnums=(0, 1))
def _run(primitive: Primitive, params: tuple[tuple[str, Any], ...], *arrays: Array) -> Any:
    return primitive.bind(*arrays, **dict(params))


def _abstract(name: str, *arrays: Any, structure: Any, mapped: Any, spec: Spec, **_: Any) -> Any:
    """Return the types of the results; each vmap adds a leading axis."""
    shapes, sizes = _unmapped(arrays, mapped)
    results = jax.tree.leaves(_results(name, jax.tree.unflatten(structure, shapes), spec))
    first = arrays[0]

    def typed(x: Any) -> Any:
        shape = (*sizes, *x.shape)
        if not first.manual_axis_type.varying:
            return ShapedArray(shape, x.dtype)
        sharding = NamedSharding(first.sharding.mesh, PartitionSpec(*(None,) * len(shape)))
        return first.update(shape=shape, dtype=x.dtype, sharding=sharding)

    return [typed(x) for x in results]


def _lower(name: str, platform: str | None, context: Any, *arrays: Any, **params: Any) -> Any:
    # Traced with plain shapes, without mesh axes: a kernel runs on each device by itself.
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in context.avals_in]
    device = _device(context)
    with _for_triton() if platform == "cuda" else contextlib.nullcontext():
        program = select(name, platform, device, shapes, **params)
        jaxpr = jax.make_jaxpr(program.votes_pass)(*shapes)
        lower = mlir.lower_fun(jaxpr_as_fun(jaxpr))
        return lower(context.replace(avals_in=jaxpr.in_avals, avals_out=jaxpr.out_avals), *arrays)


@contextlib.contextmanager
def _for_triton() -> Iterator[None]:
    """Import and lower Pallas-Triton kernels as JAX 0.11 and newer need it.

    They warn that the backend will be removed, which the error of `_backend` will explain then, and
    ask which GPU a program is for, where there is none: one that JAX knows by name has to stand for
    any from sm_80 on.
    """
    mesh = jax.sharding.get_abstract_mesh()
    known = mesh.abstract_device is not None or jax.devices()[0].platform == "gpu"
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    described = AbstractMesh(
        mesh.axis_sizes, mesh.axis_names, mesh.axis_types, abstract_device=device
    )
    with warnings.catch_warnings():
        message = "The Pallas Triton backend is deprecated"
        warnings.filterwarnings("ignore", message, DeprecationWarning)
        with contextlib.nullcontext() if known else jax.sharding.use_abstract_mesh(described):
            yield


def device_named(kind: str, cores: int | None, *, num_devices: int = 1) -> Device:
    """Return a device that JAX only describes, by its `device_kind` and number of cores."""
    return Device(kind, num_devices, cores, (9, 0) if HOPPER.search(kind) else None)


def _device(context: mlir.LoweringRuleContext) -> Device:
    """Return the devices that a program is lowered for, as far as JAX knows them."""
    axes: Any = context.module_context.axis_context
    described = jax.sharding.get_abstract_mesh().abstract_device
    device = jax.devices()[0]
    mesh = getattr(axes, "mesh", None)  # of a shard_map
    if mesh is None:
        count = axes.num_devices
    else:
        automatic = set(mesh.axis_names) - set(axes.manual_axes) - set(mesh.manual_axes)
        count = math.prod(mesh.shape[name] for name in automatic)
        described = described or mesh.abstract_mesh.abstract_device
        if isinstance(mesh, Mesh):
            device = mesh.devices.flat[0]
    if described is not None:
        return device_named(described.device_kind, described.num_cores, num_devices=count)
    if device.platform != "gpu":
        return Device(device.device_kind, count)
    major, minor = map(int, device.compute_capability.split("."))
    return Device(device.device_kind, count, device.core_count, (major, minor))


def _jvp(primitive: Primitive, primals: Any, tangents: Any, *, spec: Spec, **params: Any) -> Any:
    """Differentiate the `xla` form of the pass, for gradients of gradients."""
    active = [k for k, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in map(jax.typeof, primals)]
    params |= {"spec": spec}
    plain = params | {"implementation": Implementation("xla")}
    program = select(primitive.name, None, Device(), shapes, **plain)

    def on_active(*arrays: Array) -> list[Array]:
        all_arrays = list(primals)
        for k, array in zip(active, arrays, strict=True):
            all_arrays[k] = array
        return program(*all_arrays)

    _, results = jax.jvp(on_active, [primals[k] for k in active], [tangents[k] for k in active])
    return primitive.bind(*primals, **params), results


def _batch(
    primitive: Primitive, arrays: Any, axes: Any, *, structure: Any, mapped: Any, **params: Any
) -> Any:
    """Merge a mapped axis into the batch, or vmap the pass if weights or other such are mapped."""
    size = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)
    shapes, _ = _unmapped(arrays, (tuple(axes),))
    inputs, *others = jax.tree.unflatten(structure, shapes)
    flags = jax.tree.leaves((has_examples(inputs), jax.tree.map(lambda _: True, others)))
    # Gradients of weights are sums over the examples of one element of the mapped axis only.
    merges = "input_gradients" not in primitive.name and not mapped
    if merges and all(flag or axis is None for flag, axis in zip(flags, axes, strict=True)):

        def merge(x: Array, flag: bool, axis: int | None) -> Array:
            if not flag:
                return x
            x = jnp.broadcast_to(x[None], (size, *x.shape)) if axis is None else x
            x = x if axis is None else jnp.moveaxis(x, axis, 0)
            return x.reshape(-1, *x.shape[2:])

        merged = map(merge, arrays, flags, axes)
        results = primitive.bind(*merged, structure=structure, mapped=(), **params)
        return [x.reshape(size, -1, *x.shape[1:]) for x in results], [0] * len(results)
    mapped = (*mapped, tuple(axes))
    results = primitive.bind(*arrays, structure=structure, mapped=mapped, **params)
    return results, [0] * len(results)


def _make_primitive(name: str) -> Primitive:
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_impl(lambda *arrays, **params: _run(primitive, tuple(params.items()), *arrays))
    primitive.def_abstract_eval(partial(_abstract, name))
    mlir.register_lowering(primitive, partial(_lower, name, None))
    for platform in PREFERENCE:
        mlir.register_lowering(primitive, partial(_lower, name, platform), platform=platform)
    ad.primitive_jvps[primitive] = partial(_jvp, primitive)
    batching.primitive_batchers[primitive] = partial(_batch, primitive)
    return primitive


_moments = _make_primitive("moments")
_chain = _make_primitive("chain")
_input_gradients = _make_primitive("input_gradients")
_chain_and_input_gradients = _make_primitive("chain_and_input_gradients")
_couplings = _make_primitive("couplings")
