# ViT-B/16 at 224 pixels on PathMNIST with LoRA of rank 4 on q and v, as MeLo has it, and the classifier, one epoch.
# python prepare.py pathmnist --size 224 && torchrun --standalone --nproc_per_node=4 train_vit.py config/vit_base_pathmnist_lora.py
# Four GPUs of 12 GB: not yet run
out_dir = 'out/vit_base_pathmnist_lora'
dataset, augment = 'pathmnist_224', 'flip'
model = 'vit_base_patch16_224'
batch_size, gradient_accumulation_steps = 64, 1
lowrank, heads, rank, alpha = 'q,v', 1, 4, 4.0
epochs, warmup_iters, eval_interval = 1, 100, 350
learning_rate = 1e-3
