# Muon without momentum: no state at all for the matrices of attention and MLP. Best rate at 3.3M so far: 8e-3.
optimizer = 'muon'
momentum = 0.0
