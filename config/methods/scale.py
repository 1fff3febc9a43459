# SCALE: gradients whose rows are made equally large, momentum on the output layer alone. Rate: 2e-3 (not searched).
optimizer = 'scale'
