# Muon: averaged gradients, all singular values made one, AdamW on all else. Rate: 2e-3 to 4e-3, at 3.3M 8e-3.
optimizer = 'muon'
