"""What a pass over the votes computes, and one JAX primitive a pass, lowered per platform.

A pass walks once over poses and weights. It rebuilds each tile of votes, and never stores them:

    v = u W + coordinates                          votes [B, I, J, D], with D = R·C
    l = prior + k + (b·v | b·v/|v| | -½ Σ_d q (v - z)²)     "linear", "cosine", "gaussian" logits
    c = softmax over j of l                        couplings; leaky: with one more logit 0
    w = gates · c
    moments = (Σ_i w v) | (Σ_i w, mean Σ_i w v / Σ_i w, Σ_i w (v - mean)²)    "sums", "central"

A child whose logits are all -infinity has couplings 0. The four passes are `moments`, `chain`
(the gradient of the state), `input_gradients` and `couplings`. A backend is a module with these
functions, which raise `Unsupported` for what they do not take; which one runs is decided when a
program is lowered, so a program for one platform contains nothing of the others.

Shape letters are those of `capsjax.shapes`; matrix poses have R rows: a pose is `[R, P]`, a weight
`[P, C]`, a vote `[R, C]`. A vector is a matrix of one row.
"""

import dataclasses
import importlib
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from capsjax.kernels.dispatch import Unsupported
from capsjax.kernels.dtypes import accumulation_dtype
from capsjax.kernels.sharding import vary_over, varying_axes
from capsjax.kernels.vote_passes.cases import Case

# An array or None; which of both follows from a Spec, in a way that type checkers do not follow.
MaybeArray = Any


@dataclasses.dataclass(frozen=True)
class Spec:
    """What the passes of one algorithm compute; static."""

    num_parents: int  # J
    logits: str = "linear"  # or "cosine", "gaussian"
    moments: str = "sums"  # or "central"
    mass: bool = False  # "sums" return Σ_i w too; "central" always do
    leaky: bool = False  # a child may go to no parent: one more logit, fixed at 0


class Inputs(NamedTuple):
    """The large arrays, which every pass reads; None for an absent one."""

    # [B, I, R, P]. Without weights these are the votes: [B, I, J, D], or [B, I, 1, D] for votes
    # that all parents share.
    poses: MaybeArray
    weights: MaybeArray  # [I, P, J, C], or [P, J, C] if the children share them
    gates: MaybeArray = None  # [B, I], factors on couplings; 0 for a child that is not there
    prior: MaybeArray = None  # logits, [I, J] or [B, I, J]; -infinity allowed
    coordinates: MaybeArray = None  # added to a child's votes, [I, D]
    parent_mask: MaybeArray = None  # booleans [B, J]; False: no couplings; not differentiable


class State(NamedTuple):
    """What the parents contribute to the logits of a pass; None for zero."""

    k: MaybeArray = None  # [B, J]
    b: MaybeArray = None  # [B, J, D], of "linear" and "cosine" logits
    z: MaybeArray = None  # [B, J, D], of "gaussian" logits
    q: MaybeArray = None  # [B, J, D], of "gaussian" logits

    @property
    def is_empty(self) -> bool:
        """Whether parents contribute nothing, as before the first step."""
        return all(x is None for x in self)


class Moments(NamedTuple):
    """What a pass returns to the parents, in the accumulation dtype."""

    mass: MaybeArray  # Σ_i w, [B, J]
    first: MaybeArray  # Σ_i w v, or with "central" the mean, [B, J, D]
    second: MaybeArray = None  # "central": Σ_i w (v - mean)², [B, J, D]


class Term(NamedTuple):
    """What one iteration adds to the gradients of the inputs."""

    state: State
    moments: Any  # Moments, or None for "sums", which do not need them
    cotangent: Moments


@dataclasses.dataclass(frozen=True)
class Implementation:
    """An implementation of the passes, with settings beyond its name."""

    name: str
    config: Any = None  # its tile sizes; None: chosen for the shapes
    interpret: Any = False  # run a kernel's arithmetic on any platform, slowly


class Device(NamedTuple):
    """What a program is lowered for."""

    kind: str | None = None  # as JAX names it; None: unknown
    num_devices: int = 1  # over which XLA's partitioner may split the arrays


# Modules of this package, imported when a program needs them: "reference" stores the votes.
IMPLEMENTATIONS = ("reference", "xla", "triton", "mosaic_tpu")
# The platform of those that run on one only.
PLATFORMS = {"triton": "cuda", "mosaic_tpu": "tpu"}
# What an implementation of None stands for: the first that takes the arguments.
PREFERENCE = {"cuda": ("triton", "xla"), "tpu": ("mosaic_tpu", "xla")}


