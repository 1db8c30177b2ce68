"""Sentences about an audit, each with its numbers."""

from __future__ import annotations

import numpy as np

from ranktuner_jax.diagnostics.report import aggregates
from ranktuner_jax.diagnostics.report.aggregates import Aggregates
from ranktuner_jax.diagnostics.report.audit_charts import mass_groups
from ranktuner_jax.diagnostics.report.audited import label
from ranktuner_jax.diagnostics.report.phrasing import counted, listed, number, ordinal, percent

__all__ = ["agreement", "effective", "expected_rank", "loss_mass", "plane", "rank", "weights"]

# Methods that sentences compare, where the audit has them: the paper's own choice first.
_COMPARED = ("ranktuner", "dft", "eaft", "sft")


def compared(sums: Aggregates) -> list[int]:
    """The indices of the methods that sentences compare; all others if none of these is there."""
    known = [sums.methods.index(name) for name in _COMPARED if name in sums.methods]
    return known or list(range(min(3, len(sums.methods))))


def plane(sums: Aggregates) -> list[str]:
    """On the (p, H) plane and the Noise Region."""
    share = sums.regions / sums.tokens
    total = np.where(sums.weight == 0, 1.0, sums.weight)
    weight = sums.regions_weight / total[:, None]
    order = np.argsort(-share[:4])
    biggest, conflict = int(order[0]), 1
    gives = [
        f"{label(sums.methods[m])} gives them {percent(weight[m, 4])}"
        if i == 0
        else f"{label(sums.methods[m])} {percent(weight[m, 4])}"
        for i, m in enumerate(compared(sums))
    ]
    name, where = aggregates.QUADRANTS[biggest].split(": ")
    sentences = [
        "Each cell is a range of the label's probability p and of the entropy H; the stronger its "
        f"colour, the more of the {counted(sums.tokens, 'token')} it holds. "
        f"{percent(share[biggest])} of them lie in the quadrant “{name}” ({where}).",
        f"{percent(share[4])} of the tokens lie in the Noise Region: their label is not the first "
        "choice, but ranks where the prediction leads one to expect (|I − 1| < 0.05, R > 1). "
        + (
            f"Of the total weight, {', '.join(gives)}."
            if sums.regions[4]
            else "No method has any weight to give there."
        ),
    ]
    if sums.regions[4]:
        sentences.append(
            "The orange line is the largest p that such a token can have at its entropy; in cells "
            "with a dot at least half of the tokens are in the region."
        )
        light = int(np.argmin(weight[:, 4] / max(share[4], 1e-30)))
        sentences.append(
            f"The method that gives the region the least is {label(sums.methods[light])} "
            f"({percent(weight[light, 4])} of its weight)."
        )
    if sums.regions[conflict]:
        heavy = int(np.argmax(weight[:, conflict]))
        sentences.append(
            f"{percent(share[conflict])} are conflicts: the prediction is narrow, and most of it "
            f"is not the label; {label(sums.methods[heavy])} gives them the most, "
            f"{percent(weight[heavy, conflict])} of its weight."
        )
    return sentences


def rank(sums: Aggregates) -> list[str]:
    """On R under 1/p."""
    top, behind = sums.sums["top"] / sums.tokens, sums.tokens - sums.sums["top"]
    sentences = [
        "A label of probability p can have at most 1/p tokens as likely as itself, so every token "
        "lies on or under the line; how far under says how uneven its betters are.",
        f"{percent(top)} of the labels are the model's first choice (R = 1)."
        + (
            f" Of the other {counted(int(behind), 'token')}, {percent(sums.sums['near'] / behind)} "
            + ("reach" if behind != 1 else "reaches")
            + " at least half of the bound."
            if behind
            else ""
        ),
    ]
    if above := int(sums.sums["above"]):
        sentences.append(
            f"{counted(above, 'token')} {'lies' if above == 1 else 'lie'} above the line, which "
            "rounding alone does not explain: the statistics disagree with each other."
        )
    return sentences


def expected_rank(sums: Aggregates) -> list[str]:
    """On E[R] over s(H)."""
    middle, high = (aggregates.key_quantile(sums.ratio, q) for q in (0.5, 0.95))
    below = int(sums.sums["below"])
    seam = aggregates.QUADRANT_ENTROPY
    uncertain = float(sums.plane[:, sums.entropy_edges[:-1] >= seam].sum()) / sums.tokens
    return [
        "RankTuner's practical scale uses s(H), which the entropy gives for free, in place of "
        "the expected rank E[R]. The orange line is the mean of s(H) at each entropy.",
        f"E[R] is {number(middle)} times s(H) for the median token, and {number(high)} times at "
        f"the 95th percentile. About {percent(uncertain)} of the tokens have an entropy of two "
        f"bits ({seam:.2f} nats) or more, where s(H) follows the entropy.",
        f"{counted(below, 'token')} {'lies' if below == 1 else 'lie'} under the bound."
        if below
        else "No token lies under the bound, as theory demands.",
    ]


