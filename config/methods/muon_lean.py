# Muon without momentum, in the backward pass: no state of attention, MLP. Best rate: 1.6e-2, at 3.3M 3.2e-2.
# With several micro-batches a step all gradients are kept, and it is not lean.
optimizer = 'muon'
momentum = 0.0
per_layer, grad_clip = True, 0.0
state_bits = 8  # of what AdamW trains: embeddings, the output layer, vectors
