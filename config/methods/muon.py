# Muon: the averaged gradient with all singular values made one, AdamW on what is no matrix. Rates: not searched.
optimizer = 'muon'
