# ViT-L/16 at 224 pixels on PathMNIST with LoRA of rank 4 on q and v for one epoch; the classifier trains too.
# python prepare.py pathmnist --size 224 && torchrun --standalone --nproc_per_node=4 train_vit.py config/vit_large_pathmnist_lora.py
# Four GPUs of 12 GB: not yet run
out_dir = 'out/vit_large_pathmnist_lora'
dataset, augment = 'pathmnist_224', 'flip'
model = 'vit_large_patch16_224'
batch_size, gradient_accumulation_steps = 32, 2
lowrank, heads, rank, alpha = 'q,v', 1, 4, 4.0
epochs, warmup_iters, eval_interval = 1, 100, 350
learning_rate = 5e-4
