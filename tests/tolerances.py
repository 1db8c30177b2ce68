"""Named tolerances, each with its reason."""

# Two float32 programs that sum in different orders: a few hundred roundings of 6e-8.
F32 = {"rtol": 2e-5, "atol": 2e-6}

# bfloat16 keeps 8 bits: one rounding is 2^-9 relative.
BF16 = {"rtol": 1e-2, "atol": 1e-2}

# Ours against transformers + torch, float32: tiny models, logits of size 1.
HF_LOGITS = {"rtol": 0, "atol": 1e-4}

# The same for SmolLM2: thirty layers, logits of up to 40.
SMOLLM2_LOGITS = {"rtol": 0, "atol": 2e-4}

# The same conversations in rows of another shape: attention and the loss sum in another order.
PACKED_LOSS = {"rtol": 1e-5, "atol": 1e-7}

# Its gradients, each divided by its largest entry: sums of terms that cancel.
PACKED_GRADIENT = {"rtol": 0, "atol": 1e-5}

# Gradients of a float32 loss, each divided by its largest entry: sums of terms that cancel.
LOSS_GRADIENT = {"rtol": 2e-5, "atol": 2e-6}

# The same over 151,936 rows: sums of as many terms in float32, in two orders.
LARGE_VOCAB_GRADIENT = {"rtol": 0, "atol": 5e-5}

# float64 programs that sum in different orders.
F64 = {"rtol": 1e-11, "atol": 1e-12}

# A gradient rounded to bfloat16 on its way, divided by its largest entry.
BF16_GRADIENT = {"rtol": 1e-2, "atol": 4e-3}

# E[R] − 1 from the histogram: its derived bound is 0.342 %; 1 + x in float32 resolves 1e-6.
EXPECTED_RANK = {"rtol": 4e-3, "atol": 1e-6}

# The Relative Scale from that E[R].
EXACT_SCALE = {"rtol": 1e-3, "atol": 0}

# Gradients weighted by it, each divided by its largest entry: sums of terms that cancel.
EXACT_GRADIENT = {"rtol": 0, "atol": 1e-3}

# Mean NLL in nats of the same tokens, ours against transformers + torch, float32.
MEAN_NLL = {"rtol": 0, "atol": 1e-4}

# Twenty float32 steps whose sums are cut otherwise: the loss of each.
SAME_RUN_LOSS = {"rtol": 2e-6, "atol": 0}

# The parameters after them, each divided by its largest entry: Adam divides small gradients by
# their own size, and their rounding with them.
SAME_RUN_PARAM = {"rtol": 0, "atol": 5e-5}

# The loss of a few steps in bfloat16: a sum over the tokens of roundings of 2^-9.
BF16_RUN_LOSS = {"rtol": 1e-2, "atol": 0}
