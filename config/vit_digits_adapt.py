# The ViT of vit_quickstart.py on inverted, coloured, rotated digits.
# python train_vit.py config/vit_quickstart.py
# python train_vit.py config/vit_digits_adapt.py config/methods/lora.py
# Two CPU cores: 1 minute after vit_quickstart.py, test accuracy 0.94, AUC 0.995
out_dir = 'out/vit_digits_adapt'
init_from = 'out/vit_quickstart/best.pt'
dataset = 'digits_shifted'
batch_size = 64
model = 'vit_tiny_patch16_224'
epochs, eval_interval, log_interval, warmup_iters = 20, 100, 10, 20
rank = {'lora': 8, 'lora_fa': 8, 'mhlora': 2, 'relora': 8, 'lte': 8, 'galore': 24,
        'galore_lean': 24, 'galolte': 24, 'fira': 24}
alpha = {'lora': 8.0, 'lora_fa': 8.0, 'mhlora': 8.0, 'relora': 8.0, 'lte': 8.0}
merge_every = {'galolte': 5}
basis_every = {'galore': 25, 'galore_lean': 25, 'galolte': 25, 'fira': 25}
learning_rate = {'full': 1e-3, 'local_adamw': 1e-3, 'lora': 3e-3, 'lora_fa': 3e-3, 'mhlora': 3e-3,
                 'relora': 3e-3, 'lte': 3e-3, 'galore': 1e-2, 'galore_lean': 1e-2, 'galolte': 1e-2,
                 'fira': 1e-2}
min_lr = 1e-5
device, dtype = 'cpu', 'float32'
