# Adafactor (https://arxiv.org/abs/1804.04235) at full rank on 8-bit weights, in the backward pass.
# Its state is a row and a column per matrix. Gradients cannot be clipped, and with gradient
# accumulation all of them stay in memory: use a larger batch with gradient_checkpointing instead.
# Learning rate: 4e-4 to fine-tune SmolLM2-135M-Instruct, the best of three (docs/results.md). With
# 2e-3 the quick start ends at 1.61 nats per byte.
optimizer = 'adafactor'
per_layer, grad_clip, weight_bits = True, 0.0, 8
optim_bits = 8  # of embeddings and the output layer, which AdamW trains