def moments(
    spec: Spec, inputs: Inputs, state: State, *, implementation: Implementation | None = None
) -> Moments:
    """Sums couplings times votes over the children."""
    return _bind(_moments, implementation, inputs, state, spec=spec)


def chain(
    spec: Spec, inputs: Inputs, term: Term, *, implementation: Implementation | None = None
) -> State:
    """Returns the gradient of the state from that of the moments."""
    return _bind(_chain, implementation, inputs, term, spec=spec)


def input_gradients(
    spec: Spec,
    inputs: Inputs,
    terms: Sequence[Term],
    *,
    constant_couplings: bool = False,
    implementation: Implementation | None = None,
) -> Inputs:
    """Returns the gradients of the inputs, summed over iterations; None for the parent mask."""
    static = {"spec": spec, "constant_couplings": constant_couplings}
    return _bind(_input_gradients, implementation, inputs, tuple(terms), **static)


def couplings(
    spec: Spec, inputs: Inputs, state: State, *, implementation: Implementation | None = None
) -> Array:
    """Returns the couplings `[B, I, J]`, before gates, in the accumulation dtype."""
    return _bind(_couplings, implementation, inputs, state, spec=spec)


def has_examples(inputs: Inputs) -> Inputs:
    """Returns, for each array that there is, whether examples lie along its first axis."""
    prior = inputs.prior is not None and inputs.prior.ndim == 3
    flags = True, False, True, prior, False, True
    return Inputs(*(None if x is None else y for x, y in zip(inputs, flags, strict=True)))


def votes_depth(inputs: Inputs) -> int:
    """Returns D."""
    rows, length = inputs.poses.shape[2:]
    return length if inputs.weights is None else rows * inputs.weights.shape[-1]


def case_of(spec: Spec, inputs: Inputs, num_iterations: int = 1) -> Case:
    """Returns the sizes of a pass over so many iterations."""
    batch, children, _, length = inputs.poses.shape
    depth, dtype = votes_depth(inputs), jnp.dtype(inputs.poses.dtype).name
    return Case(batch, children, length, spec.num_parents, depth, num_iterations, dtype)


def is_uniform(inputs: Inputs, state: State) -> bool:
    """Returns whether all couplings are equal whatever the votes, as in a first pass."""
    return inputs.prior is None and inputs.parent_mask is None and state.is_empty


@dataclasses.dataclass(frozen=True)
class Program:
    """A pass of one backend as a function of flat arrays."""

    name: str  # of the pass
    backend: str
    spec: Spec
    settings: tuple[tuple[str, Any], ...]  # keywords of the backend's function
    structure: Any  # of the trees that the arrays are the leaves of
    mapped: tuple[tuple[int | None, ...], ...]  # axes of each surrounding vmap, innermost first

    @partial(jax.jit, static_argnums=0)  # a later iteration's pass is traced and lowered once
    def votes_pass(self, *arrays: Array) -> list[Array]:
        """Runs the pass."""
        function = getattr(_backend(self.backend), self.name)

        def run(*arrays: Array) -> list[Array]:
            trees = jax.tree.unflatten(self.structure, arrays)
            return jax.tree.leaves(function(self.spec, *trees, **dict(self.settings)))

        for axes in self.mapped:
            run = jax.vmap(run, axes)
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
    spec: Spec,
    **settings: Any,
) -> Program:
    """Returns what a pass becomes in a program for a platform; None: one without kernels.

    Raises:
      ValueError: The implementation that is named runs on another platform.
      Unsupported: The implementation that is named does not take these arguments.
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
            module = _backend(backend)
            if not hasattr(module, name):
                raise Unsupported(f"routing: implementation {backend!r} has no pass for {name}")
            config = module.config_for(spec, *trees, device=device)
        except Unsupported:
            if backend == names[-1]:
                raise
            continue
        settings["config"] = named.config or config
        if backend in PLATFORMS:
            settings["interpret"] = named.interpret
        return Program(name, backend, spec, tuple(settings.items()), structure, mapped)
    raise AssertionError("the last implementation is chosen, or raises")


def _backend(name: str) -> Any:
    try:
        return importlib.import_module(f"{__package__}.{name}")
    except ImportError as missing:
        raise Unsupported(
            f"routing: this version of JAX lacks what implementation {name!r} needs "
            f"({missing}); name 'xla', or install another version"
        ) from missing


def _unmapped(
    shapes: Sequence[Any], mapped: tuple[tuple[int | None, ...], ...]
) -> tuple[list[jax.ShapeDtypeStruct], list[int]]:
    """Returns the shapes inside all vmaps, and the sizes of their axes, outermost first."""
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
    """Returns the shapes and dtypes of a pass's results."""
    inputs = trees[0]
    dtype = accumulation_dtype(inputs.poses.dtype)
    examples, children = inputs.poses.shape[:2]

    def of_parents(*depth: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((examples, spec.num_parents, *depth), dtype)

    def alike(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)

    if name == "moments":
        central, depth = spec.moments == "central", votes_depth(inputs)
        mass = of_parents() if spec.mass or central else None
        return Moments(mass, of_parents(depth), of_parents(depth) if central else None)
    if name == "chain":
        return alike(trees[1].state)
    if name == "input_gradients":
        return alike(inputs._replace(parent_mask=None))
    return jax.ShapeDtypeStruct((examples, children, spec.num_parents), dtype)


def _bind(primitive: Primitive, implementation: Implementation | None, *trees: Any, **static: Any):
    leaves, structure = jax.tree.flatten(trees)
    leaves = vary_over(varying_axes(leaves), leaves)
    results = primitive.bind(
        *leaves, implementation=implementation, structure=structure, mapped=(), **static
    )
    like = _results(primitive.name, trees, static["spec"])
    return jax.tree.unflatten(jax.tree.structure(like), results)


@partial(jax.jit, static_argnums=(0, 1))
def _run(primitive: Primitive, params: tuple[tuple[str, Any], ...], *arrays: Array) -> Any:
    return primitive.bind(*arrays, **dict(params))


def _abstract(name: str, *arrays: Any, structure: Any, mapped: Any, spec: Spec, **_: Any) -> Any:
    """The types of the results: a leading axis for each vmap, varying over a mesh as the arrays."""
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
    # Plain shapes: inside a pass there is no mesh, of which kernels know nothing.
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in context.avals_in]
    program = select(name, platform, _device(context), shapes, **params)
    jaxpr = jax.make_jaxpr(program.votes_pass)(*shapes)
    lower = mlir.lower_fun(jaxpr_as_fun(jaxpr))
    return lower(context.replace(avals_in=jaxpr.in_avals, avals_out=jaxpr.out_avals), *arrays)


