# AdamW with 8-bit moments at full rank on 8-bit weights, in the backward pass: about three bytes
# per parameter in place of AdamW's sixteen in float32. Gradients cannot be clipped, and with
# gradient accumulation all of them stay in memory: use a larger batch with gradient_checkpointing.
# Learning rate: not tuned.
per_layer, grad_clip, weight_bits, optim_bits = True, 0.0, 8, 8
