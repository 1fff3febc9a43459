# Adafactor (https://arxiv.org/abs/1804.04235) trains all weights. Of a matrix (m, n) of attention
# or MLP it keeps m + n scalars; AdamW trains the rest.
# Learning rate: not tuned (2e-3 on the quick start).
optimizer = 'adafactor'
