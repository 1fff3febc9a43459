# ViT-L/16 at 224 pixels on PathMNIST for one epoch: the study's fine-tuning, full or by LoRA.
# python prepare.py pathmnist --size 224
# (about 12.6 GB to download, 16 more on disk; the .npz may go afterwards)
# TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600 torchrun --standalone --nproc_per_node=4 \
#   train_vit.py config/vit_large_pathmnist.py config/methods/lora.py
# Four GPUs of 12 GB: not yet run
out_dir = 'out/vit_large_pathmnist'
dataset, augment = 'pathmnist_224', 'flip'
model = 'vit_large_patch16_224'
batch_size, gradient_accumulation_steps = 32, 2
epochs, warmup_iters, eval_interval = 1, 100, 350
lowrank = {'lora': 'q,v'}  # as MeLo has it
rank = {'lora': 4}
alpha = {'lora': 4.0}
learning_rate = {'full': 5e-5, 'lora': 5e-4}
