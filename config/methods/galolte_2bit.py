# GaLoLTE with Muon on slow links: merges average all that trains, in 2 bits a number; torchrun only. Rate: 8e-3 (not searched).
lowrank = 'attn,mlp'
heads, rank = 4, 64
factors, split = 'basis', True
merge_every = 10
optimizer = 'muon'
basis, basis_every, scale = 'sketch', 50, 1.0
sync, sync_bits = 'merge', 2
