"""Figures of multi-interest networks: the interests of one user, and learning curves."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.figures.style import BLUE, GREEN, GREY, ORANGE, PINK, RED, STYLE, settle_ticks

_COLOURS = (BLUE, ORANGE, GREEN, RED, PINK, GREY)


@STYLE
def user_interests(
    couplings: np.ndarray,
    items: Sequence[str],
    nearest: Sequence[Sequence[str]],
    *,
    title: str,
    groups: np.ndarray | None = None,
    over_items: bool = False,
) -> Figure:
    """Draw which items of a history each interest takes, and which items it finds.

    Args:
      couplings: `[J, I]`, of the interests that the user has.
      items: Names of the items, oldest first, `[I]`.
      nearest: Names of the items nearest to each interest, `[J]`.
      title: Whose history it is, at the start of the figure's title.
      groups: True groups of the items, int `[I]`; names of one group get one colour.
      over_items: Whether they are attention, which sums to 1 over the items, and not couplings,
        which do over the interests.
    """
    parents, children = couplings.shape
    longest = max(map(len, items))
    height = 1.1 + 0.24 * parents + 0.055 * longest
    figure = Figure((2.9 + max(2.2, 0.2 * children), height))
    axes = figure.subplots()
    image = axes.imshow(couplings, cmap="Blues", vmin=0, vmax=couplings.max(), aspect="auto")
    axes.set_yticks(
        range(parents), [f"interest {j + 1}: {', '.join(nearest[j])}" for j in range(parents)]
    )
    axes.set_xticks(range(children), items, rotation=90)
    axes.set_xlabel("items of the history, oldest first")
    axes.set_title(f"{title}: couplings, and nearest items")
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axes, pad=0.01)
    bar.set_label("attention" if over_items else "coupling")
    bar.outline.set_visible(False)
    if groups is not None:
        order = {group: index for index, group in enumerate(dict.fromkeys(groups.tolist()))}
        for label, group in zip(axes.get_xticklabels(), groups.tolist(), strict=True):
            label.set_color(_COLOURS[order[group] % len(_COLOURS)])
    settle_ticks(figure)
    return figure


@STYLE
def learning_curves(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Draw the training loss and the validation's recall over the epochs.

    Args:
      rows: The rows of `metrics.jsonl`.
    """
    figure = Figure((5.6, 2.2))
    left, right = figure.subplots(1, 2)
    left.plot([row["epoch"] for row in rows], [row["train_loss"] for row in rows], color=BLUE)
    left.set(xlabel="epoch", title="Training loss")
    measured = [row for row in rows if "validation_recall_50" in row]
    epochs = [row["epoch"] for row in measured]
    for k, colour in ((50, BLUE), (20, ORANGE)):
        values = [100 * row[f"validation_recall_{k}"] for row in measured]
        right.plot(epochs, values, color=colour, marker="o", label=f"recall@{k}")
    right.set(xlabel="epoch", title="Validation recall (%)", ylim=(0, None))
    right.legend()
    for axes in (left, right):
        axes.grid(visible=True)
    settle_ticks(figure)
    return figure
