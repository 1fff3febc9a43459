# GaLore: all of W trains; Adam keeps moments of r directions. Best: 5e-3 (drop-in), at 3.3M 2e-2.
lowrank = 'attn,mlp'
heads, rank = 1, 128
factors, split = 'basis', False
merge_every = 1
basis, basis_every, scale = 'sketch', 200, 0.25
