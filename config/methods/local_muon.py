# Local Muon: whole weights on each rank, averaged every T steps in 2 bits a number; torchrun only. At 3.3M 8e-3 was good.
optimizer = 'muon'
sync, merge_every, sync_bits = 'merge', 10, 2
