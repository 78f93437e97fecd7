"""Selection of an implementation by name or by lowering platform."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax import lax

Implementation = Callable[..., Any]


class Unsupported(NotImplementedError):
    """An implementation does not accept the arguments; another one may."""


def dispatch(
    op: str,
    implementations: Mapping[str, Implementation],
    preference: Mapping[str, Sequence[str]],
    implementation: str | None,
    *arrays: Any,
    **settings: Any,
) -> Any:
    """Call a named implementation, or the platform's first that accepts the arguments.

    Args:
      op: The operation's name, for error messages.
      implementations: Functions by name, which accept `(*arrays, **settings)` and agree in the
        shapes and dtypes of their results.
      preference: For each platform of `jax.lax.platform_dependent` (`"cpu"`, `"cuda"`, `"tpu"` …),
        the names to try in order; `"default"` is any other platform.
      implementation: A name, or None to select at lowering: unlike a selection by available
        devices, this is correct under `jit`, `vmap`, `grad` and `jax.export`.
      *arrays: The operation's arrays; None for an absent one.
      **settings: The operation's static settings.

    Raises:
      ValueError: No implementation has the name.
      Unsupported: The named implementation, or every one of a platform, refuses the arguments.
    """
    if implementation is not None:
        if implementation not in implementations:
            raise ValueError(
                f"{op}: implementation must be None or one of "
                f"{', '.join(implementations)}, got {implementation!r}"
            )
        return implementations[implementation](*arrays, **settings)

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
