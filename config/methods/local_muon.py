# Local Muon: whole weights on each rank, averaged every T steps in 2 bits; torchrun only. One rate tried: 4e-3.
optimizer = 'muon'
sync, merge_every, sync_bits = 'merge', 10, 2
