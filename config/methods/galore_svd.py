# GaLore as published (https://arxiv.org/abs/2403.03507) and as in galore-torch: projections come
# from the SVD of the current gradient, the first one too, and moments stay as they are when the
# projection changes. The whole gradient is formed, which takes memory; config/methods/galore.py
# avoids it.
# Learning rate: not tuned.
lowrank = 'galore'
proj_method = 'svd'
rank = 128
update_proj_gap = 200
