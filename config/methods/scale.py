# SCALE: gradients whose rows are made equally large, momentum on the output layer. At 3.3M: 5e-4 to 1e-3.
optimizer = 'scale'
