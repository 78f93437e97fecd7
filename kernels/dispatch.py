"""Selects an implementation of an operation by name, or by the platform of the program."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax import lax

Implementation = Callable[..., Any]


class Unsupported(NotImplementedError):
    """This implementation cannot take these arguments; another one may."""


def dispatch(
    op: str,
    implementations: Mapping[str, Implementation],
    preference: Mapping[str, Sequence[str]],
    implementation: str | None,
    *arrays: Any,
    **settings: Any,
) -> Any:
    """Calls the implementation of a name, or the platform's first that takes the arguments.

    Args:
      op: The operation's name, for messages.
      implementations: Function by name; all take `(*arrays, **settings)` and return the same.
      preference: For a platform of `jax.lax.platform_dependent` (`"cpu"`, `"cuda"`, `"tpu"` …)
        the names to try in order; `"default"` stands for every other platform.
      implementation: A name, or None to choose when the program is lowered, which is right
        under `jit`, `vmap`, `grad` and `jax.export`, whatever devices are at hand.
      *arrays: The operation's arrays; None stands for an absent one.
      **settings: The operation's static settings.

    Raises:
      ValueError: `implementation` is not in the table.
      Unsupported: The named implementation, or each of a platform's, refused the arguments.
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
