# Muon without momentum: no state at all for the matrices of attention and MLP. Rate: 4e-3 at 3.3M (not searched).
optimizer = 'muon'
momentum = 0.0
