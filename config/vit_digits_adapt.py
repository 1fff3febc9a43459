# LoRA on attention: the ViT of vit_quickstart.py, on digits that are inverted, coloured and rotated. --lowrank= is full fine-tuning.
# python prepare.py digits_shifted && python train_vit.py config/vit_digits_adapt.py
# Two CPU cores, after vit_quickstart.py: not yet run
out_dir = 'out/vit_digits_adapt'
init_from = 'out/vit_quickstart/best.pt'
dataset = 'digits_shifted'
batch_size = 64
model = 'vit_tiny_patch16_224'
lowrank, heads, rank, alpha = 'attn', 1, 8, 8.0
epochs, eval_interval, log_interval, warmup_iters = 20, 100, 10, 20
learning_rate, min_lr = 3e-3, 1e-5
device, dtype = 'cpu', 'float32'
