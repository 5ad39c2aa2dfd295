"""How far results may differ where bits are not promised; everywhere else tests demand equality.

bfloat16 has 8 bits of significand: one rounding is off by at most 2^-9 of the value.
"""

BF16_ROUNDING = 2.0**-9

# Two bfloat16 forward passes of one network that sum in other orders. Each of the two layers' blocks rounds some eight
# times on the way to a logit, and the errors add up like a random walk of 2 * 2 * 8 roundings; the factor 4 leaves
# room for the largest of some thousand logits. Relative to the largest logit.
LOGITS = 4 * (2 * 2 * 8) ** 0.5 * BF16_ROUNDING

# A gradient of a bfloat16 backward pass against float64, relative to the norm of the tensor's gradient: twice the
# roundings of a forward pass, averaged over the elements.
GRADIENT = 2 * LOGITS

# The mean loss in float32 over logits that are off by LOGITS / 2 (root mean square) each, independently.
LOSS = LOGITS / 2
