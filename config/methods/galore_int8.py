# GaLore on weights in 8 bits, else as galore_lean: the least memory. Rates: as galore.
lowrank = 'attn,mlp'
heads, rank = 1, 128
factors, split = 'basis', False
merge_every = 1
basis, basis_every, scale = 'sketch', 200, 0.25
per_layer, grad_clip, state_bits, param_bits = True, 0.0, 8, 8
