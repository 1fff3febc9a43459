# GaLore: all of W trains, and Adam keeps moments of r directions only. Best rate: 5e-3, at 3.3M 2e-2.
lowrank = 'attn,mlp'
heads, rank = 1, 128
factors, split = 'basis', False
merge_every = 1
basis, basis_every, scale = 'sketch', 200, 0.25
