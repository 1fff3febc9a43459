# SCALE: gradients with rows of length one, momentum on the output layer alone: no state. Rates: not searched.
optimizer = 'scale'
