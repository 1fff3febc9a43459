# GaLore with moments of 8 bits; each layer steps as soon as its gradient is there. Rates: as galore.
lowrank = 'attn,mlp'
heads, rank = 1, 128
factors, split = 'basis', False
merge_every = 1
basis, basis_every, scale = 'sketch', 200, 0.25
per_layer, grad_clip, state_bits = True, 0.0, 8