def _device(context: mlir.LoweringRuleContext) -> Device:
    """Returns what JAX knows, while it lowers a program, of the devices that it is for."""
    axes: Any = context.module_context.axis_context
    described = jax.sharding.get_abstract_mesh().abstract_device
    devices = jax.devices()
    mesh = getattr(axes, "mesh", None)  # of a shard_map
    if mesh is None:
        count = axes.num_devices
    else:
        automatic = set(mesh.axis_names) - set(axes.manual_axes) - set(mesh.manual_axes)
        count = math.prod(mesh.shape[name] for name in automatic)
        described = described or mesh.abstract_mesh.abstract_device
        if isinstance(mesh, Mesh):
            devices = list(mesh.devices.flat)
    return Device(described.device_kind if described else devices[0].device_kind, count)


def _jvp(primitive: Primitive, primals: Any, tangents: Any, *, spec: Spec, **params: Any) -> Any:
    """Differentiates the plain pass, as for gradients of gradients."""
    moving = [k for k, tangent in enumerate(tangents) if not isinstance(tangent, ad.Zero)]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in map(jax.typeof, primals)]
    params |= {"spec": spec}
    plain = params | {"implementation": Implementation("xla")}
    program = select(primitive.name, None, Device(), shapes, **plain)

    def of_moving(*arrays: Array) -> list[Array]:
        all_arrays = list(primals)
        for k, array in zip(moving, arrays, strict=True):
            all_arrays[k] = array
        return program(*all_arrays)

    _, results = jax.jvp(of_moving, [primals[k] for k in moving], [tangents[k] for k in moving])
    return primitive.bind(*primals, **params), results


def _batch(
    primitive: Primitive, arrays: Any, axes: Any, *, structure: Any, mapped: Any, **params: Any
) -> Any:
    """Maps over examples by routing more of them; over anything else by `vmap` of the pass."""
    size = next(x.shape[axis] for x, axis in zip(arrays, axes, strict=True) if axis is not None)
    shapes, _ = _unmapped(arrays, (tuple(axes),))
    inputs, others = jax.tree.unflatten(structure, shapes)
    flags = jax.tree.leaves((has_examples(inputs), jax.tree.map(lambda _: True, others)))
    merges = primitive.name != "input_gradients" and not mapped
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


def _make(name: str) -> Primitive:
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


_moments, _chain, _input_gradients, _couplings = map(
    _make, ("moments", "chain", "input_gradients", "couplings")
)
