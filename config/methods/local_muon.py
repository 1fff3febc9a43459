# Local Muon: whole weights on each rank, averaged every T steps in 2 bits; torchrun only. One rate at 10.7M: 4e-3, at 3.3M 8e-3.
optimizer = 'muon'
sync, merge_every, sync_bits = 'merge', 10, 2
