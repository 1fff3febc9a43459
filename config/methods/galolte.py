# GaLoLTE: LTE's workers, all inside one subspace of the averaged gradient. Best rate: 2e-2 at 10.7M and at 3.3M.
lowrank = 'attn,mlp'
heads, rank = 4, 64
factors, split = 'basis', True
merge_every = 10
basis, basis_every, scale = 'sketch', 50, 0.25
