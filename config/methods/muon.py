# Muon: the averaged gradient with all singular values made one, AdamW on embeddings and vectors. Best rate: 4e-3.
optimizer = 'muon'
