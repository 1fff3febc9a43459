# Muon without momentum: no state of matrices; each layer steps as soon as its gradient is there. Best rate at 3.3M: 1.6e-2.
optimizer = 'muon'
momentum = 0.0
per_layer, grad_clip, state_bits = True, 0.0, 8  # of embeddings and vectors, which AdamW trains
