# GaLoLTE on slow links: merges average all that trains, in 2 bits a number; torchrun only. Rates: as galolte.
lowrank = 'attn,mlp'
heads, rank = 4, 64
factors, split = 'basis', True
merge_every = 10
basis, basis_every, scale = 'sketch', 50, 0.25
sync, sync_bits = 'merge', 2
