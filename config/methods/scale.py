# SCALE: gradients with rows of length one, momentum on the output layer alone. Rate: 2e-3 (not searched).
optimizer = 'scale'
