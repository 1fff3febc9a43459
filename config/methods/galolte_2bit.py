# GaLoLTE with Muon: workers send changes of W in 2 bits, and keep their moments; torchrun only. 4e-3 to 8e-3.
lowrank = 'attn,mlp'
heads, rank = 4, 64
factors, split = 'basis', True
merge_every = 10
optimizer = 'muon'
basis, basis_every, scale = 'sketch', 100, 1.0
sync, sync_bits, sync_moments = 'merge', 2, False
