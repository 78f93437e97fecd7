"""The one dispatcher: by name, or by the platform that a program is lowered for."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import jax
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

Implementation = Callable[..., Any]


class Unsupported(NotImplementedError):
    """This implementation cannot take these arguments; another one may."""


def dispatch(
    op: str,
    implementations: Mapping[str, Implementation],
    preference: Mapping[str, Sequence[str]],
    platforms: Mapping[str, str],
    implementation: str | None,
    *arrays: Any,
    **settings: Any,
) -> Any:
    """Calls the implementation of that name, or the platform's first that takes the arguments.

    Args:
      op: The operation's name, for messages.
      implementations: Function by name; all take `(*arrays, **settings)` and return the same.
      preference: For a platform of `jax.lax.platform_dependent` (`"cpu"`, `"cuda"`, `"tpu"` …)
        the names to try in order; `"default"` stands for every other platform.
      platforms: The platform of each implementation that runs on one only.
      implementation: A name, or None to choose when the program is lowered, which is right
        under `jit`, `vmap`, `grad` and `jax.export`, whatever devices are at hand.
      *arrays: The operation's arrays; None stands for an absent one.
      **settings: The operation's static settings.

    Raises:
      ValueError: `implementation` is not in the table, or, while the program is lowered, runs on
        another platform than the program's.
      Unsupported: The named implementation, or each of a platform's, refused the arguments.
    """
    if implementation is not None:
        if implementation not in implementations:
            raise ValueError(
                f"{op}: implementation must be None or one of "
                f"{', '.join(implementations)}, got {implementation!r}"
            )
        call = partial(implementations[implementation], **settings)
        if implementation not in platforms:
            return call(*arrays)
        platform = platforms[implementation]
        rule = f"{op}: implementation {implementation!r} runs on {platform}"
        refuse = partial(_refuse, call, rule)
        return lax.platform_dependent(*arrays, **{platform: call, "default": refuse})

    def first_supported(names: Sequence[str]) -> Implementation:
        def call(*arrays: Any) -> Any:
            reasons = []
            for name in names:
                try:
                    return implementations[name](*arrays, **settings)
                except Unsupported as reason:
                    reasons.append(f"{name}: {reason}")
            raise Unsupported(f"{op}: no implementation takes these arguments: {reasons}")

        return call

    branches = {platform: first_supported(names) for platform, names in preference.items()}
    if len(branches) == 1:
        return branches["default"](*arrays)
    return lax.platform_dependent(*arrays, **branches)


# Tracing does not know the platform; lowering does, and there this operation raises its error.
# Outside `jit` nothing is lowered, and the platform is the default one.
_refused = Primitive("refused")
_refused.multiple_results = True


@_refused.def_abstract_eval
def _refused_shapes(*, shapes: Sequence[Any], rule: str) -> Sequence[Any]:
    del rule
    return shapes


@_refused.def_impl
def _refuse_at_once(*, shapes: Any, rule: str) -> NoReturn:
    del shapes
    raise ValueError(f"{rule}, got a program for {jax.default_backend()}")


def _refuse_in_lowering(context: mlir.LoweringRuleContext, *, shapes: Any, rule: str) -> NoReturn:
    del shapes
    raise ValueError(f"{rule}, got a program for {', '.join(context.module_context.platforms)}")


mlir.register_lowering(_refused, _refuse_in_lowering)


def _refuse(call: Implementation, rule: str, *arrays: Any) -> Any:
    """Has the structure and types of what `call` returns, and cannot be lowered."""
    program, like = jax.make_jaxpr(call, return_shape=True)(*arrays)
    results = _refused.bind(shapes=tuple(program.out_avals), rule=rule)
    return jax.tree.unflatten(jax.tree.structure(like), results)
