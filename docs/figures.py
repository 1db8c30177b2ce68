"""Draws the figure of docs/methods.md from the code of the losses.

python docs/figures.py
"""

from __future__ import annotations

import io
import math
import pathlib

import altair as alt
import jax.numpy as jnp
import numpy as np
import PIL.Image
import vl_convert

from ranktuner_jax import losses

OUTPUT = pathlib.Path(__file__).parent / "images" / "weights.png"

METHODS: dict[str, losses.Weighting] = {
    "sft": losses.SFT(),
    "dft": losses.DFT(),
    "talr, τ = 1 nat": losses.TALR(),
    "profit": losses.ProFit(),
    "deft": losses.DEFT(),
    "idft": losses.IDFT(),
    "eaft": losses.EAFT(),
    "entropy": losses.Entropy(),
    "ranktuner, base prob": losses.RankTuner("prob"),
    "ranktuner, base one": losses.RankTuner("one"),
    "base prob, scale exact": losses.RankTuner("prob", scale="exact"),
    "base one, scale exact": losses.RankTuner("one", scale="exact"),
}
VOCABULARY = 2048
PROBS = np.geomspace(1e-3, 0.99, 40)
BITS = np.linspace(0.1, 9.9, 50)


def predictions() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A prediction for each p of the label and each entropy H that can go with it.

    The other tokens share 1 − p geometrically: the k-th likeliest has a share that falls as r^k,
    and r follows from H.

    Returns:
      p [N], H [N] in bits, and logits [N, VOCABULARY] whose token 0 is the label.
    """
    rates = -np.geomspace(30.0, 1e-6, 600)  # ln r
    shares = np.exp(np.outer(rates, np.arange(VOCABULARY - 1)))
    shares /= shares.sum(1, keepdims=True)
    entropies = -np.sum(shares * np.log(np.maximum(shares, 1e-300)), 1)
    prob, bits = (grid.ravel() for grid in np.meshgrid(PROBS, BITS))
    # H = h(p) + (1 − p) · entropy of the others, h the entropy of a coin.
    coin = -prob * np.log(prob) - (1 - prob) * np.log1p(-prob)
    others = (bits * math.log(2) - coin) / (1 - prob)
    possible = (others > entropies[0]) & (others < entropies[-1])
    prob, bits, others = prob[possible], bits[possible], others[possible]
    rate = np.interp(others, entropies, rates)
    steps = rate[:, None] * np.arange(VOCABULARY - 1)
    rest = steps - np.log(np.exp(steps).sum(1, keepdims=True)) + np.log1p(-prob)[:, None]
    return prob, bits, np.concatenate([np.log(prob)[:, None], rest], 1)


def weights() -> list[dict[str, float | str]]:
    """The weight of each method at each point, as rows `method`, `p`, `H` and `weight`."""
    prob, bits, logits = predictions()
    fields = ("expected_rank", "topk_entropy", "collision")
    labels = jnp.zeros(len(prob), int)
    stats = losses.token_stats(jnp.asarray(logits, jnp.float32), labels, fields)
    return [
        {"method": name, "p": float(p), "H": float(h), "weight": float(w)}
        for name, method in METHODS.items()
        for p, h, w in zip(prob, bits, method(stats, jnp.float32(1.0)), strict=True)
    ]


def draw(output: pathlib.Path) -> None:
    """Writes the figure as a PNG."""
    ratio = (PROBS[1] / PROBS[0]) ** 0.5
    half = (BITS[1] - BITS[0]) / 2
    rows = [
        row
        | {
            "p2": row["p"] * ratio,
            "p": row["p"] / ratio,
            "H2": row["H"] + half,
            "H": row["H"] - half,
            "weight": max(row["weight"], 0.02),
        }
        for row in weights()
    ]
    color = alt.Color(
        "weight:Q",
        scale=alt.Scale(
            type="log",
            domain=[0.02, 0.15, 1, 5, 30],
            range=["#08306b", "#6baed6", "#f2f2f2", "#fd8d3c", "#7f2704"],
            clamp=True,
        ),
        legend=alt.Legend(title="weight", values=[0.02, 0.1, 1, 5, 30], gradientLength=300),
    )
    axis = alt.Axis(values=[0.001, 0.01, 0.1, 1], format="~g")
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_rect(strokeWidth=0.7)
        .encode(
            x=alt.X("p:Q", scale=alt.Scale(type="log", domain=[0.001, 1]), axis=axis, title="p"),
            x2="p2:Q",
            y=alt.Y("H:Q", scale=alt.Scale(domain=[0, 10]), title="H, bits"),
            y2="H2:Q",
            color=color,
            stroke=color,  # Or the background shines through between the rectangles.
            facet=alt.Facet("method:N", columns=4, sort=list(METHODS), title=None),
        )
        .properties(width=150, height=130)
    )
    picture = io.BytesIO(vl_convert.vegalite_to_png(chart.to_json(), scale=1.2))
    # 128 colours look the same and take a sixth of the space.
    PIL.Image.open(picture).convert("RGB").quantize(128).save(output, optimize=True)


if __name__ == "__main__":
    draw(OUTPUT)
