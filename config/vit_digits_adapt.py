# LoRA on attention and MLP: the ViT of vit_quickstart.py on inverted, coloured, rotated digits; --lowrank=: full rank.
# python train_vit.py config/vit_quickstart.py && python train_vit.py config/vit_digits_adapt.py
# Two CPU cores: 1 minute after vit_quickstart.py, test accuracy 0.96, AUC 0.998
out_dir = 'out/vit_digits_adapt'
init_from = 'out/vit_quickstart/best.pt'
dataset = 'digits_shifted'
batch_size = 64
model = 'vit_tiny_patch16_224'
lowrank, heads, rank, alpha = 'attn,mlp', 1, 8, 8.0
epochs, eval_interval, log_interval, warmup_iters = 20, 100, 10, 20
learning_rate, min_lr = 3e-3, 1e-5
device, dtype = 'cpu', 'float32'
