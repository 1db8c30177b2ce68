"""Named tolerances, each with its reason."""

from typing import TypedDict


class Tolerance(TypedDict):
    """Arguments of `np.testing.assert_allclose`."""

    rtol: float
    atol: float


# Two float32 programs that sum in different orders: a few hundred roundings of 6e-8.
F32: Tolerance = {"rtol": 2e-5, "atol": 2e-6}

# bfloat16 keeps 8 bits: one rounding is 2^-9 relative.
BF16: Tolerance = {"rtol": 1e-2, "atol": 1e-2}

# Ours against transformers + torch, float32: tiny models, logits of size 1.
HF_LOGITS: Tolerance = {"rtol": 0, "atol": 1e-4}

# The same for SmolLM2: thirty layers, logits of up to 40.
SMOLLM2_LOGITS: Tolerance = {"rtol": 0, "atol": 2e-4}

# The same conversations in rows of another shape: attention and the loss sum in another order.
PACKED_LOSS: Tolerance = {"rtol": 1e-5, "atol": 1e-7}

# Its gradients, each divided by its largest entry: sums of terms that cancel.
PACKED_GRADIENT: Tolerance = {"rtol": 0, "atol": 1e-5}

# Gradients of a float32 loss, each divided by its largest entry: sums of terms that cancel.
LOSS_GRADIENT: Tolerance = {"rtol": 2e-5, "atol": 2e-6}

# The same over 151,936 rows: sums of as many terms in float32, in two orders.
LARGE_VOCAB_GRADIENT: Tolerance = {"rtol": 0, "atol": 5e-5}

# float64 programs that sum in different orders.
F64: Tolerance = {"rtol": 1e-11, "atol": 1e-12}

# A gradient that was rounded to bfloat16, divided by its largest entry.
BF16_GRADIENT: Tolerance = {"rtol": 1e-2, "atol": 4e-3}

# E[R] − 1 from the histogram: its derived bound is 0.342 %; 1 + x in float32 resolves 1e-6.
EXPECTED_RANK: Tolerance = {"rtol": 4e-3, "atol": 1e-6}

# The Relative Scale from that E[R].
EXACT_SCALE: Tolerance = {"rtol": 1e-3, "atol": 0}

# Gradients weighted by it, each divided by its largest entry: sums of terms that cancel.
EXACT_GRADIENT: Tolerance = {"rtol": 0, "atol": 1e-3}

# Mean NLL in nats of the same tokens, ours against transformers + torch, float32.
MEAN_NLL: Tolerance = {"rtol": 0, "atol": 1e-4}

# The loss of each of twenty float32 steps whose sums are split differently.
SAME_RUN_LOSS: Tolerance = {"rtol": 2e-6, "atol": 0}

# The parameters after them, each divided by its largest entry: Adam divides gradients, and so
# their rounding, by their own size.
SAME_RUN_PARAM: Tolerance = {"rtol": 0, "atol": 5e-5}

# The same with Adafactor where a tensor axis pads the vocabulary, of 61 rows, with one of zeros: it
# limits the root mean square of an update, over all rows.
PADDED_ADAFACTOR: Tolerance = {"rtol": 5e-4, "atol": 5e-4}

# The loss of a few steps in bfloat16: a sum over the tokens of roundings of 2^-9.
BF16_RUN_LOSS: Tolerance = {"rtol": 1e-2, "atol": 0}
