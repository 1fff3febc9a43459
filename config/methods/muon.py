# Muon: the averaged gradient with all singular values made one; AdamW on what is no matrix. Best rate: 4e-3.
optimizer = 'muon'
