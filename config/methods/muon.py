# Muon: averaged gradients, all singular values made one, AdamW on all else. Best rate: 4e-3, at 3.3M 8e-3.
optimizer = 'muon'
