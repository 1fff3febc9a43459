# ViT-B/16 at 224 pixels on PathMNIST with GaLore of rank 128, projected in the backward pass, one epoch.
# python prepare.py pathmnist --size 224 && torchrun --standalone --nproc_per_node=4 train_vit.py config/vit_base_pathmnist_galore.py
# Four GPUs of 12 GB: not yet run
out_dir = 'out/vit_base_pathmnist_galore'
dataset, augment = 'pathmnist_224', 'flip'
model = 'vit_base_patch16_224'
batch_size, gradient_accumulation_steps = 64, 1
optimizer, galore_rank, galore_gap, galore_backward = 'galore', 128, 200, 'projected'
epochs, warmup_iters, eval_interval = 1, 100, 350
learning_rate = 2e-4
