# SCALE: gradients whose rows are made equally large, momentum on the output layer alone. Rate: 1e-3 (of two).
optimizer = 'scale'
