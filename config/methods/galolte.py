# GaLoLTE: LTE's workers, all inside one basis of the averaged gradient. Best of three: 1.4e-2, at 3.3M 2e-2.
lowrank = 'attn,mlp'
heads, rank = 4, 64
factors, split = 'basis', True
merge_every = 10
basis, basis_every, scale = 'sketch', 50, 0.25
