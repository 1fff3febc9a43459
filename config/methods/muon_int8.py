# Muon without momentum at full rank on 8-bit weights, in the backward pass: attention and MLP
# have no optimizer state. Gradients cannot be clipped, and with gradient accumulation all of them
# stay in memory: use a larger batch with gradient_checkpointing instead.
# With few tokens per step Muon's matrix products take longer than the model's. --muon_rows=128
# makes them 40 times cheaper at 7B; adafactor_int8 needs none.
# Learning rate: use muon_lean's. At 0.5M parameters the loss is then 0.01 (unclear) above that of
# float32 weights after 20 bytes per parameter, and 0.02 after 80 (docs/results.md). To fine-tune
# SmolLM2-135M-Instruct, 8e-4 is the best of four rates, but adafactor_int8 ends lower.
optimizer = 'muon'
momentum = 0.0
per_layer, grad_clip, weight_bits = True, 0.0, 8
optim_bits = 8  # of embeddings and the output layer, which AdamW trains
