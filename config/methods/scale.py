# SCALE: gradients whose rows are scaled to one size, momentum on the output layer. At 3.3M: 5e-4 to 1e-3.
optimizer = 'scale'
