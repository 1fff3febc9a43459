# Local Muon, as MuLoCo without its outer step: whole weights, averaged every T steps in 2 bits a number; torchrun only. Best rate so far: 4e-3.
optimizer = 'muon'
sync, merge_every, sync_bits = 'merge', 50, 2
