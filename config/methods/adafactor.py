# Adafactor (https://arxiv.org/abs/1804.04235) trains all weights. Of a matrix (m, n) of attention
# or MLP it keeps m + n scalars; AdamW trains the rest.
# Learning rate: not tuned. The root mean square of an update is near 1, more than AdamW's is after
# its first steps: begin with AdamW's rate or less.
optimizer = 'adafactor'