def weights(sums: Aggregates) -> list[str]:
    """On the distributions of weights."""
    mean = sums.weight / sums.tokens
    low, high = int(np.argmin(mean)), int(np.argmax(mean))
    spread = []
    for m in compared(sums):
        method = sums.methods[m]
        ends = sums.quantile(method, 0.05), sums.quantile(method, 0.95)
        if ends[1] > ends[0]:
            spread.append(f"from {number(ends[0])} to {number(ends[1])} under {label(method)}")
    sentences = [
        "Each ridge is one method, drawn to the height of its own fullest bin; the axis is "
        "logarithmic and the same for all.",
        f"Mean weights go from {number(mean[low])} ({label(sums.methods[low])}) to "
        f"{number(mean[high])} ({label(sums.methods[high])}): the gradient's size changes with "
        "them, so one learning rate is not the same for all.",
    ]
    if spread:
        sentences.append(f"Nine weights in ten go {listed(spread)}.")
    dropped = [
        (float(keys[0] / sums.tokens), label(method))
        for method, keys in zip(sums.methods, sums.weight_keys, strict=True)
        if keys[0]
    ]
    if dropped:
        share, method = max(dropped)
        sentences.append(f"{method} drops {percent(share)} of the tokens altogether.")
    tops = [sums.heaviest(method)[0].weight for method in sums.methods]
    largest = int(np.argmax(tops))
    sentences.append(
        f"The largest weight of all is {number(tops[largest])}, by {label(sums.methods[largest])}."
    )
    return sentences


def effective(sums: Aggregates) -> list[str]:
    """On the effective share of the tokens."""
    share = sums.effective_share()
    order = np.argsort(share)
    own = compared(sums)[0]
    return [
        "(Σw)²/(n·Σw²) is the share of the tokens that, weighted equally, would make a sum as "
        "noisy as this one: 100\u00a0% for equal weights.",
        f"{label(sums.methods[own])} trains as if on {percent(share[own])} of the "
        f"{counted(sums.tokens, 'token')}, "
        + (
            "the smallest share of all methods."
            if order[0] == own
            else f"{label(sums.methods[order[0]])}, the most uneven, on {percent(share[order[0]])}."
        ),
    ]


def loss_mass(sums: Aggregates) -> list[str]:
    """On where the weighted nll lies."""
    by_p, by_h = sums.deciles("p"), sums.deciles("entropy")
    edge_p, edge_h = sums.decile_edges("p")[1], sums.decile_edges("entropy")[9]
    methods = compared(sums)

    def each(shares: np.ndarray) -> str:
        return listed([f"{percent(shares[m])} under {label(sums.methods[m])}" for m in methods])

    sentences = [
        "The loss is the sum of weight × nll. Each row divides one method's sum among groups of "
        "tokens, in percent; orange groups carry more than their share of the tokens, blue ones "
        "less.",
        f"The tenth of the tokens with the lowest p (up to {number(edge_p)}) carries "
        f"{each(by_p[:, 0])}.",
        f"The tenth with the highest entropy (from {number(edge_h)} nats) carries "
        f"{each(by_h[:, 9])}.",
    ]
    names, count, mass = mass_groups(sums, "position")
    if len(names) > 1:
        own = methods[0]
        most = int(np.argmax(mass[own] / np.maximum(count, 1e-9) * (count >= 0.01)))
        sentences.append(
            f"By position: {label(sums.methods[own])} is heaviest on tokens {names[most]} of a "
            f"conversation, which are {percent(count[most])} of the tokens and "
            f"{percent(mass[own, most])} of its loss."
        )
    names, count, mass = mass_groups(sums, "source")
    if len(names) > 1:
        own = methods[0]
        shift = mass[own] - count
        most = int(np.argmax(np.abs(shift)))
        sentences.append(
            f"By source: {names[most]} has {percent(count[most])} of the tokens and "
            f"{percent(mass[own, most])} of {label(sums.methods[own])}'s loss."
        )
    else:
        sentences.append(f"All tokens come from one source, {names[0]}.")
    return sentences


def agreement(sums: Aggregates) -> list[str]:
    """On the rank correlation between methods."""
    names, values, sample = sums.correlation()
    constant = [label(name) for name in sums.methods if name not in names]
    sentences = [
        "1 means that two methods put the tokens in the same order, 0 that their orders have "
        "nothing in common, −1 that one lifts what the other drops. "
        + (
            f"Computed on all {counted(sample, 'token')}."
            if sums.stride == 1
            else f"Computed on {counted(sample, 'token')}: every {ordinal(sums.stride)} one."
        )
    ]
    if len(names) > 1:
        pairs = [(values[i, j], i, j) for i in range(len(names)) for j in range(i)]
        for what, (value, i, j) in (
            ("agree the most", max(pairs)),
            ("differ the most", min(pairs)),
        ):
            sentences.append(
                f"{label(names[j])} and {label(names[i])} {what} ({value:.2f})".replace("-", "−")
                + "."
            )
    if constant:
        sentences.append(
            f"{listed(constant)} {'gives' if len(constant) == 1 else 'give'} all tokens the same "
            f"weight and {'has' if len(constant) == 1 else 'have'} no order."
        )
    return sentences
