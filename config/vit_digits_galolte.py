# GaLoLTE on a ViT: four heads on their own parts of the batch, all in one subspace of the gradient.
# python train_vit.py config/vit_quickstart.py && python train_vit.py config/vit_digits_galolte.py
# Two CPU cores: 1 minute after vit_quickstart.py, test accuracy 0.96, AUC 0.998 (one seed, first edition)
out_dir = 'out/vit_digits_galolte'
init_from = 'out/vit_quickstart/best.pt'
dataset = 'digits_shifted'
batch_size = 64
model = 'vit_tiny_patch16_224'
lowrank, heads, rank = 'attn,mlp', 4, 24
head_input, head_basis, merge_every = 'split', 'gradient', 5
galore_gap, galore_basis = 25, 'power'
epochs, eval_interval, log_interval, warmup_iters = 20, 100, 10, 20
learning_rate, min_lr = 1e-2, 1e-5
device, dtype = 'cpu', 'float32'
