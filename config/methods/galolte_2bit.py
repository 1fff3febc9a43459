# GaLoLTE with Muon on slow links: merges average what trains, not its moments, in 2 bits a number; torchrun only. Best rate so far: 4e-3.
lowrank = 'attn,mlp'
heads, rank = 4, 64
factors, split = 'basis', True
merge_every = 10
optimizer = 'muon'
basis, basis_every, scale = 'sketch', 100, 1.0
sync, sync_bits, sync_moments = 'merge', 2, False
